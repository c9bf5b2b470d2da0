"""Reading many runs at once: their records as one frame each, and what they came to."""

from __future__ import annotations

import glob
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, overload

from fedsim import summaries
from fedsim.config.changes import flat
from fedsim.errors import FedsimWarning, InputError, NewerVersionError, RunFolderError, counted
from fedsim.results import parts
from fedsim.results.run import Run, load_run
from fedsim.run_folder import as_text, find_runs, is_run
from fedsim.targets import targets

if TYPE_CHECKING:
    import pandas as pd


Given = Run | str | os.PathLike[str]
"""A run, its folder, or a pattern such as "results/*" for several."""
SHOWN = 5
"""Names in the `repr` of runs."""


class Runs(tuple[Run, ...]):
    """Several runs; in all frames the column `run` tells them apart, see `names`. A slice of them is `Runs` again."""

    @overload
    def __getitem__(self, place: SupportsIndex) -> Run: ...
    @overload
    def __getitem__(self, place: slice) -> Runs: ...
    def __getitem__(self, place: SupportsIndex | slice) -> Run | Runs:
        """A run, or some."""
        return Runs(super().__getitem__(place)) if isinstance(place, slice) else super().__getitem__(place)

    def __repr__(self) -> str:
        """A line for a notebook: how many, and the first of their names."""
        names = [run.name for run in self[:SHOWN]] + ["..."] * (len(self) > SHOWN)
        return f"<{counted(len(self), 'run')}{': ' if names else ''}{', '.join(names)}>"

    @property
    def rounds(self) -> pd.DataFrame:
        """As `Run.rounds`, of all runs; one without part files is left out, with a `FedsimWarning`."""
        return self._frame("rounds")

    @property
    def clients(self) -> pd.DataFrame:
        """As `Run.clients`, of all runs, likewise."""
        return self._frame("clients")

    @property
    def configs(self) -> pd.DataFrame:
        """One row a run, index `run`: every key of its configuration, dotted."""
        import pandas as pd

        rows = [{"run": label, **dict(flat(run.config.to_dict()))} for label, run in self._labelled()]
        return pd.DataFrame(rows).set_index("run")

    def summary(self, target: Mapping[str, float] | None = None) -> pd.DataFrame:
        """One row a run: what it came to, see `summaries.summary`.

        Args:
            target: one column and its value, such as {"test_accuracy": 0.97}: adds what it took to get there.

        Raises:
            InputError: it is not one target.
        """
        goals = targets(target or {})
        if len(goals) > 1:
            raise InputError(f"give one target, not {len(goals)}: {', '.join(map(str, goals))}")
        frame = summaries.summary(self, goals[0] if goals else None)
        frame["run"] = [label for label, _ in self._labelled()]
        return frame

    def over_seeds(self, target: Mapping[str, float] | None = None) -> pd.DataFrame:
        """One row a group of seeds and a measure: mean and confidence interval, see `summaries.over_seeds`."""
        return summaries.over_seeds(self.summary(target))

    def paired(self, target: Mapping[str, float] | None = None) -> pd.DataFrame:
        """Differences to the first group, seed by seed, see `summaries.paired`."""
        return summaries.paired(self.summary(target))

    def _labelled(self) -> list[tuple[str, Run]]:
        if not self:
            raise InputError("there are no runs to read: these Runs are empty")
        return list(zip(names(self), self, strict=True))

    def _frame(self, kind: Literal["rounds", "clients"]) -> pd.DataFrame:
        import pandas as pd

        frames, damage = [], []
        for label, run in self._labelled():
            try:
                frames.append(run._frame(kind).assign(run=label))
            except NewerVersionError:
                raise
            except RunFolderError as error:
                damage.append(error)
        warn_of(damage, frames)
        return pd.concat(frames, ignore_index=True)


def load_runs(paths: Given | Iterable[Given]) -> Runs:
    """Many runs at once, each once; damaged ones are left out, with a `FedsimWarning` for each.

    Args:
        paths: runs' folders, folders that hold runs, such as a sweep's, or patterns of both: "results/*"; what else
            lies there is skipped. Runs that are loaded already are taken as they are.

    Raises:
        NewerVersionError: one is of a newer fedsim.
        RunFolderError: a path is not there, or there is no run.
    """
    given = [paths] if isinstance(paths, Run | str | os.PathLike) else list(paths)
    found: dict[Path | int, Run] = {}
    damage: dict[Path | int, RunFolderError] = {}
    for item in given:
        if isinstance(item, Run):
            found.setdefault(item.path.resolve() if item.path else id(item), item)
            continue
        for folder in _meant(os.fspath(item)):
            key = folder.resolve()
            if key in found or key in damage:
                continue
            try:
                run = load_run(folder)
                parts.names(folder, "rounds")  # else there is nothing to read of it
                found[key] = run
            except NewerVersionError:
                raise
            except InputError as error:
                damage[key] = RunFolderError(f"{folder} cannot be read: {error}")
    warn_of(list(damage.values()), found.values())
    if not found:
        raise RunFolderError(f"no run among {', '.join(map(str, given)) or 'no paths'}; {_advice(given)}")
    return Runs(found.values())


def names(runs: Sequence[Run]) -> list[str]:
    """What tells runs apart: their names, or paths where two have one name; in memory they have none, and a number."""
    times = Counter(run.name for run in runs)
    said = [run.name if times[run.name] == 1 or run.path is None else as_text(run.path) for run in runs]
    again: Counter[str] = Counter()
    for place, name in enumerate(said):
        again[name] += 1
        if again[name] > 1:
            said[place] = f"{name} ({again[name]})"
    return said


def _meant(path: str) -> list[Path]:
    """The runs' folders that a path or a pattern stands for.

    Raises:
        RunFolderError: there is no such path.
    """
    is_pattern = glob.has_magic(path) and not Path(path).exists()
    if not is_pattern and not Path(path).exists():
        raise RunFolderError(f"{path} is not there; {_advice([path])}")
    matches = sorted(glob.glob(path)) if is_pattern else [path]  # noqa: PTH207 - absolute patterns too
    return [folder for match in map(Path, matches) for folder in ([match] if is_run(match) else find_runs(match))]


def _advice(given: Iterable[Given]) -> str:
    """What to do where nothing that was given is a run."""
    for path in (item for item in given if not isinstance(item, Run)):
        inside = Path("results") / path
        if is_run(inside) or find_runs(inside):
            return f"did you mean {inside}?"
    return "`fedsim runs` lists them"


def warn_of(damage: Sequence[RunFolderError], readable: Collection[Any]) -> None:
    """Names the runs of several that cannot be read; where no other can, the first is an error."""
    if damage and not readable:
        raise damage[0]
    for problem in damage:
        warnings.warn(f"{problem}; this run is left out", FedsimWarning, stacklevel=3)
