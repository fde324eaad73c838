"""The suite on pretrained features: halves, arms, grids."""

import pytest

from experiments import pretrained_tasks, suite, suite_tasks, tuning
from experiments.pretrained_tasks import ARMS, SETS, TOLD

# Every arm at the first point of its grid.
FIRST = {
    name: {arm: next(iter(pretrained_tasks.grid_of(arm))) for arm in ARMS}
    for name in pretrained_tasks.DEVELOPMENT | pretrained_tasks.REPORT
}
TASKS = pretrained_tasks.make(choices=FIRST)


def test_no_data_set_trains_in_both_halves():
    sets = {half: {t.config.data.name for t in TASKS.values() if t.half == half}
            for half in suite_tasks.HALVES}  # fmt: skip
    assert sets["development"] == {"cifar10n", "chest_xray"}
    assert sets["report"] == {"fashion_mnist", "brain_mri", "solar_cells", "usps", "mnist"}
    assert {(t.config.data.name, t.config.data.features) for t in TASKS.values()} == SETS.keys()
    assert sum(t.half == "report" for t in TASKS.values()) <= 22
    assert suite.SUITES["pretrained"] is pretrained_tasks.make


def test_every_task_has_every_arm_and_its_config_is_checked():
    for name, t in TASKS.items():
        found, section = suite.configs(t, ""), t.config.data
        without = {*TOLD} if not t.noise else set()
        if section.name == "solar_cells":  # graded labels
            without |= {"confident_learning", "neighbours", "saflex_audit", "saflex_audit_elr"}
        assert set(found) == ARMS.keys() - without, name
        if not section.labels:
            assert 1 - (1 - section.noise) * (1 - section.outside) == pytest.approx(t.noise)
        for arm, config in found.items():
            assert config.train.val_batch_size <= section.val
            if section.per_class and not config.data.trusted_only:  # ten classes
                assert config.train.batch_size <= 10 * section.per_class
            assert config.method.rule == ARMS[arm]["method"].get("rule", "as_given")
            assert arm not in TOLD or config.method[arm].forget == t.noise
        assert suite.described("pretrained", name, t)["regime"] == "pretrained"


def test_every_arm_at_every_point_on_other_seeds():
    tasks = pretrained_tasks.grid()
    assert tasks.keys() == TASKS.keys()
    for name, t in tasks.items():
        small = t.config.data.per_class or t.config.data.name in ("brain_mri", "solar_cells")
        assert t.config.data.select * t.seeds >= 1000 and (t.seeds == 5) == bool(small)
        assert t.config.seed == tuning.FIRST_SEED >= TASKS[name].seeds
    found = suite.configs(tasks["usps_40"], "^linear_probe|^saflex@")
    assert [*found] == [
        "linear_probe@C_5e-4", "linear_probe@C_3e-3", "linear_probe@C_1e-2", "linear_probe@C_1e-1",
        "saflex@linear_1e-2", "saflex@linear_1", "saflex@mlp_1e-2", "saflex@mlp_1",
    ]  # fmt: skip
    assert found["linear_probe@C_3e-3"].model.to_dict() == {"name": "logistic", "C": 0.003}
    assert [*found["saflex@mlp_1"].model.widths] == [256]
    assert found["saflex@linear_1"].optimizer.weight_decay == 1.0
    assert all(c.data.select == 1000 for c in found.values())
    # Every network arm has the same grid.
    assert len({str(pretrained_tasks.grid_of(arm)) for arm in ARMS}) == 2


def test_without_choices_it_is_said_how_to_choose(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "CHOICES", tmp_path / "tuned.json")
    with pytest.raises(SystemExit):
        suite.main(["--suite=pretrained", "--dry_run"])
    said = capsys.readouterr().err
    assert "tuned.json must have points of the grid" in said and "--suite=pretrained --tune" in said
    with pytest.raises(SystemExit):
        suite.main(["--suite=small", "--tune"])
    assert "--tune is of pretrained, tables; given --suite=small" in capsys.readouterr().err
