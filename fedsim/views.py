"""Runs as plots and reports show them: each read once, in whole rounds, and the frames that are drawn of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedsim import datasets
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import FedsimWarning, InputError, NewerVersionError, RunFolderError
from fedsim.experiment import split
from fedsim.metrics import CLIENT_COLUMNS, Column, is_of_clients_evaluation
from fedsim.resolution import resolve
from fedsim.results import Run, load_runs
from fedsim.results.parts import SCHEMAS
from fedsim.results.runs import Given, names, warn_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""That stand for a distribution over clients."""

PARTS = {
    "fit": "local training",
    "aggregate": "aggregation",
    "evaluate": "evaluation",
    "rest": "the rest of the round",
}
"""Of a round's time, and what they are called."""

_NUMBERS = ("int32", "int64", "double")
_IDENTITIES = ("round", "client_id", "actor", "pid")


@dataclass(frozen=True, eq=False)
class View:
    """A run at one moment: the rounds that were whole, and their clients."""

    name: str
    path: Path | None
    config: Config
    info: dict[str, Any]
    """See `Run.info`."""
    rounds: pd.DataFrame
    clients: pd.DataFrame
    damage: tuple[str, ...] = ()
    """What is wrong with part files, whose rows are missing."""

    @property
    def status(self) -> str:
        """running, finished, failed or interrupted."""
        return str(self.info["status"])

    @property
    def last(self) -> int:
        """The last round; -1 where there is none yet."""
        return int(self.rounds["round"].max()) if len(self.rounds) else -1


def views(given: Given | Iterable[Given]) -> list[View]:
    """Reads runs, each once; what is damaged is left out, a part file or a run, with a `FedsimWarning` that names it.

    Raises:
        NewerVersionError: one is of a newer fedsim.
        RunFolderError: there is none of which a round can be read.
    """
    items = [given] if isinstance(given, Run | str | os.PathLike) else list(given)
    runs = load_runs([run for item in items for run in load_runs(item)])  # each is to be one, or to hold some
    found, unreadable = [], []
    for name, run in zip(names(runs), runs, strict=True):
        try:
            found.append(_view(run, name))
        except NewerVersionError:
            raise
        except RunFolderError as error:
            unreadable.append(error)
    warn_of(unreadable, found)
    for problem in (problem for run in found for problem in run.damage):
        warnings.warn(f"{problem}; its rows are left out", FedsimWarning, stacklevel=3)
    return found


def view(given: Given) -> View:
    """Reads one run.

    Raises:
        InputError: these are several; or see `views`.
    """
    found = views(given)
    if len(found) > 1:
        raise InputError(
            f"one run is drawn at a time, and these are {len(found)}: {found[0].name}, {found[1].name} ..."
        )
    return found[0]


def _view(run: Run, name: str) -> View:
    info = run.info  # before the records: what is finished has them all
    rounds, damage = run.read("rounds")
    if damage and rounds.empty:
        raise RunFolderError(f"not a round of {run.name} can be read: {damage[0]}")
    try:
        clients, more = run.read("clients")
    except NewerVersionError:
        raise
    except RunFolderError as error:
        clients, more = SCHEMAS["clients"].empty_table().to_pandas(), [str(error)]
    clients = clients[clients["round"].isin(rounds["round"])]  # of a run still going, they come before their round
    return View(name, run.path, run.config, info, rounds, clients, (*damage, *more))


def measure(column: str) -> Column:
    """What is known of a column of clients.parquet that is a number and no identity.

    Raises:
        InputError: it is none.
    """
    known = {c.name: c for c in CLIENT_COLUMNS if str(c.type) in _NUMBERS and c.name not in _IDENTITIES}
    if column not in known:
        raise InputError(f"{column!r} is no column of clients to be drawn; there are {', '.join(known)}")
    return known[column]


