"""What runs came to: one row a run, and what several seeds say together. Needs pandas and no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import InputError
from fedsim.groups import Read, counted_of, groups, one_a_seed, rounds_done
from fedsim.metrics import ROUND_COLUMNS
from fedsim.statistics import interval
from fedsim.targets import Target

if TYPE_CHECKING:
    import pandas as pd

_MEASURES = ("final_accuracy", "best_accuracy", "rounds_to_target", "seconds_to_target", "bytes_to_target")
_TO_TARGET = {"rounds_to_target": "round", "seconds_to_target": "seconds", "bytes_to_target": "bytes"}


def left_out(summary: pd.DataFrame) -> str:
    """Says which runs count in no mean, since another of their group and seed does; "" where all count.

    Args:
        summary: from `summary`.
    """
    chosen = _one_a_seed(summary)
    counted = dict(zip(_group_and_seed(chosen), chosen["run"], strict=True))
    others = summary.drop(index=chosen.index)
    said = [
        f"{run} is left out for {counted[key]}" for run, key in zip(others["run"], _group_and_seed(others), strict=True)
    ]
    return f"Of runs of one group and seed one counts in means: {', '.join(said)}." if said else ""


def uneven(summary: pd.DataFrame) -> str:
    """Says of which groups the last accuracies are of different rounds; "" where they are of one.

    Args:
        summary: from `summary`.
    """
    tested = _one_a_seed(summary).dropna(subset="final_accuracy")
    last = tested.groupby("group", sort=False)["final_round"].agg(["min", "max"])
    last = last[last["min"] < last["max"]]
    said = [f"{label} are of rounds {low} to {high}" for label, low, high in last.itertuples()]
    return f"Last accuracies of {', '.join(said)}: their runs went unequally far." if said else ""


def _can_be(measure: str) -> tuple[float, float]:
    """The least and the most that a measure or column can be."""
    is_fraction = "accuracy" in measure and "variance" not in measure
    return (0.0, 1.0) if is_fraction else (0.0, math.inf)


def summary(runs: Sequence[Read], target: Target | None = None) -> pd.DataFrame:
    """One row a run.

    Args:
        runs: the runs.
        target: adds what it took to get there.

    Returns:
        Columns `run`, `group` (see `groups`), `seed`, `status`, `rounds` (done), `clients_evaluated` (whether it has
        the clients' own accuracies), `final_accuracy`, `final_round`, `best_accuracy`, `best_round`, `seconds` (of all
        rounds); with a target also `rounds_to_target` (by the paper's rule, see `Target.crossing`),
        `seconds_to_target` and `bytes_to_target` (down and up, of all clients), NaN where the run has not reached it,
        or rounds before are missing.
    """
    import pandas as pd

    labels = {id(run): label for label, members in groups(runs).items() for run in members}
    return pd.DataFrame([_row(run, labels[id(run)], target) for run in runs])


def _row(run: Read, label: str, target: Target | None) -> dict[str, Any]:
    rounds = run.rounds
    accuracy = rounds.set_index("round")["test_accuracy"].dropna()
    row = {
        "run": run.name,
        "group": label,
        "seed": run.config.seed,
        "status": run.status,
        "rounds": rounds_done(rounds),
        "clients_evaluated": run.config.evaluation.clients,
        "final_accuracy": accuracy.iloc[-1] if len(accuracy) else math.nan,
        "final_round": int(accuracy.index[-1]) if len(accuracy) else 0,
        "best_accuracy": accuracy.max() if len(accuracy) else math.nan,
        "best_round": int(accuracy.index[int(accuracy.to_numpy().argmax())]) if len(accuracy) else 0,
        "seconds": rounds["round_s"].sum(),
    }
    if target is None:
        return row
    rounds = rounds[rounds["round"].to_numpy() == np.arange(len(rounds))].copy()  # up to the first that is missing
    rounds["seconds"] = rounds["round_s"].cumsum()
    rounds["bytes"] = (rounds["bytes_down"] + rounds["bytes_up"]).cumsum()
    crossings = {
        name: target.crossing(rounds[axis].tolist(), rounds[target.column].tolist())
        for name, axis in _TO_TARGET.items()
    }
    return row | {name: math.nan if place is None else place for name, place in crossings.items()}


def over_seeds(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a group and a measure: the mean over its runs and its confidence interval.

    Args:
        summary: from `summary`. Of runs of one group and seed only one counts, see `one_a_seed`.

    Returns:
        Columns `group`, `measure`, `mean`, `low`, `high`, `number` (of runs that have the measure), `of` (runs). The
        mean of what it took to the target is over the runs that reached it: look at `number` before you compare.
    """
    import pandas as pd

    rows = []
    for label, members in _one_a_seed(summary).groupby("group", sort=False):
        for measure in (name for name in _MEASURES if name in summary):
            found = interval(members[measure].dropna().tolist(), _can_be(measure))
            rows.append({"group": label, "measure": measure, **found._asdict(), "of": len(members)})
    return pd.DataFrame(rows, columns=["group", "measure", "mean", "low", "high", "number", "of"])


def paired(summary: pd.DataFrame) -> pd.DataFrame:
    """Differences of every other group to the first one, seed by seed.

    Runs of one seed share its random numbers: their cohorts and batches are the same where the keys that they are drawn
    from are. What is left is the effect, and an interval that is narrower than that of two independent means.

    Args:
        summary: from `summary`.

    Returns:
        Columns `group`, `than`, `measure`, `mean` (of the differences), `low`, `high`, `number` (of seeds of which both
        have the measure), `of` (seeds that both have); no row where there is none.
    """
    import pandas as pd

    chosen = _one_a_seed(summary)
    found = [(label, members.set_index("seed")) for label, members in chosen.groupby("group", sort=False)]
    rows = []
    for label, members in found[1:]:
        than, base = found[0]
        for measure in (name for name in _MEASURES if name in summary):
            differences = (members[measure] - base[measure]).dropna()
            if len(differences):
                values = interval(differences.tolist())._asdict()
                of = len(members.index.intersection(base.index))
                rows.append({"group": label, "than": than, "measure": measure, **values, "of": of})
    return pd.DataFrame(rows, columns=["group", "than", "measure", "mean", "low", "high", "number", "of"])


def _one_a_seed(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the runs that count, see `one_a_seed`, of all groups."""
    ranks = list(zip(summary["rounds"], summary["clients_evaluated"], strict=True))
    return summary.iloc[counted_of(_group_and_seed(summary), ranks)]


def _group_and_seed(summary: pd.DataFrame) -> list[tuple[str, int]]:
    return list(zip(summary["group"], summary["seed"], strict=True))


def curve(runs: Sequence[Read], column: str) -> pd.DataFrame:
    """The mean of a column by round over runs, with its confidence interval.

    Args:
        runs: of one group; see `one_a_seed`.
        column: of rounds.parquet; a number.

    Returns:
        Index `round`; columns `mean`, `low`, `high`, `number`. Rounds in which no run has the column are left out.

    Raises:
        InputError: there is no such column, or it is no number.
    """
    import pandas as pd

    check_column(column)
    frames = [run.rounds.set_index("round")[column].rename(run.config.seed) for run in one_a_seed(runs)]
    values = pd.concat(frames, axis=1)
    values = values.dropna(how="all").sort_index()
    rows = [
        interval([x for x in row if not math.isnan(x)], _can_be(column))._asdict()
        for row in values.astype(float).to_numpy()
    ]
    return pd.DataFrame(rows, index=values.index, columns=["mean", "low", "high", "number"])


def by_number(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A `curve` as far as all of its seeds go, and the rest, in which some have ended: no mean of the same runs.

    The rest begins with the last row of the first part, so that the two meet; it is empty where all end together.
    """
    if frame.empty:
        return frame, frame
    last = frame.index[frame["number"] == frame["number"].max()].max()
    rest = frame[frame.index >= last]
    return frame[frame.index <= last], rest if len(rest) > 1 else rest.iloc[:0]


def check_column(column: str) -> None:
    """Lets pass a column of rounds.parquet that is a number.

    Raises:
        InputError: it is none.
    """
    numbers = [c.name for c in ROUND_COLUMNS if str(c.type) in ("int64", "double")]
    if column not in numbers:
        raise InputError(f"{column!r} is no column to be drawn; there are {', '.join(numbers)}")
