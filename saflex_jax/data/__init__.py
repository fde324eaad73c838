"""Data on the host, as NumPy arrays: sources, splits, label noise and resumable streams."""

from saflex_jax.data.noise import symmetric_noise
from saflex_jax.data.pool import Pool, write_array_record
from saflex_jax.data.sources import SOURCES, Arrays, digits, wdbc
from saflex_jax.data.splits import stratified_split
from saflex_jax.data.stream import ArrayStream

__all__ = [
    "SOURCES",
    "ArrayStream",
    "Arrays",
    "Pool",
    "digits",
    "stratified_split",
    "symmetric_noise",
    "wdbc",
    "write_array_record",
]
