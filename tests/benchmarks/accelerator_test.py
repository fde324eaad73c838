"""The accelerator's benchmark at a size for a CPU."""

import json

import jax
import numpy as np

from benchmarks import accelerator
from saflex_jax.models import MLP, Classifier, from_linen


def test_every_part_is_written_as_soon_as_it_is_measured(tmp_path, monkeypatch, capsys):
    parts = (("mlp", 8, "float32", ("plain", "saflex")), ("mlp", 8, "bfloat16", ("plain",)))
    monkeypatch.setattr(accelerator, "TINY", parts)
    out = tmp_path / "out.json"
    written = []
    measure = accelerator.timing.Series.measure

    def watched(series, bar):
        written.append(json.loads(out.read_text()) if out.exists() else None)
        measure(series, bar)

    monkeypatch.setattr(accelerator.timing.Series, "measure", watched)
    assert accelerator.main(["--tiny", "--json", "--rounds=1", f"--out={out}"]) == 0
    report = json.loads(capsys.readouterr().out)
    first, second = report["steps"].values()
    assert first["plain"]["ratio"] == second["plain"]["ratio"] == 1
    assert first["saflex"]["ms"] > 0 and not report["why_null"]
    assert all(speed > 0 for speed in report["images_per_second"].values())
    assert written[0] is None and next(iter(written[1]["steps"].values())) == first

    assert accelerator.main(["--tiny", "--json", "--minutes=0", "--rounds=1"]) == 0
    why = json.loads(capsys.readouterr().out)["why_null"]
    assert {reason for rows in why.values() for reason in rows.values()} == {"no time was left"}


def test_bf16_compute_leaves_parameters_and_logits_in_f32():
    model = from_linen(Classifier(MLP((16,)), 3))
    half = accelerator.in_compute_dtype(model, "bfloat16")
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    params, model_state = half.init(jax.random.key(0), x)
    exact, rounded = (m.logits(params, model_state, x) for m in (model, half))
    assert {p.dtype.name for p in jax.tree.leaves(params)} == {"float32"} == {rounded.dtype.name}
    assert 1e-5 < np.abs(exact - rounded).max() < 0.05
    logits, _ = half.train(params, model_state, x, jax.random.key(1))
    np.testing.assert_array_equal(logits, rounded)
