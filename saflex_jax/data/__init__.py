"""Data on the host, as NumPy arrays: sources, splits, label noise and resumable streams."""

from saflex_jax.data.episodes import EpisodeStream, novel_classes
from saflex_jax.data.features import Features, fit_scale, from_features
from saflex_jax.data.images import Rows, joined, resized, subset
from saflex_jax.data.noise import (
    instance_noise,
    outside_candidates,
    pairwise_noise,
    symmetric_noise,
)
from saflex_jax.data.pool import Pool, write_array_record
from saflex_jax.data.prepared import Description, from_prepared, write_prepared
from saflex_jax.data.provenance import Provenance, provenance, read_provenance
from saflex_jax.data.sources import (
    SOURCES,
    Source,
    digits,
    from_folder,
    from_npz,
    from_table,
    from_tfds,
    priors,
    wdbc,
)
from saflex_jax.data.splits import (
    Split,
    check_split,
    few_shot,
    fingerprints,
    hold_out,
    long_tail,
    stratified_split,
    without_copies,
)
from saflex_jax.data.stream import (
    ArrayStream,
    FoldStream,
    IndexStream,
    PartStream,
    Prefetched,
    StackedStream,
    sizes,
)
from saflex_jax.data.tables import Column, Table, category_sizes, fit_encoder, read_table

__all__ = [
    "SOURCES",
    "ArrayStream",
    "Column",
    "Description",
    "EpisodeStream",
    "Features",
    "FoldStream",
    "IndexStream",
    "PartStream",
    "Pool",
    "Prefetched",
    "Provenance",
    "Rows",
    "Source",
    "Split",
    "StackedStream",
    "Table",
    "category_sizes",
    "check_split",
    "digits",
    "few_shot",
    "fingerprints",
    "fit_encoder",
    "fit_scale",
    "from_features",
    "from_folder",
    "from_npz",
    "from_prepared",
    "from_table",
    "from_tfds",
    "hold_out",
    "instance_noise",
    "joined",
    "long_tail",
    "novel_classes",
    "outside_candidates",
    "pairwise_noise",
    "priors",
    "provenance",
    "read_provenance",
    "read_table",
    "resized",
    "sizes",
    "stratified_split",
    "subset",
    "symmetric_noise",
    "wdbc",
    "without_copies",
    "write_array_record",
    "write_prepared",
]
