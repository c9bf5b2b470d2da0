"""How well the runs learned: accuracy and loss, when they came to a target, and how the clients fared."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedsim.reporting import charts, html
from fedsim.reporting.charts import Line
from fedsim.reporting.shown import Shown
from fedsim.statistics import LEVEL, Interval
from fedsim.summaries import by_number, curve, over_seeds, summary
from fedsim.targets import Target
from fedsim.views import View

CURVES = {
    "test_accuracy": ("Test accuracy", "fraction"),
    "test_loss": ("Test loss", "nats"),
    "train_loss": ("Training loss of the sampled clients", "nats"),
    "update_l2_norm": ("Length of the server's step", "L2 norm"),
}
_OWN = "Accuracy on a client's own data, {} its training"
FAIRNESS = {
    _OWN.format(when): {
        f"accuracy_{when}_mean": ("mean client", "solid"),
        f"accuracy_{when}_worst_decile": ("worst tenth of the clients", "dash"),
    }
    for when in ("before", "after")
} | {
    "Variance of these accuracies": {
        "accuracy_before_variance": ("variance before training", "solid"),
        "accuracy_after_variance": ("variance after training", "dash"),
    }
}
RULE = (
    "Rounds as in McMahan et al. 2017: where the curve of the best value so far comes to the target, "
    "linear between the rounds that were evaluated."
)


def curves(shown: Shown) -> str | None:
    """Accuracy, losses and steps by round, a line a group."""
    figures = [figure for column in CURVES if (figure := _curve(shown, column))]
    if not figures:
        return None
    has_bands = any(len(group.runs) > 1 for group in shown.groups)
    note = (
        f"Lines are means over seeds, bands their {LEVEL:.0%} confidence intervals (Student's t). "
        "A line is thin where some of its runs have ended."
    )
    return shown.legend() + (html.paragraph(note, "quiet") if has_bands else "") + html.charts(figures)


def _curve(shown: Shown, column: str) -> str | None:
    title, unit = CURVES[column]
    lines, said = [], []
    for group in shown.groups:
        whole = curve(group.runs, column)
        if whole.empty:
            continue
        frame = charts.thin(whole)
        band = ("confidence interval", frame["low"], frame["high"])
        until = by_number(whole)[0].index[-1]
        lines.append(Line(group.letter or group.name, frame["mean"], [band], group.color, group.dash, until))
        mean, rounds = whole["mean"], whole.index
        span = f"{mean.iloc[0]:.4g} in round {rounds[0]}, {mean.iloc[-1]:.4g} in round {rounds[-1]}"
        best = (
            f", best {mean.max():.4g} in round {mean.idxmax()}"
            if column == "test_accuracy" and mean.idxmax() != rounds[-1]
            else ""
        )
        said.append(f"{group.prefix}{span}{best}.")
    if not lines:
        return None
    levels = [target.value for target in shown.targets if target.column == column]
    chart = charts.lines(lines, unit, levels=levels, can_diverge="accuracy" not in column)
    return html.figure(title, chart, " ".join(said))


def targets(shown: Shown) -> str | None:
    """In which round each run came to the targets."""
    if not shown.targets:
        return None
    return "".join(_target(shown, target) for target in shown.targets) + html.paragraph(RULE, "quiet")


def _target(shown: Shown, target: Target) -> str:
    frame = summary(shown.runs, target)
    name = f"{target.column} {'≥' if target.is_accuracy else '≤'} {target.value:g}"
    rows: list[list[object]] = []
    for run, row in zip(shown.runs, frame.to_dict("records"), strict=True):
        rounds, seconds, payload = (row[f"{what}_to_target"] for what in ("rounds", "seconds", "bytes"))
        is_there = not math.isnan(rounds)
        cells = [round(rounds, 1), seconds, size(payload)] if is_there else [_missed([run], target), "", ""]
        rows.append([run.name, *cells])
    made = html.table(["run", "rounds", "seconds of rounds", "payload"], rows, name)
    if shown.is_one:
        return made
    means = over_seeds(frame)
    found = {row["group"]: row for row in means[means["measure"] == "rounds_to_target"].to_dict("records")}
    rows = []
    for group in shown.groups:
        row = found[group.name]
        end = Interval(row["mean"], row["low"], row["high"], row["number"])
        rows.append(
            [group.label, str(end) if end.number else _missed(group.runs, target), f"{end.number} of {row['of']}"]
        )
    reached = frame["rounds_to_target"].notna().sum()
    return (
        html.paragraph(f"{reached} of {len(shown.runs)} runs reached {name}.")
        + made
        + html.table(
            ["group", f"mean rounds [{LEVEL:.0%} interval]", "runs that reached it"], rows, f"{name}, by group"
        )
    )


def _missed(runs: Sequence[View], target: Target) -> str:
    """Why runs have no round of a target: they did not come to it, never measured its column, or have lost rows."""
    if any(run.damage for run in runs):
        return "not known, as rows are missing"
    return "not reached" if any(run.rounds[target.column].notna().any() for run in runs) else "not recorded"


def fairness(shown: Shown) -> str | None:
    """The clients' own accuracies, where they were evaluated."""
    figures = [figure for title in FAIRNESS if (figure := _fairness(shown, title))]
    if not figures:
        return None
    names: dict[str, list[str]] = {}
    for called, dash in (style for columns in FAIRNESS.values() for style in columns.values()):
        names[dash] = list(dict.fromkeys([*names.get(dash, []), called]))
    keys = [(html.line_key("#3e4c59", dash), "; ".join(called)) for dash, called in names.items()]
    return shown.legend() + html.legend(keys) + html.charts(figures)


def _fairness(shown: Shown, title: str) -> str | None:
    lines, said = [], []
    for group in shown.groups:
        for column, (called, dash) in FAIRNESS[title].items():
            whole = curve(group.runs, column)
            if whole.empty:
                continue
            frame, until = charts.thin(whole), by_number(whole)[0].index[-1]
            lines.append(Line(f"{group.prefix}{called}", frame["mean"], [], group.color, dash, until))
            said.append(f"{group.prefix}{called} {frame['mean'].iloc[-1]:.4g} in round {frame.index[-1]}.")
    if not lines:
        return None
    return html.figure(title, charts.lines(lines, "" if "Variance" in title else "fraction"), " ".join(said))


def size(number: float) -> str:
    """Bytes for a person."""
    place = min(4, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number / 1000**place:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[place]}"
