"""A finished run, without the command that makes one, and the tables that are read off it."""

import csv
import json

from experiments import build, same_data, task
from saflex_jax import parallel, train


def finish(config, folder, *, every):
    """Trains and leaves `folder` as `saflex train` does, with a checkpoint every so many steps."""
    data = task.make_data(config)
    method = build.with_upstream(config, build.make_method(config, data.pools))
    runner = parallel.RUNNERS["jit"](method.step)
    kept = train.Checkpoints(folder / "checkpoints", config=build.settings(config), every=every)
    build.fit(config, data, method, runner, checkpoints=kept, progress=False)
    kept.close()
    same_data.keep(folder, config)
    (folder / "result.json").write_text(json.dumps({"config": build.settings(config)}))
    return folder


def read(file):
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))
