"""A table of candidates as one page of HTML that needs no network; `audit.html.j2` is its form.

Every text is escaped by Jinja, and the page's policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import tables
from saflex_jax._compat import optional
from saflex_jax.core import pooled

TEMPLATE = pathlib.Path(__file__).with_name("audit.html.j2")
SHOWN = 120  # cards of the most harmful, and of the surest relabelled candidates
GROUPS = 60  # rows of a chart: the lowest; the rest is counted
THRESHOLDS = 101
PIXELS = 96  # of a thumbnail, at most
# columns that a card shows
TOLD = (
    "file",
    "data_row",
    "source",
    "draw",
    "operations",
    "prompt",
    "strength",
    "generator",
    "flags",
    "judged",
)
LABELS = 30  # classes up to which the matrix is shown whole


def page(
    table: tables.Table,
    *,
    title: str,
    class_names: Sequence[str],
    transition: np.ndarray | None = None,
    images: Mapping[int, np.ndarray] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page of a table.

    Args:
      table: with "row", "given", "learned", "probability", "utility"; "bad" bool, where it is
        known, for precision and recall; and whatever else there is to group by or to show.
      title: of the page.
      class_names: K.
      transition: f[K, K], C_kj; None = it is not shown.
      images: row -> f[H, W, C] in [0, 1] or uint8, of the rows of `gallery`.
      notes: what is to be known before the numbers are.

    Raises:
      ImportError: Jinja is not installed.
    """
    with optional("jinja2", extra="experiments"):
        import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = TEMPLATE.read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    first = first_draws(table)
    return environment.from_string(text).render(
        title=title,
        digest=digest,
        notes=notes,
        number=len(first),
        relabelled=int((table["learned"] != table["given"])[first].sum()),
        charts=[_chart(table, *found) for found in groups(table, class_names)],
        thresholds=_thresholds(table),
        known="bad" in table,
        matrix=_matrix(transition, class_names),
        cards=[
            _card({**table, "utility": standing(table)}, place, why, class_names, images or {})
            for place, why in gallery(table)
        ],
    )


def standing(table: tables.Table) -> np.ndarray:
    """What samples are sorted and dropped by: 2 P(the given label is right) - 1, else utility.

    The first is what a run's rule learned over all visits. A utility is one look, which says more
    of a group than of a sample.
    """
    return 2 * table["right"] - 1 if has_posterior(table) else table["utility"]


def has_posterior(table: tables.Table) -> bool:
    """Whether a run's rule learned how likely the given labels are right, and doubts any."""
    return "right" in table and bool((table["right"] < 1).any())


def first_draws(table: tables.Table) -> np.ndarray:
    """Places of the first draw of each row: several draws of a sample are one sample."""
    return np.sort(np.unique(table["row"], return_index=True)[1])


# --- groups --------------------------------------------------------------------------------------


def groups(table: tables.Table, class_names: Sequence[str]):
    """(title, names [M], members bool[N] each) of everything that the table can be grouped by."""
    found = [("By class, as given", dict(enumerate(class_names)), table["given"])]
    if "operations" in table and (table["operations"] != "").any():
        yield "By operation and magnitude", *_by_operation(table["operations"])
    for name, title in (("generator", "By generator"), ("group", "By group")):
        if name in table:
            found.append((title, None, table[name]))
    if "prompt" in table:
        found.append(("By prompt and strength", None, _joined(table, "prompt", "strength")))
    if "flags" in table:
        flags = np.where(table["flags"] == "", "none", table["flags"])
        found.append(("By flag of a filter", None, flags))
    for title, names, values in found:
        keys = [key for key in np.unique(values) if key != ""]
        if len(keys) > 1:
            yield (
                title,
                [names[key] if names else str(key) for key in keys],
                [values == key for key in keys],
            )


def _joined(table: tables.Table, name: str, other: str) -> np.ndarray:
    if other not in table:
        return table[name]
    return np.array([f"{a} @ {b:.2g}" if a else "" for a, b in zip(table[name], table[other])])


