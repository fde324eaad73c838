"""Tests of saflex_jax.train."""
