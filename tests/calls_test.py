"""Options that are calls as text."""

import pytest

from saflex_jax import calls

ACCEPTED = {"pair": complex, "none": object}


def test_a_call_is_read():
    assert calls.parse(ACCEPTED, value="pair") == 0
    assert calls.parse(ACCEPTED, value="pair(1, imag=-2.5)") == 1 - 2.5j


@pytest.mark.parametrize("text", ["", "pair(", "pair + 1", "pair(x)", "pair(*[1])", "a.b(1)", 3])
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match=r"value must be NAME or NAME\(options\); given"):
        calls.parse(ACCEPTED, value=text)


def test_an_unknown_name_or_argument_is_refused():
    with pytest.raises(ValueError, match=r"value must be one of .* did you mean 'pair'"):
        calls.parse(ACCEPTED, value="pear")
    with pytest.raises(ValueError, match=r"value 'pair\(real_=1\)': .*real_"):
        calls.parse(ACCEPTED, value="pair(real_=1)")
