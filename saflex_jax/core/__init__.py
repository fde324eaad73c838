"""The algebra of SAFLEX in pure JAX: plain arrays, pytrees, callables and keyword scalars."""
