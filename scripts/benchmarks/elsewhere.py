"""What other simulators took on another machine, on another day: dated numbers, not measured by this script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DATE = "2026-11-23"
MACHINE = "another machine: 2 cores of a Xeon with AVX-512, 25 GB, no GPU, Python 3.11 (BlazeFL: 3.13)"
SECONDS = {
    "plain loop, one thread": (1.57, 0.396, 1.80, 9.9),
    "[FedJAX](https://github.com/google/fedjax) 0.0.17 (jax 0.10.2)": (0.78, 0.244, 1.06, 7.1),
    "[pfl](https://github.com/apple/pfl-research) 0.6.0, two processes": (0.93, 0.240, 1.07, 5.3),
    "[BlazeFL](https://github.com/blazefl/blazefl) 2.0.1, two processes": (0.94, 0.50, 1.67, 7.4),
}
"""Of a median round of T1 to T4: training, aggregation and evaluation, with the splits and steps of `tasks`."""


def section() -> list[str]:
    """The report's section, as Markdown."""
    plain, *_ = SECONDS.values()
    rows = [
        (system, *(f"{seconds:g} ({loop / seconds:.2f})" for seconds, loop in zip(times, plain, strict=True)))
        for system, times in SECONDS.items()
    ]
    return [
        "## Measured elsewhere: other simulators",
        "",
        *table(("seconds a round (times as fast as the plain loop there)", "T1", "T2", "T3", "T4"), rows),
        "",
        f"Not from this run: measured by this project on {DATE} on {MACHINE}, each simulator in the best set-up that "
        "worked there, medians of the warm rounds of mostly two runs, the same accuracy; differences under 15 % mean "
        "nothing. Compare the ratios to the plain loop, not the seconds.",
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown; the first column holds words, the others numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
