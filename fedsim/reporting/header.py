"""The top of a report: which runs, in which state, and what came of them."""

from __future__ import annotations

import shlex
from collections import Counter
from datetime import UTC, datetime

from fedsim.errors import has_diverged
from fedsim.reporting import html
from fedsim.reporting.shown import Shown
from fedsim.statistics import LEVEL, Interval
from fedsim.summaries import left_out, over_seeds, summary, uneven
from fedsim.views import View

STATUSES = {"finished": "finished", "running": "still going", "failed": "failed", "interrupted": "interrupted"}
"""What run.json says, and what is read here."""


def title(shown: Shown) -> str:
    """The page's name."""
    names = [run.name for run in shown.runs]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"


def header(shown: Shown) -> str:
    """Names, states, dates and outcomes."""
    heading = html.escape(title(shown))
    if not shown.is_one:
        return f"<h1>{heading}</h1>" + _damage(shown) + _groups(shown) + _runs(shown)
    (run,) = shown.runs
    kind = run.status if run.status in STATUSES else "interrupted"
    status = f'<span class="status {kind}">{html.escape(_state(run))}</span>'
    words = html.paragraph(_outcome(run), "outcome") + html.paragraph(_dates(run), "quiet")
    return f"<h1>{heading} {status}</h1>" + _damage(shown) + words


def footer() -> str:
    """When the page was made."""
    return html.paragraph(f"Made by fedsim report, {_time(datetime.now(UTC))}, from the Parquet files of the runs.")


def _damage(shown: Shown) -> str:
    """Which rows are missing from all that the page says."""
    said = [f"Rows are missing: {problem}" for run in shown.runs for problem in run.damage]
    return "".join(html.paragraph(text, "damage") for text in said)


def _state(run: View) -> str:
    return STATUSES.get(run.status, run.status)


def _outcome(run: View) -> str:
    of = run.config.rounds
    if run.last < 0:
        return f"No round of {of:,} is there yet."
    accuracy = run.rounds.set_index("round")["test_accuracy"].dropna()
    rounds = f"{run.last:,} of {of:,} rounds" if run.last != of else f"{of:,} round{'s' * (of != 1)}"
    took = f"{html.number(float(run.rounds['round_s'].sum()))} s of rounds"
    said = f"No accuracy was measured in {rounds}, {took}."
    if len(accuracy):
        last, best = accuracy.index[-1], accuracy.idxmax()
        at = "" if last == run.last else f", measured in round {last:,}"
        peak = "" if best == last else f" (best {accuracy.max():.4f} in round {best:,})"
        said = f"Test accuracy {accuracy.iloc[-1]:.4f} after {rounds}{at}{peak}, {took}."
    can_go_on = run.status in ("interrupted", "failed") and not has_diverged(run.info) and not run.info.get("own")
    if can_go_on and run.path is not None:
        said += f" To go on: fedsim resume {shlex.quote(str(run.path))}"
    return said


def _dates(run: View) -> str:
    times = {what: run.info.get(f"{what}_at") for what in ("started", "ended")}
    return ", ".join([*(f"{what} {_time(when)}" for what, when in times.items() if when), f"seed {run.config.seed}"])


def _time(when: object) -> str:
    """A time of run.json to the minute; as it is where it is none."""
    try:
        return f"{datetime.fromisoformat(str(when)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        return str(when)


def _groups(shown: Shown) -> str:
    """Which group ended highest, and a line a group."""
    means = over_seeds(summary(shown.runs))
    found = {row["group"]: row for row in means[means["measure"] == "final_accuracy"].to_dict("records")}
    ends = {group.label: Interval(*(found[group.name][name] for name in Interval._fields)) for group in shown.groups}
    known = {label: end for label, end in ends.items() if end.number}
    said = ", ".join(f"{number} {state}" for state, number in Counter(map(_state, shown.runs)).items())
    if known:
        best = max(known, key=lambda label: known[label].mean)
        highest = (
            f"Highest last test accuracy: {known[best]}, of {best}."
            if len(ends) > 1
            else f"Last test accuracy {known[best]}."
        )
        said = f"{highest} Runs: {said}"
    rows = [[label, str(end) if end.number else "none yet", end.number] for label, end in ends.items()]
    headers = ["group", f"last test accuracy: mean [{LEVEL:.0%} interval]", "seeds"]
    return html.paragraph(f"{said}.", "outcome") + html.table(headers, rows)


def _runs(shown: Shown) -> str:
    """A row a run, with the letter of its group, and which of them are in no mean."""
    frame = summary(shown.runs)
    rows: list[list[object]] = []
    letters = {group.name: [group.letter] for group in shown.groups if group.letter}
    for run, row in zip(shown.runs, frame.to_dict("records"), strict=True):
        cells: list[object] = [run.name, *letters.get(row["group"], []), _state(run), str(row["seed"])]
        cells.append(f"{row['rounds']}/{run.config.rounds}")
        cells += [row[name] for name in ("final_accuracy", "best_accuracy", "seconds")]
        rows.append([*cells, _time(run.info.get("started_at", ""))])
    headers = ["run", *(["group"] if letters else []), "status", "seed", "rounds"]
    headers += ["last accuracy", "best accuracy", "seconds", "started"]
    return html.table(headers, rows) + "".join(
        html.paragraph(said, "quiet") for said in (left_out(frame), uneven(frame)) if said
    )
