"""The page: the paper's numbers, ours, and whether they agree."""

from __future__ import annotations

from mcmahan2017.plan import Plan
from mcmahan2017.store import Store


def write(plan: Plan, store: Store) -> None:
    """Writes README.md and the plots from the store alone."""
