"""Faults injected into runs at drawn points: `scripts/reliability.py` with other seeds than the published ones."""

from __future__ import annotations

import pandas as pd
import pytest

import reliability
from faults import actors, costs, drivers
from faults.outcome import EQUAL, compared, reference_of
from faults.ray_nodes import NO_NAMESPACES

pytestmark = pytest.mark.long

SEED = 20261125


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", reliability.FAULTS)
def test_a_fault_is_survived(name, tmp_path):
    if name == "node_cut_off" and NO_NAMESPACES:
        pytest.skip(f"a network namespace for each node {NO_NAMESPACES}")
    outcomes = reliability.FAULTS[name](SEED, tmp_path)
    assert outcomes
    assert [outcome for outcome in outcomes if not outcome.is_survived] == []


@pytest.mark.ray
def test_actors_that_die_or_hang_at_drawn_points_change_nothing(tmp_path):
    config = actors.SMALL.override({"rounds": 12, "failures.timeout_s": 2.0})
    points = actors.drawn(config, 0.1, SEED, actors.WAYS)
    assert len({point.way for point in points}) > 2
    run, num_harmed = actors.run_with(config, points, tmp_path)
    assert num_harmed == len(points)
    assert run.rounds["num_retries"].sum() >= len(points)
    assert compared(run, reference_of(config)) == EQUAL


@pytest.mark.parametrize("measure", [costs.durable, costs.written])
def test_the_cost_of_files_can_be_measured(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "ROUNDS", 6)
    monkeypatch.setattr(costs, "T2", drivers.SMALL.override({"placement.mode": "serial"}))
    rows = measure(tmp_path)
    assert (rows["ratio"] > 0).all()
    assert len(rows) >= 3


@pytest.mark.parametrize("path", sorted(reliability.PUBLISHED.iterdir()), ids=lambda path: path.name)
def test_what_is_published_has_no_paths_of_a_machine(path):
    text = pd.read_parquet(path).to_csv() if path.suffix == ".parquet" else path.read_text()
    assert not any(folder in text for folder in ("/tmp/", "/home/", "/root/"))


def test_what_differs_is_told():
    """Else every fault would be survived."""
    run = reference_of(drivers.SMALL.override({"rounds": 2}))
    other = reference_of(drivers.SMALL.override({"rounds": 2, "training.lr": 0.1000001}))
    assert compared(run, run) == EQUAL
    assert compared(other, run).startswith("round 1: ")
    assert compared(reference_of(drivers.SMALL.override({"rounds": 1})), run) == "2 rows instead of 3"


def test_the_page_counts_what_the_files_have(tmp_path):
    rows = [("actors", EQUAL, True), ("actors", "refused: no", True), ("drivers", "lost", False)]
    frame = pd.DataFrame(rows, columns=["name", "outcome", "is_survived"])
    frame = frame.assign(date="2026-01-01", machine="m", versions="v", git_commit="c")
    reliability.publish(tmp_path, "faults.parquet", frame, list(reliability.FAULTS))
    page = (tmp_path / "README.md").read_text()
    assert "**2 of 3 injected faults survived**" in page
    assert "(`actors`) | 2 | 1 | 1 | 0 | 2026-01-01 |" in page
    assert "(`drivers`) | 1 | 0 | 0 | 1 | 2026-01-01 |" in page
    again = frame[frame["name"] == "drivers"].assign(outcome=EQUAL, is_survived=True)
    reliability.publish(tmp_path, "faults.parquet", again, list(reliability.FAULTS))
    assert "**3 of 3 injected faults survived**" in (tmp_path / "README.md").read_text()
