"""What has been run, as two Parquet files: a row a run, and the accuracy of each of its rounds."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fedsim.errors import InputError, first_line
from mcmahan2017.plan import Cell
from mcmahan2017.search import Done
from mcmahan2017.work import Finished

KEY = ["cell", "lr", "seed"]


class Store:
    """Rows of runs that came to their end; each is on disk once it is added.

    Args:
        folder: of runs.parquet and curves.parquet.

    Raises:
        InputError: one of them is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = self._read("runs")
        self.curves = self._read("curves")

    def _read(self, name: str) -> pd.DataFrame:
        path = self.folder / f"{name}.parquet"
        try:
            return pd.read_parquet(path) if path.exists() else pd.DataFrame(columns=KEY)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {first_line(error)}") from None

    def add(self, finished: Finished) -> None:
        """Adds a run to both files, also where it was killed between them before."""
        self.runs = _added(self.runs, pd.DataFrame([finished.row])).sort_values(KEY, ignore_index=True)
        self.curves = _added(self.curves, finished.curve).sort_values([*KEY, "round"], ignore_index=True)
        for name, frame in (("curves", self.curves), ("runs", self.runs)):  # a run is there when its row is
            write(self.folder / f"{name}.parquet", frame)

    def done(self, cell: Cell) -> list[Done]:
        """The runs of a cell."""
        rows = self.runs[self.runs["cell"] == cell.name]
        return [Done(r.lr, r.seed, r.rounds_to_target, r.best_accuracy) for r in rows.itertuples()]


def write(path: Path, frame: pd.DataFrame) -> None:
    """Writes a table whole or not at all: what is lost were hours of runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.tmp")
    frame.to_parquet(new, index=False)
    new.replace(path)


def _added(frame: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        return new
    is_there = pd.MultiIndex.from_frame(frame[KEY]).isin(pd.MultiIndex.from_frame(new[KEY]))
    return pd.concat([frame[~is_there], new], ignore_index=True)
