"""What is asked of actors, and what becomes of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedsim.failures import Losses

if TYPE_CHECKING:
    from fedsim.actors.host import Handle


@dataclass(frozen=True, eq=False)
class Call:
    """A method call on one actor: kept until it is answered, so that it can be made again, there or elsewhere."""

    actor: int
    method: str
    """load, fit or evaluate."""
    shared: tuple[Any, ...] = ()
    """Arguments for all pieces."""
    pieces: tuple[Any, ...] = ()
    """What is to be done; the method answers with as many values."""
    losses: Losses = field(default_factory=Losses)
    handle: Handle | None = None
    """The actor that it was made on: another one may have taken its number since."""


@dataclass(frozen=True)
class Work:
    """Calls that belong together."""

    made: dict[Any, Call] = field(default_factory=dict)
    """By their answers to come: one of each actor, so that it is clear which one a death has cut off."""
    later: deque[Call] = field(default_factory=deque)
    """Not made yet: as many wait as there is nobody to work on."""
    held: list[Call] = field(default_factory=list)
    """To be made again after a loss, each when its actor has nothing else to do."""


@dataclass(frozen=True)
class Answer:
    """What became of a piece of work."""

    piece: Any
    value: Any
    """None if it was given up."""
    call: Call
    error: str | None = None
    """Why it was given up."""
