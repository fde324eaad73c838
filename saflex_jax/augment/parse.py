"""Pipelines as text, for configs and command lines: "randaugment(2, 9) | cutmix(1.0)"."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable

from saflex_jax import checks
from saflex_jax.augment import base, captions, fields, mixing, policies, spatial, tabular, view
from saflex_jax.augment.base import Augment

# name in the text -> function that makes the augmentation; `register` adds one
FACTORIES: dict[str, Callable[..., Augment]] = {
    factory.__name__: factory
    for factory in (
        policies.randaugment, policies.trivialaugment, policies.autoaugment, policies.augmix,
        spatial.flip, spatial.shift, spatial.affine, spatial.resized_crop, spatial.cutout,
        spatial.random_erasing, spatial.blur, spatial.soft_crop,
        fields.random_field,
        mixing.mixup, mixing.cutmix, mixing.resizemix, mixing.fmix, mixing.gridmix,
        mixing.smoothmix, mixing.manifold_mixup,
        tabular.feature_noise, tabular.feature_mask, tabular.tabular_cutmix, tabular.smote,
        view.view,
        captions.wrong_captions, captions.swapped_classes,
        base.choice, base.on,
    )
}  # fmt: skip
MOST_VIEWS = 64  # each is an augmentation of the whole batch in the compiled step
RESERVED = ("identity", "views")  # names of the text that are no factories


def register(factory: Callable[..., Augment]) -> Callable[..., Augment]:
    """Decorator that registers your own augmentation with `parse` and with traces.

    >>> @register
    ... def dimmed(factor):
    ...     return base.per_example("dimmed", lambda key, x: (factor * x, factor))
    >>> augment = parse("flip | dimmed(0.5)")

    Configs find it once its module is imported. The result may be any augmentation, not only one by
    `per_example`.

    Args:
      factory: (options) -> Augment; its `__name__` is the name.

    Raises:
      ValueError: another function already has the name.
    """
    name = factory.__name__
    known = FACTORIES.get(name)
    origin = (factory.__module__, factory.__qualname__)
    if name in RESERVED or (known and (known.__module__, known.__qualname__) != origin):
        raise ValueError(f"factory must have a name of its own; {name!r} is taken")
    base.register_operation(name)
    FACTORIES[name] = factory
    return factory


def parse(text: str) -> Augment:
    """Reads a pipeline from text; reads only names and literals and evaluates nothing.

        pipeline = step | step | ...          one after the other (`chain`)
        step     = name(argument, ..., keyword=argument)
        argument = a literal, or a pipeline

    Empty parentheses may be left out. `choice(a, b, p=(.3, .7))` and `views(3, a)` (three draws of
    a) or `views(identity, a, a)` take pipelines. The empty text is the identity.

    >>> augment = parse("shift(4, padding='reflect') | flip | randaugment(2, 9)")
    >>> parse("shfit(4)")
    Traceback (most recent call last):
        ...
    ValueError: augment must be one of [...]; given 'shfit'; did you mean 'shift'?

    Args:
      text: for example "shift(4, padding='reflect') | flip | randaugment(2, 9)".

    Raises:
      ValueError: a syntax error, an unknown name, or an argument that the augmentation refuses.
    """
    if not text.strip():
        return base.identity
    try:
        return _pipeline(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(
            f"augment must read like 'randaugment(2, 9) | cutmix(1.0)'; given {text[:200]!r} "
            f"({error.msg} at column {error.offset})"
        ) from None
    except RecursionError:
        raise ValueError(
            f"augment must have fewer operations; given {text.count('|') + 1} in {text[:60]!r}..."
        ) from None


def _pipeline(node: ast.expr) -> Augment:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return base.chain(*(_pipeline(part) for part in _parts(node)))
    return _step(node)


def _parts(node: ast.expr) -> list[ast.expr]:
    """a | b | c as [a, b, c]: Python nests it to the left."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_parts(node.left), node.right]
    return [node]


def _step(node: ast.expr) -> Augment:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise ValueError(f"augment must be made of steps name(...); given {ast.unparse(node)!r}")
    name = call.func.id
    checks.choice({*FACTORIES, *RESERVED}, augment=name)
    arguments = [_argument(a) for a in call.args]
    keywords = {k.arg: _argument(k.value) for k in call.keywords}
    if len(keywords) < len(call.keywords):
        raise ValueError(f"{ast.unparse(node)!r} names an argument twice")
    if name == "identity":
        if arguments or keywords:
            raise ValueError(f"identity takes no arguments; given {ast.unparse(node)!r}")
        return base.identity
    if name == "views":
        return _views(node, arguments, keywords)
    if name == "choice" and not all(callable(a) for a in arguments):
        raise ValueError(
            f"choice must read choice(pipeline, pipeline, ..., p=(.5, .5)); "
            f"given {ast.unparse(node)!r}"
        )
    try:
        return FACTORIES[name](*arguments, **keywords)
    except TypeError as error:
        accepted = inspect.signature(FACTORIES[name])
        raise ValueError(
            f"{ast.unparse(node)!r}: {error}; accepted: {name}{_shown(accepted)}"
        ) from None


def _views(node: ast.expr, arguments: list, keywords: dict) -> Augment:
    counted = len(arguments) == 2 and isinstance(arguments[0], int)
    if keywords or not all(callable(a) for a in arguments[counted:]):
        raise ValueError(
            f"views must read views(3, pipeline) or views(pipeline, pipeline, ...); "
            f"given {ast.unparse(node)!r}"
        )
    if counted:
        checks.within(1, MOST_VIEWS, views=arguments[0])
    return base.views(*([arguments[1]] * arguments[0] if counted else arguments))


def _argument(node: ast.expr):
    if isinstance(node, ast.Name) and node.id in ("nan", "inf"):  # numbers, but no literals
        return float(node.id)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # TypeError: unhashable entries of a dict or a set
        return _pipeline(node)


def _shown(signature: inspect.Signature) -> str:
    """(n=2, m=9, ...), without annotations."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))
