"""Options that are calls as text, for configs and command lines: "cg(20, damping=0.03)"."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from saflex_jax import checks


def parse(accepted: Mapping[str, Callable], /, **option: str) -> Any:
    """The result of the call in one option's text; reads only names and literals.

    >>> parse({"pair": complex}, value="pair(1, imag=2)")
    (1+2j)

    Args:
      accepted: name -> function.
      **option: one keyword: a name of `accepted`, with or without arguments in parentheses.

    Raises:
      ValueError: another form, or an unknown name (suggests the nearest) or argument.
    """
    ((option_name, text),) = option.items()
    try:
        call: Any = ast.parse(text, mode="eval").body
        name = getattr(call, "func", call).id
        arguments = [ast.literal_eval(a) for a in getattr(call, "args", ())]
        keywords = {k.arg: ast.literal_eval(k.value) for k in getattr(call, "keywords", ())}
    except (AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{option_name} must be NAME or NAME(options); given {text!r}") from error
    checks.choice(accepted, **{option_name: name})
    try:
        return accepted[name](*arguments, **keywords)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option_name} {text!r}: {error}") from error
