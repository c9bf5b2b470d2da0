"""What a report is about: runs read once, in groups of seeds, and what they were to reach."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fedsim.datasets import Dataset
from fedsim.groups import groups, one_a_seed
from fedsim.palette import look
from fedsim.reporting import html
from fedsim.targets import Target
from fedsim.views import View

MOST_SHOWN = 4
"""Groups of which a run is shown by itself."""


class Group(NamedTuple):
    """Runs that differ in their seed only."""

    letter: str
    """What it is called where there is little room: A, B, ..., Z, A2, ...; "" where there is one group."""
    name: str
    runs: list[View]
    """Those that count: one a seed."""
    color: str
    dash: str

    @property
    def prefix(self) -> str:
        """Before what is said of it."""
        return f"{self.letter}: " if self.letter else ""

    @property
    def label(self) -> str:
        """Letter, name and number of seeds."""
        seeds = f" ({len(self.runs)} seeds)" if len(self.runs) > 1 else ""
        return f"{self.prefix}{self.name}{seeds}"


@dataclass(frozen=True)
class Shown:
    """The runs of a report."""

    runs: Sequence[View]
    targets: Sequence[Target]
    dataset: Dataset | None = None
    """Of the runs that had one of their own."""

    @cached_property
    def groups(self) -> list[Group]:
        """See `groups.groups`; a run alone is called by its name."""
        found = groups(self.runs) if len(self.runs) > 1 else {self.runs[0].name: list(self.runs)}
        return [
            Group(_letter(place) if len(found) > 1 else "", name, one_a_seed(members), *look(place))
            for place, (name, members) in enumerate(found.items())
        ]

    @property
    def is_one(self) -> bool:
        """Whether it is one run."""
        return len(self.runs) == 1

    @property
    def first(self) -> list[View]:
        """The first run of each group that counts, for what is shown of single runs."""
        return [group.runs[0] for group in self.groups][:MOST_SHOWN]

    def titled(self, runs: Sequence[View], title: str) -> str:
        """A title, after the runs that it is about; a run alone needs no name."""
        return title if self.is_one else f"{', '.join(run.name for run in runs)}: {title[0].lower()}{title[1:]}"

    def note(self) -> str:
        """Says which runs are shown, where not all are."""
        if len(self.first) == len(self.runs):
            return ""
        of = f"of the first {MOST_SHOWN} groups" if len(self.groups) > MOST_SHOWN else "group"
        return html.paragraph(f"Shown: one run of each {of}.", "quiet")

    def legend(self) -> str:
        """Which line is which group; nothing where there is one."""
        if len(self.groups) == 1:
            return ""
        return html.legend((html.line_key(group.color, group.dash), group.label) for group in self.groups)


def _letter(place: int) -> str:
    again, place = divmod(place, 26)
    return string.ascii_uppercase[place] + (str(again + 1) if again else "")
