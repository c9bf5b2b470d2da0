"""What to do when the work of clients is lost: a pure function, without Ray.

Work is lost with its actor, with its node, with the memory that was short, or because it took too long. Each way has
a budget of its own, so that a node that dies does not use up the patience with a client that makes its actor crash.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Cause = Literal["bug", "actor", "node", "memory", "timeout"]
"""bug: code of a client raised. Otherwise what was lost: the actor (or its worker process), its whole node, the actor
because memory was short (Ray or the system killed it), or the patience (failures.timeout_s)."""

Decision = Literal["retry", "stop", "drop"]


@dataclass(frozen=True)
class Losses:
    """How often a piece of work was lost, by cause."""

    actor: int = 0
    node: int = 0
    memory: int = 0
    timeout: int = 0

    @property
    def total(self) -> int:
        """Of all causes."""
        return self.actor + self.node + self.memory + self.timeout

    def of(self, cause: Cause) -> int:
        """Of one cause; a bug is no loss."""
        return 0 if cause == "bug" else int(getattr(self, cause))

    def after(self, cause: Cause) -> Losses:
        """With one more."""
        return self if cause == "bug" else replace(self, **{cause: self.of(cause) + 1})


def decide(cause: Cause, losses: Losses, max_retries: int, on_exhausted: Literal["stop", "drop"]) -> Decision:
    """What becomes of a piece of work that did not end.

    Args:
        cause: why it did not.
        losses: how often it was lost so far, this time included.
        max_retries: for each cause.
        on_exhausted: what a client's work is worth when they are used up; of other work, "stop".

    Returns:
        retry: another actor does it. stop: the run ends, and can be resumed. drop: the round goes on without it.
    """
    if cause == "bug":  # it would happen again, and must be seen
        return "stop"
    if losses.of(cause) <= max_retries:
        return "retry"
    if cause == "timeout":  # a clock must not decide who takes part in a round
        return "stop"
    return on_exhausted
