"""Where a recording writes: the folder of a new run. That of a run that goes on is a `resumption`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedsim.config import Config
from fedsim.errors import RunExistsError
from fedsim.results import RunWriter, begin
from fedsim.simulation import Start


class Home(Protocol):
    """A folder that a run is written into: a new run's, or that of one that goes on."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        ...

    @property
    def config(self) -> Config:
        """The configuration that is written down."""
        ...

    @property
    def start(self) -> Start | None:
        """Where the run goes on; None for a start from round 0."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the run has reached what it was to stop at: no round is left to compute."""
        ...

    def open(self, info: dict[str, Any]) -> RunWriter:
        """Begins to write; nothing was written before.

        Args:
            info: what is known of the run once it is up, for run.json.

        Raises:
            InputError: the folder cannot be written, or the run must not go on here.
        """
        ...


@dataclass
class NewRun:
    """The `Home` of a run that begins."""

    make: Callable[[], Path]
    """Gives a name that is free; nothing is made."""
    folder: Path
    config: Config
    overwrite: bool
    is_named: bool
    """The name was asked for: if another run takes it first, the run is refused."""
    start: None = None
    is_over: bool = False

    def open(self, info: dict[str, Any]) -> RunWriter:
        """Makes the folder; see `Home`."""
        while True:
            self.folder = self.make()
            try:
                return begin(self.folder, self.config, info, overwrite=self.overwrite)
            except RunExistsError:
                if self.is_named:
                    raise
