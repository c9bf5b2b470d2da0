"""The failure policy: a pure function, so every case can be tried."""

from __future__ import annotations

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from fedsim.failures import Cause, Losses, decide

CAUSES = get_args(Cause)
budgets = st.integers(0, 5)
on_exhausted = st.sampled_from(["stop", "drop"])
histories = st.lists(st.sampled_from([cause for cause in CAUSES if cause != "bug"]), max_size=30)


def decisions(history, max_retries, then):
    """What is decided after each loss, until something else than another try."""
    losses, made = Losses(), []
    for cause in history:
        losses = losses.after(cause)
        made.append(decide(cause, losses, max_retries, then))
        if made[-1] != "retry":
            break
    return made


@given(budgets, on_exhausted, histories)
def test_each_cause_has_a_budget_of_its_own(max_retries, then, history):
    counts = dict.fromkeys(CAUSES, 0)
    for cause, decision in zip(history, decisions(history, max_retries, then), strict=False):
        counts[cause] += 1
        assert (decision == "retry") == (counts[cause] <= max_retries)


@given(budgets, on_exhausted, histories)
def test_work_is_lost_at_most_as_often_as_the_budgets_allow(max_retries, then, history):
    assert decisions(history, max_retries, then).count("retry") <= 4 * max_retries


@given(budgets, on_exhausted, histories, st.sampled_from(CAUSES))
def test_a_bug_stops_whatever_happened_before_and_is_no_loss(max_retries, then, history, cause):
    losses = Losses()
    for lost in history:
        losses = losses.after(lost)
    assert decide("bug", losses, max_retries, then) == "stop"
    assert losses.after("bug") == losses
    assert losses.total == len(history)
    assert losses.of(cause) == history.count(cause)


@given(budgets, on_exhausted)
def test_only_who_asked_for_it_goes_on_without_a_client_and_never_for_the_clocks_sake(max_retries, then):
    for cause in CAUSES:
        last = decisions([cause] * (max_retries + 1), max_retries, then)[-1]
        assert last == ("stop" if cause in ("bug", "timeout") else then), cause


def test_the_default_tries_a_client_four_times():
    assert decisions(["actor"] * 9, 3, "drop") == ["retry", "retry", "retry", "drop"]
    assert decisions(["actor", "node", "actor", "memory", "actor", "node", "actor"], 3, "stop")[-1] == "stop"
