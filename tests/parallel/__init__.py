"""Tests of saflex_jax.parallel."""
