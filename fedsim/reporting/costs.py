"""What the runs cost: time, payload, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from fedsim.errors import counted
from fedsim.palette import COLORS
from fedsim.reporting import charts, html
from fedsim.reporting.learning import size
from fedsim.reporting.shown import Shown
from fedsim.views import PARTS, View, seconds, thinned

LOOKS = dict(zip(PARTS, zip(COLORS, ("", "/", ".", "x"), strict=False), strict=True))
MISHAPS = {
    "num_rejected": ("rejected: update not finite", COLORS[1], "/"),
    "num_failed": ("failed: given up", COLORS[3], "x"),
    "num_dropped": ("left out", COLORS[4], "."),
    "num_retries": ("started again", COLORS[5], ""),
}
MOST_MESSAGES = 20


def time(shown: Shown) -> str | None:
    """Where the rounds' time went, and what dominates."""
    frames = {run.name: seconds(run) for run in shown.runs if len(run.rounds)}
    totals = pd.DataFrame({name: frame.sum() for name, frame in frames.items()}).T
    if totals.empty or not totals.to_numpy().sum() > 0:
        return None
    keys = html.legend((html.area_key(*LOOKS[part]), name) for part, name in PARTS.items())
    drawn = _by_round(*frames.values()) if shown.is_one else _by_run(frames)
    rows = [
        [name, *frame.sum().tolist(), float(frame.to_numpy().sum()), _median(frame)] for name, frame in frames.items()
    ]
    headers = ["run", *PARTS.values(), "all rounds", "median round"]
    return keys + drawn + html.table(headers, rows, "Seconds") + html.paragraph(_dominates(totals))


def _trained(frame: pd.DataFrame) -> pd.DataFrame:
    """The rounds without round 0, which trains nothing; that one where there is no other."""
    return frame[frame.index > 0] if (frame.index > 0).any() else frame


def _median(frame: pd.DataFrame) -> float:
    """Seconds of the median round."""
    return float(np.median(_trained(frame).sum(axis=1)))


def _by_round(frame: pd.DataFrame) -> str:
    drawn, width = thinned(frame, charts.MOST_BARS)
    drawn.index = pd.Index(drawn.index + (width - 1) / 2)
    parts = {name: (drawn[part], *LOOKS[part]) for part, name in PARTS.items()}
    title = "Time of each round" if width == 1 else f"Time of a round, means of {width} rounds"
    longest = float(frame.sum(axis=1).max())
    said = f"The median round took {html.number(_median(frame))} s, the longest {html.number(longest)} s."
    return html.figure(title, charts.bars(parts, "round", "s", width=width), said)


def _by_run(frames: Mapping[str, pd.DataFrame]) -> str:
    means = pd.DataFrame({name: _trained(frame).mean() for name, frame in frames.items()}).T
    parts = {name: (means[part], *LOOKS[part]) for part, name in PARTS.items()}
    rounds = means.sum(axis=1)
    said = (
        f"From {html.number(rounds.min())} s ({rounds.idxmin()}) to {html.number(rounds.max())} s ({rounds.idxmax()})."
    )
    chart = charts.named_bars(parts, "s")
    return html.figure("Time of a mean round", chart, said, 90 + 28 * len(means))


def _dominates(totals: pd.DataFrame) -> str:
    shares = totals.sum() / totals.to_numpy().sum()
    most = str(shares.idxmax())
    by_run = totals[most] / totals.sum(axis=1)
    verb = "dominates" if shares[most] > 0.5 else "takes most"
    of = f"of the {html.number(float(totals.to_numpy().sum()))} s that the rounds took"
    among = "" if len(totals) == 1 else f", from {by_run.min():.0%} to {by_run.max():.0%} in a run"
    return f"{PARTS[most].capitalize()} {verb}: {shares[most]:.0%} {of}{among}."


def payload(shown: Shown) -> str | None:
    """Bytes that the simulated clients would receive and send."""
    rows = []
    for run in shown.runs:
        down, up, rounds = run.rounds["bytes_down"].sum(), run.rounds["bytes_up"].sum(), max(run.last, 0)
        if rounds:
            rows.append([run.name, size(down), size(up), size(down + up), size((down + up) / rounds)])
    if not rows:
        return None
    said = "What the simulated clients would receive and send: encoded weights, without retries."
    return html.paragraph(said, "quiet") + html.table(["run", "down", "up", "together", "a round"], rows)


def mishaps(shown: Shown) -> str | None:
    """What failed, and how it was met."""
    made = "".join(_error(run) for run in shown.runs)
    totals = {run.name: run.rounds[list(MISHAPS)].sum() for run in shown.runs}
    resumes = {run.name: len(run.info.get("resumes", [])) for run in shown.runs}
    if not sum(total.sum() for total in totals.values()):
        made += html.paragraph("No client failed, was rejected or left out, and none had to be started again.")
        return made + (_resumed(resumes) if any(resumes.values()) else "")
    if shown.is_one:
        made += _mishaps_by_round(shown.runs[0])
    headers = ["run", *(name for name, _, _ in MISHAPS.values()), "resumes"]
    made += html.table(
        headers, [[name, *map(int, total), resumes[name]] for name, total in totals.items()], "Clients' work"
    )
    return made + _messages(shown)


def _resumed(resumes: Mapping[str, int]) -> str:
    said = ", ".join(f"{name} {counted(number, 'time')}" for name, number in resumes.items() if number)
    return html.paragraph(f"Gone on with after an interruption: {said}.")


def _error(run: View) -> str:
    error = run.info.get("error")
    return f"{html.paragraph(f'{run.name} failed:')}<pre>{html.escape(str(error)[:4000])}</pre>" if error else ""


def _mishaps_by_round(run: View) -> str:
    whole = run.rounds.set_index("round")[list(MISHAPS)]
    frame, width = thinned(whole, charts.MOST_BARS, "sum")
    frame.index = pd.Index(frame.index + (width - 1) / 2)
    there = {column: known for column, known in MISHAPS.items() if whole[column].any()}
    parts = {name: (frame[column], color, pattern) for column, (name, color, pattern) in there.items()}
    first = int(whole.index[whole.sum(axis=1) > 0][0])
    rounds = int((whole.sum(axis=1) > 0).sum())
    said = f"In {rounds} of {(whole.index > 0).sum()} rounds, round {first} the first."
    keys = html.legend((html.area_key(color, pattern), name) for name, color, pattern in there.values())
    title = "Mishaps in each round" if width == 1 else f"Mishaps in each {width} rounds"
    return keys + html.figure(title, charts.bars(parts, "round", "clients", width=width), said, 240)


def _messages(shown: Shown) -> str:
    found = pd.concat([run.clients.assign(run=run.name) for run in shown.runs])
    found = found[found["error"].notna()]
    if found.empty:
        return ""
    found = found.assign(error=found["error"].map(lambda error: str(error).strip().partition("\n")[0][:300]))
    by = found.groupby(["error", "status"], sort=False)
    rows = [
        [error, status, len(group), f"{group['round'].min()} to {group['round'].max()}", group["client_id"].nunique()]
        for (error, status), group in sorted(by, key=lambda pair: -len(pair[1]))
    ]
    more = html.paragraph(f"{len(rows) - MOST_MESSAGES} more messages.", "quiet") if len(rows) > MOST_MESSAGES else ""
    return html.table(["why", "status", "times", "rounds", "clients"], rows[:MOST_MESSAGES], "Messages") + more
