"""The pool of a config: opened, filtered, its provenance as a trace; as samples or in place."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from saflex_jax import augment, checks, data
from saflex_jax.batches import floats
from saflex_jax.types import Trace

FLAGGED = ("keep", "drop")


def check(section: ConfigDict) -> None:
    """Raises ValueError on fields of `config.data` that name no pool, or do not go with one."""
    checks.choice(FLAGGED, **{"config.data.pool_flagged": section.pool_flagged})
    if section.pool and section.on_device and not section.pool_rows:
        raise ValueError(
            "config.data.on_device must be False with a pool; given True. With pool_rows=True it "
            "may be on the device"
        )
    if section.pool and not pathlib.Path(section.pool).exists():
        raise ValueError(f"config.data.pool must be a folder or a file; given {section.pool!r}")
    for name, otherwise in (("pool_rows", False), ("pool_flagged", "keep")):
        if section[name] != otherwise and not section.pool:
            raise ValueError(
                f"config.data.{name} must be {otherwise!r} without a pool; given {section[name]!r}"
            )
    if section.pool_rows and section.val_from:
        raise ValueError(
            "config.data.val_from must be '' with pool_rows=True: candidates are not trusted; "
            f"given {section.val_from!r}"
        )


def opened(section: ConfigDict, source: data.Source, rows: np.ndarray) -> data.Pool | None:
    """The pool whose sources are the given rows of the data set; None where there is none.

    Raises:
      ValueError: a damaged pool; flagged candidates are to be dropped, and no filter ran or none is
        left; several labels at once.
    """
    if not section.pool:
        return None
    if section.pool_rows and source.task == "multilabel":
        raise ValueError(
            f"config.data.pool_rows must be False for {section.name}, which has several labels at "
            "once; given True"
        )
    known = {"num_classes": source.num_classes, "num_sources": len(source.labels)}
    if pathlib.Path(section.pool).is_file():
        pool = data.Pool.from_array_record(section.pool, **known)
    else:
        size = (section.size, section.size) if section.size else None
        pool = data.Pool.from_folder(section.pool, size=size, **known)
    about = pool.provenance
    if section.pool_flagged == "drop":
        if about is None or not about.flags:
            raise ValueError(
                f"config.data.pool_flagged must be 'keep' for {section.pool}, where nothing is "
                "flagged; `python -m experiments.generate filter` flags"
            )
        pool = pool.keep(~about.flagged.any(1))
    pool = pool.of(rows)
    if not pool.draws(np.arange(len(rows))).any():
        raise ValueError(
            f"config.data.pool must have candidates of training samples; {section.pool} has none "
            "of this seed's"
        )
    return pool if about is None else pool.with_trace(trace(pool, np.arange(len(about.prompt))))


class Samples(NamedTuple):
    """Candidates as samples of their own.

    Attributes:
      inputs: (those of the data set, those of the pool), of one dtype.
      given: f32[n, K], the pool's labels.
      clean: f32[n, K], the known ones where they are; for diagnosis only.
      places: i[n], in the pool.
    """

    inputs: tuple
    given: np.ndarray
    clean: np.ndarray
    places: np.ndarray


def samples(pool: data.Pool, inputs: np.ndarray | data.Rows, *, on_device: bool = True) -> Samples:
    """All candidates of a pool, to stand beside the inputs of a data set.

    Args:
      pool: the candidates.
      inputs: of the data set.
      on_device: read them all now; False = when a batch has them, however many there are.

    Raises:
      ValueError: candidates of another shape; where they are read, one that does not decode.
    """
    if tuple(inputs.shape[1:]) != pool.shape:
        raise ValueError(
            f"config.data.pool must hold images of shape {list(inputs.shape[1:])}, as the data "
            f"set's; given {list(pool.shape)}; config.data.size resizes both"
        )
    made, given, _, places = pool.samples()
    made = np.asarray(made) if on_device else made
    clean = given
    if pool.provenance is not None:
        known = pool.provenance.known_label[places]
        clean = np.where((known >= 0)[:, None], np.eye(given.shape[1])[known], given)
    both = (inputs, made) if inputs.dtype == made.dtype else (_floats(inputs), _floats(made))
    return Samples(both, given, clean.astype(np.float32), places)


def trace(pool: data.Pool, places: np.ndarray) -> Trace:
    """What is known of candidates, as the trace of a batch whose row i has index i.

    Args:
      pool: the candidates'.
      places: i[N] in the pool; -1 = the row is no candidate.
    """
    about, here = pool.provenance, places >= 0

    def of(values):
        return np.where(here, values[places], np.nan)

    columns = {"candidate": np.where(here, places, np.nan)}
    if about is not None:
        columns |= {name: of(getattr(about, name)) for name in ("prompt", "strength", "generator")}
        flagged = about.flagged.any(1)
        columns["flagged"] = of(np.where(flagged, 1.0, np.nan))
    return augment.candidate_trace(columns, np.arange(len(places)))


def _floats(inputs: np.ndarray | data.Rows) -> np.ndarray | data.Rows:
    if not isinstance(inputs, data.Rows):
        return floats(inputs).astype(np.float32)
    return data.Rows(lambda i: floats(np.asarray(inputs[i])), len(inputs), inputs.shape[1:], "f4")
