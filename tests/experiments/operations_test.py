"""The parts of `experiments.operations` and `experiments.population` to be checked by hand."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import json_lines, operations, pool_figure, pool_files, population
from experiments.generating import as_png
from saflex_jax import data


@pytest.mark.parametrize(
    "strength, probability", [(0.0, 1.0), (6.0, 0.5), (20.0, 1.0), (13.0, 0.3)]
)
def test_shares_of_strengths_have_the_mean_asked_for(strength, probability):
    found = np.asarray(population.shares(jnp.float32(strength), jnp.float32(probability)))
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(found @ population.STRENGTHS, probability * strength, atol=1e-5)


def test_every_view_has_the_strength_that_it_was_made_with():
    assert population.group_of_views().tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]


def test_settings_that_are_alike_are_mixed_and_worse_ones_left_out():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(population.SETTINGS), 300))
    noise -= noise.mean(1, keepdims=True)
    losses = 1.5 + rng.normal(size=300) + 0.1 * noise  # samples differ by more than settings
    first, second = (population.SETTINGS.index(s) for s in ((4.0, 0.5), (12.0, 1.0)))
    losses[[first, second]] -= 0.5
    np.testing.assert_allclose(population.mixed(losses), [0.25, 0.25, 0, 0.5, 0, 0], atol=1e-6)
    losses[second] += 0.05  # more than chance
    np.testing.assert_allclose(population.mixed(losses), [0.5, 0.5, 0, 0, 0, 0], atol=1e-6)


def test_pipelines_are_distributions_and_leave_out_what_they_say():
    by_name = {m.name: m for m in operations.members()}
    for member in by_name.values():
        np.testing.assert_allclose(member.start.sum(), 1, rtol=1e-6)
    for place, name in enumerate(operations.NAMES):
        assert by_name[f"without {name}"].start[place] == 0 < by_name["all"].start[place]
    for name in operations.DESTROYING:
        start = by_name[f"{name}, adjusted"].start
        assert start[operations.NAMES.index(name)] == pytest.approx(operations.SHARE)


def test_effects_pair_utility_with_what_an_operation_adds():
    names = operations.NAMES
    utility = [[0.1 * k, -0.1 * k] for k in range(len(names))]
    runs = [{"member": "all", "accuracy": 0.8, "by_class": [0.5], "utility": utility,
             "error": utility}]  # fmt: skip
    runs += [{"member": f"without {name}", "accuracy": 0.8 - 0.01 * k, "by_class": [0.5 + 0.01 * k]}
             for k, name in enumerate(names)]  # fmt: skip
    runs = [r | {"rule": "as_given"} for r in runs]
    pooled, adds = operations.effects(runs)
    np.testing.assert_allclose(pooled, 0.1 * np.arange(len(names)))
    np.testing.assert_allclose(adds, 0.01 * np.arange(len(names)), atol=1e-12)
    pooled, adds = operations.effects(runs, place=0)
    np.testing.assert_allclose(pooled, -0.1 * np.arange(len(names)))
    np.testing.assert_allclose(adds, -0.01 * np.arange(len(names)), atol=1e-12)


def test_views_of_other_strengths_or_images_are_computed_anew(tmp_path, monkeypatch):
    size = 2 * population.PER_CLASS
    source = data.Source(np.eye(2)[np.arange(size) % 2], np.arange(size) % 2, 2)
    prints = data.fingerprints(np.arange(size)[:, None], chunk=size)
    options = {"backbone": "resnet18", "weights": "1"}
    found = data.Features(
        source._replace(views=source.inputs[:, None]), np.arange(size), prints, None, (), options
    )
    made = []
    monkeypatch.setattr(population, "feature_set", lambda *_: found)
    monkeypatch.setattr(population, "file_digest", lambda _: "1")
    monkeypatch.setattr(population, "_views", lambda *_: made.append(1) or found.source.views)

    def computed():
        population.make_few("mnist", "data", 0, tmp_path)
        return len(made)

    assert computed() == computed() == 1
    monkeypatch.setattr(population, "STRENGTHS", (0.0, 2.0))
    assert computed() == 2
    found = found._replace(prints=prints[::-1])
    assert computed() == 3


def test_a_figure_takes_any_prompt(tmp_path, monkeypatch):
    folder, prompts = tmp_path / "pool", ('<b>$x_{</b>\n"quoted"', "plain " * 20)
    rows = [{"file_name": f"{n}/{d}.png", "source": n, "label": n % 2, "prompt": prompts[d],
             "strength": 0.5} for n in range(3) for d in range(2)]  # fmt: skip
    about = {"shape": [8, 8, 1], "class_names": ["no", "yes"],
             "data": {"name": "digits", "dir": "data", "size": 0, "task": ""}}  # fmt: skip
    pool_files.write_plan(folder, about, rows)
    log = folder / "shards" / "0-of-1.jsonl"
    for row in rows:
        (folder / str(row["source"])).mkdir(exist_ok=True)
        pool_files.write_bytes(folder / row["file_name"], as_png(np.zeros((8, 8, 1), np.uint8)))
        json_lines.append(log, row)
    pool_files.join(folder)
    flagged = [{"file_name": "0/1.png", "score": 0.0, "flagged": True}]
    pool_files.write_flags(folder, "x", flagged)
    assert json.loads((folder / "metadata.jsonl").read_text().splitlines()[1])["flags"] == ["x"]
    figure = pool_figure.draw(folder)
    figure.savefig(tmp_path / "x.png")
    assert len(figure.axes) == 2 * 3  # two classes, the source and two prompts


def test_no_seeds_are_refused(capsys):
    with pytest.raises(SystemExit):
        operations.main(["--seeds=0"])
    assert "--seeds must be >= 1 and --first_seed >= 0; given 0 and 0" in capsys.readouterr().err
