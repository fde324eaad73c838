import jax
import pytest
import tensorboardX

from saflex_jax.train import MetricsWriter
from tests.train.setup_ import read_records


def write(folder, steps, **kwargs):
    writer = MetricsWriter(folder, **kwargs)
    for step in steps:
        writer.write(step, {"loss": step / 3})
    writer.close()


@pytest.mark.parametrize(
    "tail",
    ["", '{"step": 9, "lo', '{"step": 9, "loss": 3.0}', '{"step": 9, "loss": 3.0}\n{', "{"],
)
def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path, tail):
    write(tmp_path / "whole", range(2, 13, 2))
    write(tmp_path / "parts", [2, 4, 6, 8])
    file = tmp_path / "parts" / "metrics.jsonl"
    with file.open("a") as f:  # what a killed process was writing
        f.write(tail)
    write(tmp_path / "parts", [6, 8, 10, 12], resume_from=5)  # the checkpoint was of step 5
    assert file.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [p.name for p in file.parent.iterdir()] == ["metrics.jsonl"]


def test_a_record_is_on_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.write(step, {"loss": 0.1})
        assert read_records(tmp_path / "metrics.jsonl")[-1] == {"step": step, "loss": 0.1}
    writer.close()


def test_tensorboard_has_the_values_of_each_member_of_a_sweep(tmp_path, monkeypatch):
    found = []

    class Noting(tensorboardX.SummaryWriter):
        def add_scalar(self, tag, value, step):
            found.append((tag, value, step))
            super().add_scalar(tag, value, step)

    monkeypatch.setattr(tensorboardX, "SummaryWriter", Noting)
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write(3, {"loss": [0.5, 0.25], "rare": [None, 1.0], "seconds_per_step": 2.0})
    writer.close()
    assert found == [
        ("loss/0", 0.5, 3), ("loss/1", 0.25, 3), ("rare/1", 1.0, 3), ("seconds_per_step", 2.0, 3)
    ]  # fmt: skip


def test_a_new_run_keeps_nothing(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1], resume_from=None)
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1 / 3}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path / "run", [1, 2], tensorboard=True)
    assert not (tmp_path / "run").exists()
