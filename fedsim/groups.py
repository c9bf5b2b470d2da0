"""Which runs are of one kind and differ in their seed, and which of them are the same run again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fedsim.config import Config
from fedsim.config.changes import computed, text

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
    found: dict[str, list[list[R]]] = {}
    for run, one in zip(runs, keys, strict=True):
        label = (
            ", ".join(f"{key}={text(value)}" for key, value in one.items() if len(values[key]) > 1) or run.config.name
        )
        alike = found.setdefault(label, [])
        its_own = [members for members in alike if all(_may_be_again(run, other) for other in members)]
        if its_own:
            min(its_own, key=lambda members: _parts(members[0]) != _parts(run)).append(run)
        else:
            alike.append([run])
    return {
        f"{label} ({place}: {members[0].name})" if len(alike) > 1 else label: members
        for label, alike in found.items()
        for place, members in enumerate(alike, start=1)
    }


def _may_be_again(run: Read, other: Read) -> bool:
    """Whether two runs of one configuration are of other seeds, or the same one as far as both go."""
    if run.config.seed != other.config.seed:
        return True
    one, two = (each.rounds.set_index("round")["weights_sha256"] for each in (run, other))
    both = one.index.intersection(two.index)
    return both.empty or bool(one[both.max()] == two[both.max()])


def _parts(run: Read) -> tuple[Any, Any]:
    """What tells parts of one name apart, if anything does before they are used."""
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
