"""The gallery's figures are drawn, of what a run trained."""

import subprocess
import sys

import pytest

from tests.train import process_


@pytest.mark.slow
@pytest.mark.parametrize("name, arm", [("automix", "samix"), ("automix", "adautomix"), ("sla", "")])
def test_a_short_run_is_drawn(name, arm, tmp_path):
    options = {
        "data.name": "digits", "data.val": 150, "data.test": 697, "data.per_class": 0,
        "augment": "shift(1)", "train.steps": 8, "train.log_every": 2, "train.batch_size": 16,
    }  # fmt: skip
    command = [sys.executable, "-m", "experiments.gallery", "--noprogress", f"--arm={arm}"]
    command += [f"--config=experiments/configs/{name}.py", f"--workdir={tmp_path}"]
    command += [f"--config.{field}={value}" for field, value in options.items()]
    done = subprocess.run(command, cwd=process_.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{arm or name}.png").read_bytes().startswith(b"\x89PNG")
