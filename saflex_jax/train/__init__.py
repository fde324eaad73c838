"""Everything around the step that does I/O: the loop, evaluation, metrics, checkpoints."""

from saflex_jax.files import write_whole
from saflex_jax.train.best import Best
from saflex_jax.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedCheckpoint,
    NotWritten,
)
from saflex_jax.train.evaluate import make_evaluator, probabilities
from saflex_jax.train.files import FolderInUse, one_run_in
from saflex_jax.train.loop import Diverged, FitResult, fit
from saflex_jax.train.members import evaluate_each, of_members
from saflex_jax.train.metrics import MetricsWriter
from saflex_jax.train.stop import StopRequest
from saflex_jax.train.wise_ft import interpolated

__all__ = [
    "Best",
    "CheckpointError",
    "Checkpoints",
    "DamagedCheckpoint",
    "Diverged",
    "FitResult",
    "FolderInUse",
    "MetricsWriter",
    "NotWritten",
    "StopRequest",
    "evaluate_each",
    "fit",
    "interpolated",
    "make_evaluator",
    "of_members",
    "one_run_in",
    "probabilities",
    "write_whole",
]
