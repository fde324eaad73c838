"""The benchmark of pods: the real compiler where it is installed, and the estimate by hand."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from benchmarks import pods, step_cost
from benchmarks.pods import Collective
from tests.benchmarks.ends_ import refused

HAS_COMPILER = importlib.util.find_spec("libtpu") is not None


@pytest.mark.skipif(not HAS_COMPILER, reason="libtpu is not installed")
def test_a_slice_that_is_not_here(tmp_path, capsys):
    file = tmp_path / "pods.json"
    small = ["--slice", "v5e:2x2", "--model", "mlp", "--variant", "plain", "saflex"]
    assert pods.main([*small, "--json", "--out", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["slices"]["v5e:2x2 mlp"]
    assert not report["why_null"] and rows["saflex"]["flops_ratio"] > 1
    assert rows["plain"]["collectives"] >= 1
    assert rows["saflex"]["above_plain"] <= 2 and rows["saflex"]["in_loops"] == 0
    assert report["scaling"]["v5e mlp"]["8"]["gathered"] == 1
    # What stands in the file is not compiled again.
    assert pods._read(file).keys() == {("v5e:2x2", "mlp", v) for v in ("plain", "saflex")}


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(ImportError, match=r'pip install "saflex_jax\[pods\]"'):
        pods.devices_of("v5e:2x2")


def test_an_unknown_chip_is_named(capsys):
    assert "error: kind must be one of" in refused(pods.main, ["--slice", "v9:2x2"], capsys)


def test_the_estimate_by_hand():
    chip = pods.Chip(100.0, 1.0, 10.0, 4.0, 2, 4, 16)  # rings from a side of 4 on
    found = pods.seconds(
        chip, [2, 4], 200.0, 50.0,
        [Collective("all-reduce", 8, 3, True), Collective("all-gather", 16, 1, False)],
    )  # fmt: skip
    hops = (1 + 2) * pods.HOP
    assert found["compute"] == 2 and found["memory"] == 5
    np.testing.assert_allclose(found["links"], (2 * 3 * 8 + 16) * (7 / 8) / 4)
    np.testing.assert_allclose(found["latency"], (2 * 3 + 1) * hops)
    np.testing.assert_allclose(found["step"], 5 + found["links"] + found["latency"])


# A product of which two of eight parts are made, and travel, in each of four trips.
WINDOWS = """
%condition.1 (arg.1: (f32[8,4], u32[])) -> pred[] {
  %constant.1 = u32[] constant(8)
  %arg.1 = (f32[8,4]{1,0}, u32[]) parameter(0)
  %counter.1 = u32[] get-tuple-element(%arg.1), index=1
  ROOT %compare.1 = pred[] compare(%counter.1, %constant.1), direction=LT
}

%windowed_dot_general_body.1 (arg.2: (f32[8,4], u32[])) -> (f32[8,4], u32[]) {
  %constant.2 = u32[] constant(2)
  %arg.2 = (f32[8,4]{1,0}, u32[]) parameter(0)
  %part.1 = f32[8,4]{1,0} get-tuple-element(%arg.2), index=0
  %collective-permute-start.1 = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]) collective-permute-start(%part.1), channel_id=1
  %given.1 = f32[8,4,1]{2,1,0} bitcast(%part.1)
  %kernel.1 = f32[8,2,4]{2,1,0} fusion(%part.1), kind=kLoop
  %convolution.1 = f32[4,4,2]{2,1,0} convolution(%given.1, %kernel.1), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=fb0_i0o->bf0
  %counter.2 = u32[] get-tuple-element(%arg.2), index=1
  %add.1 = u32[] add(%counter.2, %constant.2)
  ROOT %tuple.1 = (f32[8,4]{1,0}, u32[]) tuple(%part.1, %add.1)
}

ENTRY %main.1 (arg.3: (f32[8,4], u32[])) -> (f32[8,4], u32[]) {
  %arg.3 = (f32[8,4]{1,0}, u32[]) parameter(0)
  ROOT %while.1 = (f32[8,4]{1,0}, u32[]) while(%arg.3), condition=%condition.1, body=%windowed_dot_general_body.1
}
"""  # noqa: E501


def test_a_product_that_the_compiler_splits():
    assert pods.collectives(WINDOWS) == [Collective("collective-permute", 8 * 4 * 4, 4, False)]
    # [8, 4]^T [8, 2, 4]: of the window's two places one meets the padding.
    assert pods.again_in_windows(WINDOWS) == (4 - 1) * (2 * 4 * 4 * 8 * 2)


def test_large_models_have_shapes_and_no_arrays():
    method, streams = pods.setup("vit_b16_224", "saflex", chips=16)
    assert streams.candidates.inputs.shape == (16 * pods.LARGE["vit_b16_224"][1], 224, 224, 3)
    inputs = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    state = jax.eval_shape(method.init, jax.random.key(0), inputs)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    assert 86e6 < count < 87e6  # ViT-B/16
    kept = state.extra.rule.memory
    assert sum(x.size * x.dtype.itemsize for x in kept) <= 64 * len(kept.visits)
    assert pods.head_size(step_cost.MODELS["resnet18"]) == 5130
