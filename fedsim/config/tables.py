"""Tables of extensions: finding an entry by its name, and checking what a configuration gives to it.

An entry is a function; its keyword-only parameters are its configuration. So an extension documents and validates
itself, and being listed in its table is all that it needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError, create_model

from fedsim.config import messages
from fedsim.errors import ConfigError

T = TypeVar("T")

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def lookup(table: Mapping[str, T], name: str, key: str) -> T:
    """The entry `name` of a table of extensions; `key` is the configuration key that named it.

    Raises:
        ConfigError: no such entry; the message lists the table and the closest name.
    """
    if name in table:
        return table[name]
    raise ConfigError(f"{key} = {name!r} is not known; choose from {', '.join(table)}{messages.closest(name, table)}")


def arguments(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    key: str,
    table: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Checks what a section gives against a function's keyword-only parameters, and fills in their defaults.

    Types and ranges come from the function's own annotations, e.g. `alpha: Annotated[float, Field(gt=0)] = 0.5`.

    Args:
        function: an entry of a table.
        given: argument name -> value.
        key: the configuration's section, for the message.
        table: where the function is from: the message names the entries that take what this one does not.

    Raises:
        ConfigError: an argument the function does not have, a wrong type, or a value out of range.
    """
    parameters = _parameters(function)
    for name in given:
        if name not in parameters:
            known = ", ".join(f"{n} = {p.default!r}" for n, p in parameters.items()) or "none"
            takers = [other for other, entry in table.items() if name in _parameters(entry)]
            hint = f"; {', '.join(takers)} {'takes' if len(takers) == 1 else 'take'} {name}" if takers else ""
            hint = hint or messages.closest(name, parameters)
            raise ConfigError(f"{key}.{name} is not known; {function.__name__} takes: {known}{hint}")
    untyped = [name for name, p in parameters.items() if p.annotation is p.empty]
    if untyped:
        raise TypeError(f"{function.__name__}: its keyword-only parameters need type annotations: {', '.join(untyped)}")
    fields: dict[str, Any] = {
        name: (p.annotation, ... if p.default is p.empty else p.default) for name, p in parameters.items()
    }
    model = create_model(function.__name__, __config__=STRICT, **fields)
    try:
        return {name: getattr(model.model_validate(dict(given)), name) for name in parameters}
    except ValidationError as error:
        raise ConfigError(messages.explain(error, list(parameters), prefix=f"{key}.")) from None


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only ones: an entry's configuration."""
    signature = inspect.signature(function, eval_str=True)
    return {name: p for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
