"""The benchmark of sweeps: every number or the reason why not, on tiny sizes."""

import json

import pytest

from benchmarks import sweep


@pytest.mark.slow
def test_the_report_holds_every_number(monkeypatch, capsys, tmp_path):
    for name, value in {"ROWS": 64, "TRUSTED": 16, "FEATURES": 6, "BATCH": 8, "STEPS": 2}.items():
        monkeypatch.setattr(sweep, name, value)
    monkeypatch.setattr(sweep, "ARMS", ("upstream_train_val",))
    config = sweep.wdbc.get_config()
    config.train.val_batch_size = 24  # of 8 devices
    monkeypatch.setattr(sweep.wdbc, "get_config", lambda: config)
    file = tmp_path / "out.json"
    sizes = ["--seeds=2", "--members=2", "--steps=60", "--rounds=1"]
    assert sweep.main([*sizes, "--json", "--out", str(file)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == json.loads(file.read_text())
    assert made["seeds"] == {"table": 2, "features": 2}
    for name in ("alone", "in_turn"):
        of_table = made["table"]["upstream_train_val"]
        assert of_table[f"{name} / sweep"] == of_table[name] / of_table["sweep"] > 0
    assert set(made["features"]) == {"plain", "saflex"}
    assert not any(made["why_null"].values())
    for row in made["features"].values():
        assert min(row[name] for name in ("in_turn", "sweep", "in_turn / sweep")) > 0
        assert min(row[f"compilation s, {way}"] for way in ("in_turn", "sweep")) > 0


def test_runs_that_ctrl_c_cut_are_not_timed(monkeypatch):
    monkeypatch.setattr(sweep.arms, "run", lambda *_, **__: None)
    monkeypatch.setattr(sweep.arms, "run_each", lambda members, *_, **__: [(0, {}), (1, None)])
    for job in sweep.table_runs("saflex_train_val", 2, 60).values():
        with pytest.raises(KeyboardInterrupt):
            sweep.seconds(job)
    failed = [(0, FloatingPointError("step 3"))]
    monkeypatch.setattr(sweep.arms, "run_each", lambda members, *_, **__: failed)
    with pytest.raises(FloatingPointError, match="step 3"):
        sweep.table_runs("saflex_train_val", 2, 60)["sweep"]()


def test_a_feature_task_trains_the_same_in_both_ways(monkeypatch):
    """The last loss of the last seed, to rounding."""
    for name, value in {"ROWS": 64, "TRUSTED": 16, "FEATURES": 6, "BATCH": 8, "STEPS": 3}.items():
        monkeypatch.setattr(sweep, name, value)
    method = sweep.feature_methods()["plain"]
    jobs = sweep.feature_jobs(method, [sweep.feature_pools(seed) for seed in range(2)])
    in_turn, together = jobs["in_turn"]()(), jobs["sweep"]()()
    assert [float(loss) for loss in in_turn] == pytest.approx(together.tolist(), rel=1e-5)
