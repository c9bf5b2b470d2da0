"""What an actor costs the machine that it runs on.

The predictions are constants of the release, measured once, so that the same machine gets the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Of one actor, with torch loaded."""

    num_bytes: int
    """Memory (PSS)."""
    server_bytes: int
    """Memory of the process that the actors of a node are forked from; 0 where there is none."""
    start_core_s: float
    """Core-seconds until it is up."""
    threads: int
    """As the system's limits count them."""
    files: int
    """That Ray's own process of a node holds open for it."""


PLAIN = Cost(num_bytes=400_000_000, server_bytes=0, start_core_s=2.0, threads=25, files=4)
"""Ray's own worker: it imports torch and ray by itself."""
FORKED = Cost(num_bytes=50_000_000, server_bytes=300_000_000, start_core_s=0.25, threads=25, files=4)
"""A child of the fork server, which shares with it what both only read."""
COSTS = {"plain": PLAIN, "fork": FORKED}

BASE_THREADS, BASE_FILES = 250, 100
"""Of the driver and of Ray's own processes."""
