"""How plots and reports tell things apart: colours that the colour-blind can, and never by colour alone."""

from __future__ import annotations

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""Okabe and Ito's, without the yellow that paper swallows."""

DASHES = ("solid", "dash", "dot", "dashdot")

NEUTRAL = "#5F6B76"


def look(place: int) -> tuple[str, str]:
    """Colour and dash of the n-th line; 28 of them differ."""
    return COLORS[place % len(COLORS)], DASHES[place % len(DASHES)]
