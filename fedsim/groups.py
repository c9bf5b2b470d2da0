"""Which runs are of one kind and differ in their seed, and which of them are the same run again."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fedsim.config import Config
from fedsim.config.changes import computed, text
from fedsim.errors import FedsimWarning

if TYPE_CHECKING:
    import pandas as pd


class Read(Protocol):
    """What is asked of a run here; `results.Run` is one."""

    @property
    def name(self) -> str:
        """The run's name."""
        ...

    @property
    def config(self) -> Config:
        """Its whole resolved configuration."""
        ...

    @property
    def status(self) -> str:
        """running, finished, failed or interrupted."""
        ...

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says."""
        ...

    @property
    def rounds(self) -> pd.DataFrame:
        """One row a round."""
        ...


R = TypeVar("R", bound=Read)


def groups(runs: Sequence[R]) -> dict[str, list[R]]:
    """Runs that differ in their seed at most, named after the keys in which the groups differ.

    Neither the run's name nor where and how carefully it was computed makes a difference; own parts do, by their names.
    Where two runs of one seed have other weights all the same, as after an edit of a model or the loss of a client,
    they are of two groups, numbered and named after their first runs.
    """
    keys = [_what_is_computed(run) for run in runs]
    values: dict[str, set[str]] = {key: set() for one in keys for key in one}
    for one in keys:
        for key, seen in values.items():
            seen.add(repr(one.get(key)))
    found: dict[str, list[R]] = {}
    for run, one in zip(runs, keys, strict=True):
        label = (
            ", ".join(f"{key}={text(value)}" for key, value in one.items() if len(values[key]) > 1) or run.config.name
        )
        found.setdefault(label, []).append(run)
    return {
        f"{label} ({place}: {members[0].name})" if len(alike) > 1 else label: members
        for label, of_label in found.items()
        for alike in [_told_apart(of_label)]
        for place, members in enumerate(alike, start=1)
    }


def _told_apart(runs: Sequence[R]) -> list[list[R]]:
    """Runs of one configuration, in which no seed has two that are not the same run as far as both go.

    Those of equal data and equally large models stay together, and all do where nothing speaks against it: a data set
    may be another for each seed.
    """
    times = Counter(run.config.seed for run in runs)
    if max(times.values()) == 1:
        return [list(runs)]
    hashes = {id(run): _hashes(run) for run in runs if times[run.config.seed] > 1}
    by_parts: dict[Hashable, list[R]] = {}
    for run in runs:
        by_parts.setdefault(_parts(run), []).append(run)
    sets: list[list[R]] = []
    for same in by_parts.values():
        first = len(sets)
        for run in same:
            _join(sets, [run], hashes, first)
    merged: list[list[R]] = []
    for members in sets:
        _join(merged, members, hashes)
    return [[run for run in runs if any(run is member for member in members)] for members in merged]


def _join(sets: list[list[R]], more: list[R], hashes: Mapping[int, Mapping[int, str]], first: int = 0) -> None:
    """Adds runs to the first set, of those from `first` on, with which they go together; else they are one more."""
    for members in sets[first:]:
        if all(_go_together(run, other, hashes) for run in more for other in members):
            members += more
            return
    sets.append(list(more))


def _go_together(run: Read, other: Read, hashes: Mapping[int, Mapping[int, str]]) -> bool:
    """Whether two runs are of two seeds, or equal in the last round that both have."""
    if run.config.seed != other.config.seed:
        return True
    one, two = hashes[id(run)], hashes[id(other)]
    last = max(one.keys() & two.keys(), default=None)
    return last is None or one[last] == two[last]


def _hashes(run: Read) -> dict[int, str]:
    """Of the weights after each round that can be read; what cannot is said where the rows are shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FedsimWarning)
        rounds = run.rounds
    return dict(zip(rounds["round"], rounds["weights_sha256"], strict=True))


def _parts(run: Read) -> Hashable:
    """What tells parts of one name apart before they are used."""
    return run.info.get("data", {}).get("sha256"), run.info.get("model", {}).get("num_values")


def one_a_seed(runs: Sequence[R]) -> list[R]:
    """Of runs of one group, those that count: one a seed, the longest; the others are the same run again.

    Of equally long ones it is one that has the clients' own accuracies, then the first.
    """
    ranks = [(rounds_done(run.rounds), run.config.evaluation.clients) for run in runs]
    return [runs[place] for place in counted_of([run.config.seed for run in runs], ranks)]


def _what_is_computed(run: Read) -> dict[str, Any]:
    ignored = ("seed", "evaluation.clients")  # the second adds columns and changes none
    values = {key: value for key, value in computed(run.config).items() if key not in ignored}
    return values | {f"own {part}": name for part, name in run.info.get("own", {}).items()}


def rounds_done(rounds: pd.DataFrame) -> int:
    """Of these rows, without that of round 0."""
    return max(0, len(rounds) - 1)


def counted_of(keys: Sequence[Hashable], ranks: Sequence[tuple[int, bool]]) -> list[int]:
    """The places of the highest rank of each key, in their order; of equal ones the first."""
    highest: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        if key not in highest or ranks[place] > ranks[highest[key]]:
            highest[key] = place
    return sorted(highest.values())
