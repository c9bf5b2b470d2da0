"""What parts that came from Python are called in run.json: by that they are told apart, as their code is not kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import numpy as np

from fedsim.strategies import Strategy

_DEPTH = 3
"""Of parts that were made with parts."""
_MAX_CHARACTERS = 200
"""Of the values in a name; more become a hash."""
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,23}|")
"""Strings that are written as they are; others, such as paths and access keys, are nobody's business: a hash."""


def called(part: Any) -> str:
    """The name of a part, and the plain values that it was made with: arguments, defaults, attributes.

    Example:
        >>> def halfway(share):
        ...     return Strategy(lambda weights: {}, lambda state, weights, updates, n: (weights * share, state))
        >>> called(halfway(0.5)).rpartition(".own.")[2]
        'halfway(share=0.5)'
    """
    return _called(part, _DEPTH)


def _called(part: Any, depth: int) -> str:
    if isinstance(part, Strategy):  # after the function that makes it: `Strategy` says nothing
        name, bracket, values = _called(part.aggregate, depth).partition("(")
        return (name.rpartition(".<locals>.")[0] or name) + bracket + values
    named = part.func if isinstance(part, functools.partial) else part
    kind = named if hasattr(named, "__qualname__") else type(named)
    texts = {name: _text(value, depth - 1) for name, value in _made_with(part)}
    values = ", ".join(f"{name}={text}" for name, text in texts.items() if text)
    if len(values) > _MAX_CHARACTERS:
        values = _hash(values)
    return f"{kind.__module__}.{kind.__qualname__}" + (f"({values})" if values else "")


def _made_with(part: Any) -> Iterator[tuple[str, Any]]:
    """What tells a part from others of its name."""
    if isinstance(part, functools.partial):
        yield from _made_with(part.func)
        yield from ((f"{place}", value) for place, value in enumerate(part.args))
        yield from part.keywords.items()
    elif isinstance(part, MethodType):
        yield from _attributes(part.__self__)
    elif isinstance(part, FunctionType):
        for name, cell in zip(part.__code__.co_freevars, part.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # it has no value yet
                yield name, cell.cell_contents
        names = part.__code__.co_varnames[: part.__code__.co_argcount]
        defaults = part.__defaults__ or ()
        yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
        yield from (part.__kwdefaults__ or {}).items()
    elif callable(part) and not isinstance(part, type):
        yield from _attributes(part)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in getattr(thing, "__dict__", {}).items() if not name.startswith("_"))


def _text(value: Any, depth: int) -> str:
    """A value as text that is the same in every process; "" for one that has none: a tensor, or a list, often a log."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str) and not _WORD.fullmatch(value):
        return _hash(value)
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if depth <= 0:
        return ""
    if isinstance(value, tuple):
        return f"({', '.join(_text(item, depth - 1) for item in value)})"
    return _called(value, depth) if callable(value) or isinstance(value, Strategy) else ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
