"""The page: the paper's numbers, ours, and whether they agree; made from the Parquet files alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from benchmarks.elsewhere import table
from fedsim.statistics import Interval, interval
from mcmahan2017 import plots, variants
from mcmahan2017.dead import DEAD
from mcmahan2017.plan import Cell, Plan, step_of
from mcmahan2017.search import chosen_rate
from mcmahan2017.store import Store

Verdict = Literal["inside", "outside", "searching", "running", "not run", "reached", "not reached"]

_DEAD = (
    "cannot get there, as a ReLU gives zero for every image of both sets: no image changes the outputs any more, and "
    "nothing below has a gradient. This is looked for where a run was interrupted, which is not in the plan; other "
    "runs at such rates went on to their ends."
)
_BANDS = (
    "(The plan argues the bands by 0.85 to 1.18 and 0.48 to 2.08, rounded outwards: the first is 0.84 to the digits "
    "given, and 0.5 is inwards. No verdict depends on it.)"
)
PAPER = "[McMahan et al. 2017](https://arxiv.org/abs/1602.05629)"


@dataclass(frozen=True)
class Outcome:
    """What is known of a cell."""

    cell: Cell
    verdict: Verdict
    rate: float | None = None
    rounds: Interval | None = None
    """To the target, of the seeds of the verdict; None before all are there, or if one has not reached it."""
    ratio: float = math.nan
    num_reached: int = 0
    num_seeds: int = 0
    """Of the verdict."""
    is_at_edge: bool = False
    """The search ended with the best rate at an edge: it had tried as many as it may."""


def outcome(plan: Plan, cell: Cell, store: Store) -> Outcome:
    """Looks at the runs of a cell."""
    done = store.done(cell)
    if not done:
        return Outcome(cell, "not run")
    rate = chosen_rate(plan, cell, done)
    if rate is None:
        return Outcome(cell, "searching")
    tried = {step_of(run.rate) for run in done if run.seed == plan.search_seed}
    is_at_edge = not {step_of(rate) - 1, step_of(rate) + 1} <= tried
    found = [run.rounds_to_target for run in done if run.rate == rate and run.seed in plan.verdict_seeds]
    if len(found) < len(plan.verdict_seeds):
        return Outcome(cell, "running", rate)
    reached = [rounds for rounds in found if not math.isnan(rounds)]
    if len(reached) < len(found):
        verdict: Verdict = "outside" if cell.published else "not reached"
        return Outcome(cell, verdict, rate, num_reached=len(reached), num_seeds=len(found), is_at_edge=is_at_edge)
    rounds = interval(reached)
    if not cell.published:
        return Outcome(cell, "reached", rate, rounds, math.nan, len(reached), len(found), is_at_edge)
    ratio = rounds.mean / cell.published
    low, high = plan.band(cell)
    verdict = "inside" if low <= ratio <= high else "outside"
    return Outcome(cell, verdict, rate, rounds, ratio, len(reached), len(found), is_at_edge)


def write(plan: Plan, store: Store) -> None:
    """Writes README.md and the plots."""
    store.folder.mkdir(parents=True, exist_ok=True)
    outcomes = [outcome(plan, cell, store) for cell in plan.cells]
    plots.write(plan, store, outcomes)
    (store.folder / "README.md").write_text("\n".join(_page(plan, store, outcomes)) + "\n", encoding="utf-8")


def overview(plan: Plan, store: Store) -> list[str]:
    """The README's table: cells of Table 1 with B = 10, by C."""
    columns = (("2NN, IID", "2nn", "iid"), ("2NN, non-IID", "2nn", "shards"), ("CNN, IID", "cnn", "iid"))
    found = {
        (cell.per_round, cell.model, cell.partition): _row(outcome(plan, cell, store))
        for cell in plan.cells
        if (cell.table, cell.batch_size) == (1, 10)
    }
    rows = []
    for per_round in sorted({per_round for per_round, *_ in found}):
        cells = [found[per_round, model, partition] for _, model, partition in columns]
        shown = (value for _, published, ours, ratio, *_ in cells for value in (published, ours, ratio))
        rows.append((f"C = {per_round:g}", *shown))
    heads = (head for title, *_ in columns for head in (f"{title}: paper", "ours", "ratio"))
    return table(("B = 10", *heads), rows)


