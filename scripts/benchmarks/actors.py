"""The page's sections on actors: how they start, and what hundreds of them cost. See `report`."""

from __future__ import annotations

import pandas as pd

from benchmarks.processes import FORK_SERVER
from benchmarks.section import Check, Section, cells, medians, per_run, spreads
from benchmarks.systems import Measured
from benchmarks.tasks import ACTOR_PER_CLIENT, FORKED, PACKED, PLAIN, UNSTACKED, Task

UP = (
    "actors up: from when the driver begins to start its actors until the last one has loaded data and model. What "
    "comes before, the driver's imports and the start of Ray, during which plain workers (one a core) or the fork "
    "server import torch already, is only in the seconds from the command to the start of the first evaluation"
)
MEMORY = (
    "memory: of each process (PSS: what several share is divided among them), read once, after the last round and "
    "before any actor ends; fork server: with launchers that are still there; Ray's own: with workers that nobody uses"
)


def start(section: Section, name: str, task: Task, measured: Measured) -> None:
    """Plain and forked actors: seconds until they are up, and their memory."""
    frame, memory = measured.rounds, measured.memory
    up_s, start_s = medians(frame, "up_s"), medians(frame, "start_s")
    of_actor = memory.loc[memory["role"] == "actors"].groupby("system", sort=False)["bytes"]
    largest, together = of_actor.max(), _together(memory)
    section.table(
        "system",
        {
            "actors": cells(together["number"], "{:.0f}"),
            "actors up, median (s)": cells(up_s, "{:.2f}"),
            "min to max (s)": spreads(per_run(frame, "up_s"), "{:.2f}"),
            "from the command to the first evaluation (s)": cells(start_s, "{:.2f}"),
            "an actor, mean (MB)": cells(of_actor.mean() / 1e6, "{:,.0f}"),
            "the largest (MB)": cells(largest / 1e6, "{:,.0f}"),
            "all actors (MB)": cells(together["actors"] / 1e6, "{:,.0f}"),
            "fork server (MB)": cells(together[FORK_SERVER] / 1e6, "{:,.0f}"),
            "driver (MB)": cells(together["driver"] / 1e6, "{:,.0f}"),
            "Ray's own (MB)": cells(together["ray"] / 1e6, "{:,.0f}"),
            "everything (MB)": cells(together["everything"] / 1e6, "{:,.0f}"),
        },
    )
    section.say(UP)
    section.say(MEMORY)
    number, ratio, most = together["number"][FORKED], up_s[FORKED] / up_s[PLAIN], task.limits["ratio"]
    what = f"seconds until {number:.0f} actors are up, forked over plain"
    section.state(Check(what, f"{ratio:.2f}", f"at most {most:g}", ratio <= most))
    mb, most = float(largest[FORKED]) / 1e6, task.limits["actor_mb"]
    section.state(Check("memory of the largest forked actor", f"{mb:,.0f} MB", f"under {most:g} MB", mb < most))
    everything = together["everything"]
    section.say(
        f"from the command to the first evaluation, forked over plain: **{start_s[FORKED] / start_s[PLAIN]:.2f}**; "
        f"everything in memory: **{everything[FORKED] / everything[PLAIN]:.2f}**"
    )


def hundreds(section: Section, name: str, task: Task, measured: Measured) -> None:
    """An actor for each of hundreds of clients, against few actors that hold them all."""
    frame, memory = measured.rounds, measured.memory
    round_s, up_s = medians(frame, "round_s"), medians(frame, "up_s")
    used_gb = frame.groupby("system", sort=False)["used_bytes"].max() / 1e9
    together = _together(memory)
    section.table(
        "system",
        {
            "actors": cells(together["number"], "{:.0f}"),
            "actors up, median (s)": cells(up_s, "{:.1f}"),
            "from the command to the first evaluation (s)": cells(medians(frame, "start_s"), "{:.1f}"),
            "round, median (s)": cells(round_s, "{:.3f}"),
            "min to max of the runs (s)": spreads(per_run(frame, "round_s"), "{:.3f}"),
            "all actors (GB)": cells(together["actors"] / 1e9, "{:.2f}"),
            "everything (GB)": cells(together["everything"] / 1e9, "{:.2f}"),
            "the machine's peak (GB)": cells(used_gb, "{:.2f}"),
        },
    )
    section.say(UP)
    section.say(MEMORY)
    section.say(
        "the machine's peak: available memory before the run, less the least during it; whatever else runs counts too"
    )
    number, seconds, most = together["number"][ACTOR_PER_CLIENT], up_s[ACTOR_PER_CLIENT], task.limits["up_s"]
    what = f"seconds until {number:.0f} actors are up"
    section.state(Check(what, f"{seconds:.1f} s", f"at most {most:g} s", seconds <= most))
    used, most = float(used_gb[ACTOR_PER_CLIENT]), task.limits["used_gb"]
    what = f"the machine's peak with {number:.0f} actors"
    section.state(Check(what, f"{used:.1f} GB", f"under {most:g} GB", used < most))
    section.state(_same_bits(frame))
    more = 1e3 * (round_s[ACTOR_PER_CLIENT] - round_s[UNSTACKED])
    most = task.limits["overhead_ms"]
    what = f"round with an actor per client, over {UNSTACKED}: the same work, in as many processes as there are cores"
    section.state(Check(what, f"{more:+.0f} ms", f"at most {most:+g} ms", more <= most))
    outside = medians(frame.assign(rest=frame["round_s"] - frame["fit_s"] - frame["evaluate_s"]), "rest")
    rest = 1e3 * outside[ACTOR_PER_CLIENT]
    what = "round with an actor per client, outside of fit and evaluate"
    section.state(Check(what, f"{rest:.1f} ms", f"at most {most:g} ms", rest <= most))
    for other in (PACKED, UNSTACKED):
        times = round_s[ACTOR_PER_CLIENT] / round_s[other]
        section.say(f"a round with an actor per client takes **{times:.2f}** times as long as {other}")


def _together(memory: pd.DataFrame) -> pd.DataFrame:
    """Of each system, medians over its runs: bytes of each role, of `everything`, and the `number` of actors."""
    runs = memory.groupby(["system", "repetition", "role"], sort=False)["bytes"]
    of_runs = runs.sum().unstack("role").reindex(columns=["driver", "actors", FORK_SERVER, "ray"]).fillna(0.0)
    of_runs = of_runs.assign(everything=of_runs.sum(axis=1), number=runs.count().unstack("role")["actors"])
    return of_runs.groupby("system", sort=False).median()


def _same_bits(frame: pd.DataFrame) -> Check:
    """Whether every round ended in the same weights in all systems: run r of each has seed r."""
    hashes = frame.pivot(index=["repetition", "round"], columns="system", values="weights_sha256")
    equal = int((hashes.eq(hashes[ACTOR_PER_CLIENT], axis=0)).all(axis=1).sum())
    is_equal = equal == len(hashes)
    measured = f"{'yes' if is_equal else 'no'}: {equal} of {len(hashes)} rounds"
    return Check("same bits as packed", measured, "all rounds", is_equal)
