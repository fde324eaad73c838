"""Captions of classes: what a text tower is given, and what is refused."""

import numpy as np
import pytest

from saflex_jax.data.captions import PHOTO, caption_table, filled


def numbers(texts):
    return np.array([[float(len(text))] for text in texts])


def test_each_class_has_all_of_its_captions_about_as_often():
    table = caption_table([["a", "bb", "ccc"], ["dddd", "eeeee"], ["f"]], numbers)[..., 0]
    assert table.tolist() == [[1, 2, 3], [4, 5, 4], [1, 1, 1]]


def test_names_stand_in_every_template():
    captions = filled(["cat", "sea lion"], PHOTO)
    assert [len(own) for own in captions] == [len(PHOTO)] * 2
    assert all("sea lion" in text and "{" not in text for text in captions[1])


@pytest.mark.parametrize(
    "match, call",
    [
        ("templates must hold one text", lambda: filled(["cat"], [])),
        ("templates must hold '{}'.*given 'a photo'", lambda: filled(["cat"], ["a photo"])),
        ("class 1 is ' '", lambda: filled(["cat", " "], PHOTO)),
        ("one class at least", lambda: caption_table([], numbers)),
        (r"class 1 has \[\]", lambda: caption_table([["a"], []], numbers)),
        ("class 0 has 'cat'", lambda: caption_table(["cat"], numbers)),
        ("must hold a word; class 1 has ''", lambda: caption_table([["a"], ["b", ""]], numbers)),
        ("2 rows, one a caption; given 1", lambda: caption_table([["a"], ["b"]], lambda t: [[1]])),
        ("finite", lambda: caption_table([["a"]], lambda texts: np.full((1, 2), np.nan))),
    ],
)
def test_refuses_what_is_no_caption(match, call):
    with pytest.raises(ValueError, match=match):
        call()