def _page(plan: Plan, store: Store, outcomes: Sequence[Outcome]) -> Iterator[str]:
    judged = [each for each in outcomes if each.verdict in ("inside", "outside")]
    inside = sum(each.verdict == "inside" for each in judged)
    yield from (
        f"# Tables 1 and 2 of {PAPER}",
        "",
        "Made by `scripts/reproduce_mcmahan2017.py` from the Parquet files beside this page; what was to be run, and "
        "what counts as agreement, was committed before any run in `scripts/mcmahan2017/plan.toml`.",
        "",
        f"**{len(judged)} of {sum(cell.published > 0 for cell in plan.cells)} published numbers have been run to a "
        f"verdict: {inside} inside the band, {len(judged) - inside} outside.** Cells that have not been run say so.",
        "",
        f"Rounds until the test accuracy reaches the target: mean of {len(plan.verdict_seeds)} fresh seeds at the rate "
        "that a search with another seed chose, with its 95 % confidence interval (Student's t: so few seeds make it "
        "wide). The ratio is "
        "ours over the paper's: below 1 is fewer rounds. Bands: "
        f"{_band(plan.bands['small_batches'])} for B = 10 and 50, {_band(plan.bands['whole_shard'])} for B = inf. A "
        f"cell has not reached the target if one of its seeds diverges, or needs more than {plan.cap:g} times the "
        f"published rounds, or {plan.cap_without_published:,} where the paper has none (-).",
        "",
        _BANDS,
        "",
        f"![Ratios]({plots.RATIOS})",
        "",
    )
    for title, model, number in (
        ("Table 1, 2NN: E = 1, target 97 %", "2nn", 1),
        ("Table 1, CNN: E = 5, target 99 %", "cnn", 1),
        ("Table 2, CNN: C = 0.1, target 99 %", "cnn", 2),
    ):
        yield from (f"## {title}", "")
        chosen = [each for each in outcomes if (each.cell.model, each.cell.table) == (model, number)]
        chosen.sort(key=lambda each: _place(each.cell))
        yield from table(("data, E, B, C", "paper", "ours", "ratio", "rate", "verdict"), map(_row, chosen))
        yield ""
    yield from (f"![Accuracy by round]({plots.CURVES})", "")
    if (store.folder / variants.FILE).exists():
        yield from _variants(plan, store)
    if dead := [run for run in store.runs.to_dict("records") if run.get("status") == DEAD]:
        named = (f"{run['cell']} at rate {run['lr']:g} (ended with round {run['rounds']})" for run in dead)
        yield from (f"{' and '.join(named)} {_DEAD}", "")
    if len(store.runs):
        yield from _made("runs of the tables", store.runs)
    if (store.folder / variants.FILE).exists():
        yield from _made("runs with something changed", pd.read_parquet(store.folder / variants.FILE))


def _made(what: str, runs: pd.DataFrame) -> Iterator[str]:
    """How many runs took how long, and on what."""
    hours = runs["seconds"].sum() / 3600
    yield from (f"{len(runs):,} {what}, {hours:.1f} hours of rounds, one process each, pauses included:", "")
    on = runs.reindex(columns=["machine", "versions"]).fillna("").value_counts(sort=False)
    for (machine, versions), number in on.items():
        yield f"- {number:,} " + (f"on {machine}; {versions}" if machine else "whose machine was not recorded")
    yield ""


def _variants(plan: Plan, store: Store) -> Iterator[str]:
    trials = variants.trials(plan)
    first, first_seeds = trials[0].cell, trials[0].seeds
    header = ("changed", "mean", "seeds", "over the paper's")
    yield from (
        "## What explains the difference",
        "",
        f"The 2NN on IID data with B = 10 and C = 0.1 needs {first.published} rounds in the paper. The same cell with "
        f"one thing changed at a time (in the last rows the pixels and the rate), {len(first_seeds)} seeds each:",
        "",
        *table(header, variants.rows(store.folder, [trial for trial in trials if trial.cell == first])),
        "",
        "The last batch explains nothing: 600 examples are 60 whole batches of 10. Neither does the interpolation: it "
        "takes less than one round off.",
        "",
    )
    yield from (
        "Pixels in -1..1 in other cells, at the three rates with which a search starts, and the next where the best "
        "was at an edge. Which of them is best is seen on the same seeds, unlike in the tables above. With the CNN "
        "the initialisation is changed too, at the rate that the search chose.",
        "",
    )
    for cell in dict.fromkeys(trial.cell for trial in trials if trial.cell != first):
        rows = list(variants.rows(store.folder, [trial for trial in trials if trial.cell == cell]))
        if rows:
            data, ours = "IID" if cell.partition == "iid" else "non-IID", outcome(plan, cell, store).rounds
            said = f"; with pixels in 0..1 ours are {ours.mean:.1f}" if ours else ""
            named = f"{cell.model.upper()}, {data}, B = {cell.batch_size or 'inf'}, C = {cell.per_round:g}"
            about = f"{named}: {cell.published:,} rounds in the paper{said}:"
            yield from (about, "", *table(header, rows), "")


def _row(each: Outcome) -> tuple[str, ...]:
    cell = each.cell
    is_known = each.verdict not in ("searching", "running", "not run")
    ours = f"{each.num_reached} of {each.num_seeds} seeds reached it" if is_known else "-"
    if each.rounds:
        ours = variants.rounds_text(each.rounds)
    data = "IID" if cell.partition == "iid" else "non-IID"
    return (
        f"{data}, {cell.local_epochs}, {cell.batch_size or 'inf'}, {cell.per_round:g}",
        f"{cell.published:,}" if cell.published else "-",
        ours,
        "" if math.isnan(each.ratio) else f"{each.ratio:.2f}",
        "" if each.rate is None else f"{each.rate:g}" + (" (edge)" if each.is_at_edge else ""),
        f"**{each.verdict}**" if each.verdict == "outside" else each.verdict,
    )


def _place(cell: Cell) -> tuple[object, ...]:
    return cell.partition, cell.batch_size, cell.local_epochs, cell.per_round


def _band(band: tuple[float, float]) -> str:
    return f"{band[0]:g} to {band[1]:g}"
