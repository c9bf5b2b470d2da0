"""What Ray's errors mean to a run, and how they are told."""

from __future__ import annotations

import re

from ray.exceptions import ActorUnavailableError, ObjectLostError, OutOfMemoryError, RayError, RayTaskError

from fedsim.actors.calls import Call
from fedsim.actors.connection import live_node_ids, logs
from fedsim.errors import FedsimError, RunFailedError, counted, first_line
from fedsim.failures import Cause

_ANSI_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def cause_of(error: RayError) -> Cause:
    """What was lost; Ray has no field that tells."""
    if isinstance(error, OutOfMemoryError):
        return "memory"
    if isinstance(error, ActorUnavailableError) and len(live_node_ids()) > 1:  # nothing listens at its node any more
        return "node"
    if isinstance(error, ObjectLostError) or "node has died" in str(error) or "never ran" in str(error):
        return "node"
    return "actor"


LOST = {
    "actor": "the actor died",
    "node": "the actor's node died",
    "memory": "the actor was killed, as memory was short",
    "timeout": "it took too long",
}
"""What happened, in a client's row."""


def own_error(error: RayTaskError) -> FedsimError:
    """The error that the code in the actor raised, as the driver raises it."""
    if isinstance(error.cause, FedsimError):
        return error.cause
    return RunFailedError(f"an actor failed:\n{_ANSI_COLOR.sub('', str(error))}")


def said(error: RayError) -> str:
    """What Ray says first, without its colours."""
    return _ANSI_COLOR.sub("", first_line(error))


def exhausted(call: Call, cause: Cause, reason: str) -> str:
    """Why a run ends: whose work was lost, and how often."""
    if call.method == "fit":
        what = f"client {', '.join(str(task.client_id) for task, _ in call.pieces)} in round {call.pieces[0][0].round}"
    else:
        what = "the evaluation" if call.method == "evaluate" else "starting the actor"
    times = counted(call.losses.of(cause), "time")
    if cause == "timeout":
        return f"{what}: {reason}, {times}; see failures.timeout_s and failures.max_retries"
    if call.method == "load":
        reason += f"; Ray's logs may say why: {logs()}"
    return f"{what}: {LOST[cause]}, {times} ({reason}); see failures.max_retries"
