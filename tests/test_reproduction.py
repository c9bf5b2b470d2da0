"""scripts/reproduce_mcmahan2017.py: the plan is the paper's, and the search does what the plan says."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.experiment import prepare
from mcmahan2017 import plan as plans
from mcmahan2017.search import Done, chosen_rate, next_tasks

PLAN = plans.read()
CELLS = {cell.name: cell for cell in PLAN.cells}
CELL = CELLS["table1-2nn-iid-E1-B10-C0.1"]


def test_all_cells_are_there_once():
    """Table 1 has 2 models x 2 partitions x 2 batch sizes x 5 cohorts, Table 2 has 9 rows x 2 partitions."""
    assert len(PLAN.cells) == len(CELLS) == 40 + 18
    assert sum(cell.published == 0 for cell in PLAN.cells) == 5  # "five large-batch runs did not reach the target"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("table1-2nn-iid-E1-Binf-C0.0", 1455),
        ("table1-2nn-shards-E1-B10-C1.0", 380),
        ("table1-2nn-shards-E1-Binf-C0.5", 0),
        ("table1-cnn-iid-E5-B10-C0.5", 18),
        ("table1-cnn-shards-E5-Binf-C0.5", 1067),
        ("table2-cnn-iid-E1-Binf-C0.1", 626),
        ("table2-cnn-shards-E20-B50-C0.1", 426),
    ],
)
def test_some_numbers_of_the_paper(name, published):
    assert CELLS[name].published == published


@pytest.mark.mnist
@pytest.mark.parametrize(("name", "cohort", "labels"), [("iid", 10, 10), ("shards", 10, 2)])
def test_the_protocol_is_the_papers(name, cohort, labels):
    x = prepare(CELLS[f"table1-2nn-{name}-E1-B10-C0.1"].config(0.1, 0, 5))
    assert (x.layout.num_values, x.cohort_size) == (199_210, cohort)
    assert x.partition.num_examples.tolist() == [600] * 100
    found = [len(set(x.dataset.train_labels[x.partition.shard(client)])) for client in range(100)]
    # a shard may cross from one label to the next
    assert max(found) <= (10 if labels == 10 else 4)
    assert sorted(found)[50] == labels


@pytest.mark.parametrize(("per_round", "expected"), [(0.0, 1), (0.1, 10), (0.5, 50), (1.0, 100)])
def test_cohorts(per_round, expected):
    x = prepare(CELLS[f"table1-2nn-iid-E1-B10-C{per_round}"].config(0.1, 0, 5).override({"data.dataset": "synthetic"}))
    assert x.cohort_size == expected


def test_caps():
    assert PLAN.max_rounds(CELL) == math.ceil(1.5 * 87)
    assert PLAN.max_rounds(CELLS["table1-2nn-iid-E1-Binf-C1.0"]) == 2000


def test_rates_are_steps_of_a_third_of_ten():
    rates = [plans.rate_at(step) for step in range(-4, 4)]
    assert rates == [0.00464, 0.01, 0.0215, 0.0464, 0.1, 0.215, 0.464, 1.0]
    assert [plans.step_of(rate) for rate in rates] == list(range(-4, 4))
    assert {cell.rate for cell in PLAN.cells} <= set(rates)


def test_cheap_cells_come_first():
    costs = [PLAN.cost_s(cell) for cell in PLAN.cells]
    assert costs == sorted(costs)


def done(rate, rounds=math.nan, *, seed=0, accuracy=0.9):
    return Done(rate, seed, rounds, accuracy)


def one(runs):
    (task,) = next_tasks(PLAN, CELL, runs)
    return task.phase, task.rate, task.seed, task.rounds


def test_the_search_by_hand():
    assert one([]) == ("search", 0.1, 0, 131)
    runs = [done(0.1, 57.3)]
    assert one(runs) == ("search", 0.215, 0, 58)  # as many rounds as the best so far
    runs += [done(0.215, 38.1)]
    assert one(runs) == ("search", 0.0464, 0, 39)
    runs += [done(0.0464)]
    assert one(runs) == ("search", 0.464, 0, 39)  # the best was at the edge
    assert chosen_rate(PLAN, CELL, runs) is None
    runs += [done(0.464)]
    assert chosen_rate(PLAN, CELL, runs) == 0.215
    tasks = next_tasks(PLAN, CELL, runs)
    assert [(task.phase, task.rate, task.seed, task.rounds) for task in tasks] == [
        ("verdict", 0.215, seed, 131) for seed in (1, 2, 3)
    ]
    runs += [done(0.215, 40.0, seed=1), done(0.215, seed=3)]
    assert [task.seed for task in next_tasks(PLAN, CELL, runs)] == [2]
    assert next_tasks(PLAN, CELL, [*runs, done(0.215, 41.0, seed=2)]) == []


def test_where_none_gets_there_the_nearest_is_chosen():
    runs = [done(0.0464, accuracy=0.7), done(0.1, accuracy=0.8), done(0.215, accuracy=0.75)]
    assert chosen_rate(PLAN, CELL, runs) == 0.1
    assert next_tasks(PLAN, CELL, runs)[0].rounds == 131


@given(st.integers(-7, 7), st.floats(1, 200))
def test_the_search_ends_and_finds_the_best(best_step, scale):
    """With rounds that fall and rise again along the rates, wherever the least is."""
    runs: list[Done] = []
    while not (found := chosen_rate(PLAN, CELL, runs)):
        (task,) = next_tasks(PLAN, CELL, runs)
        assert task.rate not in {run.rate for run in runs}
        rounds = scale * (1 + abs(plans.step_of(task.rate) - best_step))
        runs.append(done(task.rate, rounds if rounds <= task.rounds else math.nan, accuracy=1 / rounds))
    assert len(runs) <= PLAN.max_rates
    if len(runs) < PLAN.max_rates:
        assert plans.step_of(found) == best_step
