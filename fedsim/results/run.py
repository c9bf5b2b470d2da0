"""Reading a run: from its folder, also while it is being written, or from memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fedsim import checkpoint, models
from fedsim.config import Config
from fedsim.config.tables import lookup
from fedsim.errors import FedsimError, FedsimWarning, RunFolderError, first_line
from fedsim.metrics import RoundRecord, table
from fedsim.numerics import numerics
from fedsim.results import parts
from fedsim.run_folder import is_live, name_of, read_info, read_run
from fedsim.weights import Layout

if TYPE_CHECKING:
    import pandas as pd  # imported where a frame is asked for: a run that is only written does without
    import pyarrow as pa


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A run: its records, weights and model, from its folder or from memory.

    Attributes:
        name: the run's name.
        path: its folder; None for a run that was not written.
        config: the whole resolved configuration.
    """

    name: str
    path: Path | None
    config: Config
    _info: Mapping[str, Any] = field(default_factory=dict)
    """Of a run from memory: what its run.json would say."""
    _records: tuple[RoundRecord, ...] = ()
    _tensors: dict[str, Tensor] | None = None
    _model: Callable[[], nn.Module] | None = None

    def __repr__(self) -> str:
        """A line for a notebook; also of a damaged run, and without a warning."""
        try:
            rows, status = self._rows("rounds")[0], self.status
        except (FedsimError, OSError, ValueError) as error:
            return f"<Run {self.name}: {first_line(error)}>"
        tested = rows["test_accuracy"].drop_null()
        accuracy = f", test accuracy {tested[-1].as_py():.4f}" if len(tested) else ""
        return f"<Run {self.name}: {status}, {max(0, len(rows) - 1)}/{self.config.rounds} rounds{accuracy}>"

    @property
    def rounds(self) -> pd.DataFrame:
        """One row a round, columns as `fedsim.metrics.ROUND_COLUMNS`; read afresh from a run still going.

        Of a run of an older fedsim, columns that came later are null. A damaged part file is left out, with a
        `FedsimWarning` that names it.

        Raises:
            NewerVersionError: a part file is of a newer fedsim.
            RunFolderError: there are no part files.
        """
        return self._frame("rounds")

    @property
    def clients(self) -> pd.DataFrame:
        """One row a sampled client a round, columns as `fedsim.metrics.CLIENT_COLUMNS`; read as `rounds`."""
        return self._frame("clients")

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says, or would; a run that says running while nobody writes it reads as interrupted."""
        if self.path is None:
            return {"name": self.name, "status": "finished", **self._info}
        info = read_info(self.path)
        if info is None:
            raise RunFolderError(f"{self.path} is not a run: it has no run.json of fedsim's")
        if info["status"] == "running" and not is_live(self.path):
            info["status"] = "interrupted"
        return info

    @property
    def status(self) -> str:
        """running, finished, failed or interrupted."""
        return str(self.info["status"])

    def weights(self) -> dict[str, Tensor]:
        """The newest saved weights by name: after a finished run, the final ones.

        A damaged checkpoint gives way to the one before, with a `FedsimWarning`.

        Raises:
            RunFolderError: the run has no checkpoint yet, or none that is whole.
        """
        if self.path is None:
            return {name: tensor.clone() for name, tensor in (self._tensors or {}).items()}
        folder, damage = self.path / "checkpoint", []
        for round in reversed(checkpoint.rounds(folder)):
            try:
                tensors = checkpoint.load(folder, round)[0]
            except RunFolderError as error:
                damage.append(error)
                continue
            for problem in damage:
                warnings.warn(f"{problem}; these are the weights of round {round}", FedsimWarning, stacklevel=2)
            return tensors
        raise damage[0] if damage else RunFolderError(f"{self.path} has no checkpoint yet")

    def model(self) -> nn.Module:
        """The model with `weights` loaded.

        Raises:
            RunFolderError: the model was the user's own and was not given to `load_run`.
        """
        if self._model is None:
            raise RunFolderError(f"{self.name} used its own model; give it: fedsim.load_run(path, model=make_model)")
        with numerics(self.config.placement.threads):
            module = self._model()
        layout = Layout.of(module)  # not load_state_dict: tied weights have one name here and several there
        layout.load(module, layout.of_named(self.weights()))
        return module

    def read(self, kind: Literal["rounds", "clients"]) -> tuple[pd.DataFrame, list[str]]:
        """As `rounds` or `clients`, with what is wrong with part files instead of warnings."""
        rows, damage = self._rows(kind)
        return rows.to_pandas(use_threads=False), damage  # see `parts`

    def _frame(self, kind: Literal["rounds", "clients"]) -> pd.DataFrame:
        frame, damage = self.read(kind)
        for problem in damage:
            warnings.warn(f"{problem}; its rows are left out", FedsimWarning, stacklevel=3)
        return frame

    def _rows(self, kind: str) -> tuple[pa.Table, list[str]]:
        """The rows that can be read, in their order, and what is wrong with the others."""
        if self.path is not None:
            info = read_info(self.path) or {}  # before the records: a finished run has them all
            rows, damage = parts.read(self.path, kind)
            if kind == "rounds" and not damage and info.get("status") == "finished" and not info.get("stop_at"):
                last = max(rows["round"].to_pylist(), default=-1)
                if last < self.config.rounds and last < (of := Config.from_toml(self.path / "config.toml").rounds):
                    damage.append(parts.lacking(self.path, last + 1, of))  # by the file: it may be another run by now
            return rows, damage
        if kind == "rounds":
            return table([record.row(self.name) for record in self._records], parts.SCHEMAS[kind]), []
        clients = [client for record in self._records for client in record.clients]
        return table([client.row(self.name) for client in clients], parts.SCHEMAS[kind]), []


def load_run(path: str | os.PathLike[str], *, model: Callable[..., nn.Module] | None = None) -> Run:
    """A run from its folder; one that is still going can be read too.

    Args:
        path: the run's folder.
        model: the factory of a run that used its own model; only `Run.model` needs it.

    Raises:
        RunFolderError: the folder is not a run of fedsim, or of a newer version.
    """
    folder = Path(path)
    info, config, edited = read_run(folder)
    if edited:
        warnings.warn(f"{edited}; it need not say what was run", FedsimWarning, stacklevel=2)
    if model is None and "model" not in info["own"]:
        model = lookup(models.MODELS, config.model.name, "model.name")
    shape, num_classes = tuple(info["data"]["input_shape"]), info["data"]["num_classes"]
    make = partial(models.build, model, shape, num_classes, config.seed) if model else None
    return Run(name_of(folder), folder, config, _model=make)
