"""Makes a pool of candidates for the training samples of a config: plan, run, filter.

    python -m experiments.generate plan --config=experiments/configs/generated.py --seeds=3 \\
        --out=runs/pool --generator=edits --prompt=color --prompt=texture --strength=.3,.7 --draws=4
    python -m experiments.generate run --out=runs/pool [--shard=0/4]
    python -m experiments.generate filter --out=runs/pool --by=confidence --threshold=.1
    python -m experiments.compare --config=experiments/configs/generated.py --seeds=3

`plan` draws everything and makes nothing. `run` makes what its shard lacks: Ctrl-C stops it, the
same command goes on, and any number of shards may run at once. `filter` writes flags and deletes
nothing. docs/generation.md names models.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import pathlib
import runpy
import sys
from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments import command_line, generating, pool_filters
from experiments.generators import GENERATORS, Options
from saflex_jax import checks

CONFIG = "generated"


def plan(given: argparse.Namespace, changes: Sequence[str]) -> str:
    """Writes the plan."""
    checks.whole(1, **{"--seeds": given.seeds})
    options = Options(given.model, given.revision, given.pixels, given.device, given.dtype)
    strengths = tuple(_number("--strength", text) for text in given.strength.split(","))
    wanted = generating.Plan(
        given.generator, options, tuple(given.prompt), strengths,
        given.draws, given.guidance, given.steps, given.seed,
    )  # fmt: skip
    config = read_config(given.config, changes)
    seeds = range(config.seed, config.seed + given.seeds)
    said, number = generating.make_plan(wanted, config, seeds, given.out)
    return f"{said}: {number} candidates in {given.out}"


def run(given: argparse.Namespace, changes: Sequence[str]) -> str:
    """Makes candidates."""
    _none(changes)
    shard = generating.parse_shard(given.shard)
    return f"made {generating.run(given.out, shard)} candidates in {given.out}"


def filtered(given: argparse.Namespace, changes: Sequence[str]) -> str:
    """Flags candidates."""
    _none(changes)
    if given.by == "clip":
        found = pool_filters.clip(
            given.out, threshold=given.threshold, model=given.model, revision=given.revision,
            negatives=given.negative, device=given.device,
        )  # fmt: skip
    else:
        options = {"weights": given.weights, "backbone": given.backbone, "size": given.size}
        found = pool_filters.confidence(given.out, threshold=given.threshold, **options)
    return json.dumps(found)


def read_config(path: str, changes: Sequence[str]) -> ConfigDict:
    """The config of a file, or of a name, with changes of the form --config.data.per_class=5.

    Behind a colon stands what the config takes: "own:PATH".

    Raises:
      ValueError: no such file, or a change of another form or of no field.
    """
    file, colon, argument = command_line.config_file(path).partition(":")
    get_config = runpy.run_path(file)["get_config"]
    config = get_config(argument) if colon else get_config()
    for change in changes:
        name, equals, text = change.partition("=")
        if not name.startswith("--config.") or not equals:
            raise ValueError(f"arguments must read --config.data.val=50; given {change}")
        value = text
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
        try:
            config.update_from_flattened_dict({name.removeprefix("--config."): value})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{change}: {error}") from error
    return config


def _none(changes: Sequence[str]) -> None:
    if changes:
        raise ValueError(f"unknown arguments: {list(changes)}")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be numbers; given {text!r}") from error


def parser() -> argparse.ArgumentParser:
    """The command line: options of each action."""
    whole = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = whole.add_subparsers(dest="action", required=True)
    shared = {"allow_abbrev": False}
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", default="", help="a name on a hub, or a folder")
    model.add_argument("--revision", default="", help="of the model; empty = the newest")
    model.add_argument("--device", default="", help="torch's; empty = the fastest there is")
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=pathlib.Path, default="runs/pool", help="folder of the pool")

    add = actions.add_parser("plan", parents=[out, model], **shared).add_argument
    add("--config", default=CONFIG, help="of the runs; --config.data.val=50 changes a field")
    add("--seeds", type=int, default=1, help="of the runs, from config.seed on")
    add("--generator", default="edits", choices=GENERATORS, help="what makes candidates")
    add("--prompt", action="append", default=[], help="once for each; {label} is the class")
    add("--strength", default="0.5", help="numbers in [0, 1], separated by commas")
    add("--draws", type=int, default=4, help="candidates of each sample")
    add("--guidance", type=float, default=7.5, help="how literally prompts are taken")
    add("--steps", type=int, default=50, help="of the sampler")
    add("--seed", type=int, default=0, help="of prompts and candidates")
    add("--pixels", type=int, default=512, help="side of what the model sees; 0 = as it is")
    add("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="weights")

    add = actions.add_parser("run", parents=[out], **shared).add_argument
    add("--shard", default="0/1", help="I/N, the I-th of N from 0 on")

    add = actions.add_parser("filter", parents=[out, model], **shared).add_argument
    add("--by", default="confidence", choices=("confidence", "clip"), help="which filter")
    add("--threshold", type=float, default=0.1, help="below it a candidate is flagged")
    add("--weights", default="", help="confidence: of a backbone; empty = on pixels")
    add("--backbone", default="resnet18", help="confidence: which, with --weights")
    add("--size", type=int, default=96, help="confidence: pixels that the backbone sees")
    add("--negative", action="append", default=[], help="clip: once for each negative prompt")
    return whole


ACTIONS = {"plan": plan, "run": run, "filter": filtered}


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is named; returns the exit code."""
    given, changes = parser().parse_known_args(arguments)
    try:
        print(ACTIONS[given.action](given, changes))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"{given.action}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