def check_measured(run: View, column: str) -> None:
    """Lets pass a column of clients that a run has, or may have after its first round.

    Raises:
        InputError: it is empty.
    """
    values = run.clients.loc[run.clients["status"] == "completed", column]
    if np.isfinite(values.astype(float)).any():
        return
    if is_of_clients_evaluation(column) and not run.config.evaluation.clients:
        raise InputError(f"{column} is empty in {run.name}: evaluation.clients=true records it")
    if len(run.clients):
        raise InputError(f"{column} is empty in {run.name}: no client that completed has a finite value")


def quantiles(runs: Sequence[View], column: str) -> pd.DataFrame:
    """The distribution of a column over the completed clients, by round, of all runs together.

    Returns:
        Index `round`, columns `QUANTILES`; rounds without a finite value are left out.
    """
    rows = pd.concat([run.clients.loc[run.clients["status"] == "completed", ["round", column]] for run in runs])
    rows = rows[np.isfinite(rows[column].astype(float))]
    if rows.empty:
        return pd.DataFrame(columns=list(QUANTILES), dtype=float)
    return rows.groupby("round")[column].quantile(np.array(QUANTILES)).unstack()


def seconds(run: View) -> pd.DataFrame:
    """Where the time of each round went: index `round`, columns `PARTS`, seconds; together they are `round_s`."""
    rounds = run.rounds.set_index("round")
    found = pd.DataFrame({part: rounds[f"{part}_s"].fillna(0.0) for part in PARTS if part != "rest"})
    found["rest"] = (rounds["round_s"] - found.sum(axis=1)).clip(lower=0.0)
    return found


def thinned(frame: pd.DataFrame, most: int, how: Literal["mean", "sum"] = "mean") -> tuple[pd.DataFrame, int]:
    """A frame by round in at most so many rows, each of equally many rounds, but for the last; under the first of them.

    Args:
        frame: the frame.
        most: rows.
        how: what a row is of its rounds.

    Returns:
        The frame, and how many rounds a row is of.
    """
    width = -(-len(frame) // most) or 1
    if width == 1:
        return frame, 1
    bins = np.arange(len(frame)) // width
    return frame.groupby(bins).agg(how).set_axis(frame.index[::width], axis=0), width


def labels(run: View, dataset: Dataset | None = None) -> pd.DataFrame:
    """How many training examples of each label each client has, computed again; fetches nothing.

    Args:
        run: the run.
        dataset: its own data set, if it had one.

    Returns:
        Index `client`, columns the labels.

    Raises:
        InputError: the data set is not here, or another than the run's.
    """
    config = resolve(run.config, own_strategy="strategy" in run.info.get("own", {}))
    if dataset is None:
        dataset = _dataset(run, config.data.dataset)
    if run.info.get("data", {}).get("sha256") not in (None, dataset.sha256()):
        raise InputError(f"{run.name} had another data set than this {dataset.name}: its SHA-256 is not the run's")
    partition = split(config, dataset)
    recorded = run.clients.drop_duplicates("client_id").set_index("client_id")["num_examples"]
    if (recorded != pd.Series(partition.num_examples).reindex(recorded.index)).any():
        raise InputError(f"{run.name} had another data set than {dataset.name}: its clients have other shards")
    owners = np.repeat(np.arange(partition.num_clients), partition.num_examples)
    counts = np.zeros((partition.num_clients, dataset.num_classes), np.int64)
    np.add.at(counts, (owners, dataset.train_labels[partition.indices]), 1)
    return pd.DataFrame(counts).rename_axis(index="client", columns="label")


def _dataset(run: View, name: str) -> Dataset:
    if "dataset" in run.info.get("own", {}):
        raise InputError(f"{run.name} had a data set of its own; give it from Python: dataset=...")
    (state,) = [entry.state for entry in datasets.status() if entry.name == name]
    if state not in ("cached", "in memory"):
        raise InputError(f"{name} is not here ({state}); `fedsim data fetch {name}` gets it")
    return datasets.load(name)
