"""What a person reads when the configuration is wrong: what was given, what is allowed, what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from pydantic import ValidationError


def closest(name: str, known: Iterable[str]) -> str:
    """The question whether a known name was meant, in brackets, for one that is nearly it; else nothing."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def unknown_key(name: str, known: Sequence[str]) -> str:
    """Names the closest of the known dotted keys, and lists those of the same section."""
    section, _, last = name.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    top = list(dict.fromkeys(key.partition(".")[0] for key in known))
    by_last = {key.rpartition(".")[2]: key for key in known}
    match = (
        difflib.get_close_matches(name, known if section else [*known, *top], n=1, cutoff=0.8)
        or [f"{section}.{key}" for key in siblings if section and _abbreviates(key, last)]  # lr: learning_rate
        or [by_last[part] for part in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]  # in another section
    )
    hint = f"; did you mean {match[0]}?" if match else ""
    where, options = (f"[{section}] has", siblings) if section and siblings else ("the top level has", top)
    return f"unknown key {name}{hint} ({where} {', '.join(options)})"


def explain(error: ValidationError, known: Sequence[str], prefix: str = "") -> str:
    """Pydantic's findings as one or two lines: the key, what was given, what is allowed.

    Args:
        error: from validating a configuration or the arguments of a table's entry.
        known: the dotted keys there are.
        prefix: of the section, with its dot, where the keys are relative to one.
    """
    parts = {part for key in known for part in key.split(".")}
    lines: dict[str, str] = {}  # one line a key: a union reports every branch
    for finding in error.errors(include_url=False):
        place = [str(part) for part in finding["loc"]]
        if finding["type"] != "extra_forbidden":  # the last parts of a union's place name its branch, not a key
            place = [part for part in place if part in parts] or place[:1]
        name = prefix + ".".join(place)
        if finding["type"] == "extra_forbidden":
            lines[name] = unknown_key(name, known)
        elif finding["type"] == "missing":
            lines[name] = f"{name} is missing"
        elif finding["type"] == "value_error" and isinstance(finding["input"], dict):  # about a whole section
            lines[name] = f"{name}.{finding['ctx']['error']}"
        elif finding["type"] in ("model_type", "model_attributes_type"):
            example = next((key for key in known if key.startswith(f"{name}.")), "name")
            lines[name] = f"{name} = {finding['input']!r}: is a section with keys of its own, such as {example}"
        else:
            reason = finding["msg"].removeprefix("Value error, ").removeprefix("Input ")
            if finding["type"] == "bool_type":
                reason = "should be true or false"  # as TOML has them: False is a word there
            given = f"{name} = {finding['input']!r}: "
            lines[name] = f"{lines[name]}, or {reason}" if name in lines else given + reason
    return "\n".join(list(lines.values())[:2])


def _abbreviates(short: str, long: str) -> bool:
    letters = iter(long)
    return short[:1] == long[:1] and all(letter in letters for letter in short)