def _by_operation(texts: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    """Operations in four parts of their magnitudes."""
    met: dict[str, list[tuple[int, float]]] = {}
    for row, text in enumerate(texts.tolist()):
        for part in filter(None, text.split(" | ")):
            name, magnitude = part.rsplit(" ", 1)
            met.setdefault(name, []).append((row, float(magnitude)))
    names, members = [], []
    for name, pairs in sorted(met.items()):
        rows, magnitudes = map(np.array, zip(*pairs))
        edges = pooled.quantile_edges(np.zeros(len(rows), int), magnitudes, 1)[0]
        part = np.searchsorted(edges[np.isfinite(edges)], magnitudes)
        for number in np.unique(part):
            own = magnitudes[part == number]
            span = f"{own.min():.3g}" + (f" to {own.max():.3g}" if np.ptp(own) else "")
            names.append(f"{name} {span}")
            members.append(np.isin(np.arange(len(texts)), rows[part == number]))
    return names, members


def _chart(table: tables.Table, title: str, names: list[str], members: list[np.ndarray]) -> dict:
    """Mean utility of each group with its interval, the lowest first, as shares of one axis.

    What a group has of a sample's draws counts once, as their mean: draws are not independent.
    """
    rows = []
    for name, member in zip(names, members):
        u = _by_row(table["utility"][member], table["row"][member])
        error = 1.96 * u.std(ddof=1) / np.sqrt(len(u)) if len(u) > 1 else np.inf
        rows.append({"name": name, "count": len(u), "mean": float(u.mean()), "error": float(error)})
    rows.sort(key=lambda row: row["mean"])
    shown = rows[:GROUPS]
    ends = [row["mean"] + sign * min(row["error"], 1.0) for row in shown for sign in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    wide = (high - low) or 1.0

    def place(value):
        return round(100 * (min(max(value, low), high) - low) / wide, 2)

    for row in shown:
        row |= {"at": place(row["mean"]), "from": place(row["mean"] - row["error"]),
                "to": place(row["mean"] + row["error"]),
                "sign": "low" if row["mean"] + row["error"] < 0 else
                        "high" if row["mean"] - row["error"] > 0 else "none"}  # fmt: skip
    return {"title": title, "rows": shown, "zero": place(0.0), "more": len(rows) - len(shown)}


def _by_row(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The mean value of each row that is there."""
    _, places, counts = np.unique(rows, return_inverse=True, return_counts=True)
    return np.bincount(places, values) / counts


def _thresholds(table: tables.Table) -> list[dict]:
    """At each threshold what is dropped of the first draws, and how much of it is bad."""
    first = first_draws(table)
    table = {name: values[first] for name, values in table.items()}
    utility = standing(table)
    low, high = np.quantile(utility, [0.0, 0.95])
    bad, trusted = table.get("bad"), table.get("trusted", np.zeros(len(utility), bool))
    rows = []
    for value in np.unique(np.append(np.linspace(low, high, THRESHOLDS), 0.0)):
        dropped = (utility < value) & ~trusted
        row = {"at": float(value), "dropped": int(dropped.sum())}
        if bad is not None:
            row["precision"] = float(bad[dropped].mean()) if dropped.any() else None
            row["recall"] = float(dropped[bad].mean()) if bad.any() else None
        rows.append(row)
    return rows


def _matrix(transition: np.ndarray | None, names: Sequence[str]) -> dict | None:
    """The whole matrix of few classes, else the largest entries off its diagonal."""
    if transition is None:
        return None
    pairs = transition * (1 - np.eye(len(transition)))
    order = np.argsort(-pairs, axis=None)[:LABELS]
    places = zip(*np.unravel_index(order, pairs.shape))
    largest = [(names[k], names[j], float(pairs[k, j])) for k, j in places if pairs[k, j] >= 0.005]
    whole = transition.tolist() if len(transition) <= LABELS else None
    return {"names": list(names), "whole": whole, "largest": largest}


# --- gallery -------------------------------------------------------------------------------------


def gallery(table: tables.Table) -> list[tuple[int, str]]:
    """(place in the table, why) of the cards: the most harmful, then the surest relabelled.

    A card is the first draw of a sample.
    """
    first = first_draws(table)
    harmful = first[np.argsort(standing(table)[first], kind="stable")[:SHOWN]]
    changed = first[(table["learned"] != table["given"])[first]]
    changed = changed[np.argsort(-table["probability"][changed], kind="stable")]
    changed = changed[~np.isin(changed, harmful)][:SHOWN]
    return [(int(i), "harmful") for i in harmful] + [(int(i), "relabelled") for i in changed]


def _card(table, place: int, why: str, names: Sequence[str], images) -> dict:
    row = int(table["row"][place])
    told = {}
    for name in TOLD:
        if name in table and str(table[name][place]) not in ("", "nan", "-1"):
            value = table[name][place]
            told[name] = f"{value:.3g}" if isinstance(value, np.floating) else str(value)
    return {
        "row": row,
        "why": why,
        "given": names[table["given"][place]],
        "learned": names[table["learned"][place]],
        "probability": float(table["probability"][place]),
        "weight": float(table["weight"][place]) if "weight" in table else None,
        "utility": float(table["utility"][place]),
        "bad": bool(table["bad"][place]) if "bad" in table else None,
        "image": _thumbnail(images[place]) if place in images else None,
        "told": told,
    }


def _thumbnail(image: np.ndarray) -> str:
    """A data URI of an image."""
    with optional("Pillow"):
        from PIL import Image

    if image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    drawn = Image.fromarray(np.squeeze(image))
    drawn.thumbnail((PIXELS, PIXELS))
    packed = io.BytesIO()
    drawn.save(packed, "PNG")
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
