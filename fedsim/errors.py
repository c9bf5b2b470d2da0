"""Every error fedsim raises on purpose.

An error is part of the interface: it says what was given, what is allowed, and what to do, in one or two lines.
All of them survive pickling, so that an actor can raise one and the driver sees the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class FedsimWarning(UserWarning):
    """Something is not as it was planned; results are not concerned."""


class FedsimError(Exception):
    """Base of all fedsim errors. `exit_code` is what the command line exits with."""

    exit_code = 1


class InputError(FedsimError):
    """What the user gave cannot be used; nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """A key, value or combination of the configuration is wrong."""


class DataError(InputError):
    """A data set is missing, damaged, or cannot be fetched."""


class PlanError(InputError):
    """The clients do not fit the machine or cluster in the asked placement."""


class RunFolderError(InputError):
    """A run's name or folder cannot be used: taken, not a run, or in use."""


class RunExistsError(RunFolderError):
    """Another run took the name first."""


class NewerVersionError(RunFolderError):
    """A run, or a file of it, was written by a newer fedsim: nothing is wrong with it."""


class RunFailedError(FedsimError):
    """The run started and could not be finished; its finished rounds stay readable."""


class DivergedError(RunFailedError):
    """Training diverged: no update, or the new weights, are finite. An answer like another, if not a nice one."""


class ClientError(RunFailedError):
    """Code of a client raised: a bug in a model, a loss or a data set, never retried.

    Args:
        round: the communication round, 0 for the evaluation of the initial weights.
        client_id: the client, or -1 where no single client is concerned (evaluation).
        client_traceback: the traceback as text, from the process where it happened.
    """

    def __init__(self, round: int, client_id: int, client_traceback: str) -> None:
        super().__init__(round, client_id, client_traceback)  # the arguments themselves, so that pickle can rebuild it
        self.round = round
        self.client_id = client_id
        self.client_traceback = client_traceback

    def __str__(self) -> str:
        who = f"client {self.client_id}" if self.client_id >= 0 else "the evaluation"
        return f"{who} failed in round {self.round}:\n{self.client_traceback.rstrip()}"


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing: others' errors go on for pages.

    Without its full stop, as the sentence around it goes on.
    """
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip()
    return line if line.endswith("..") else line.removesuffix(".")


def has_diverged(info: Mapping[str, Any]) -> bool:
    """Whether a run ended with a `DivergedError`, by its run.json: it would again."""
    return str(info.get("error")).startswith(f"{DivergedError.__name__}:")


def counted(number: int, what: str) -> str:
    """1 round, 2 rounds, 1,000 rounds."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")  # also of numpy's integers
