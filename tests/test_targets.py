"""Targets: what they accept, when a round has reached one, and where a curve does, by the paper's rule."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedsim
from fedsim import cli, recording
from fedsim.errors import FedsimWarning, InputError
from fedsim.experiment import prepare
from fedsim.targets import Target, targets
from tests.helpers import SERIAL, assert_same_results, results_of

ACCURACY = Target("test_accuracy", 0.97)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.96, 0.98], 1.5),  # half of the way from 0.96 to 0.98
        ([0.1, 0.96, 0.95, 0.98], 2.5),  # the curve of the best so far is at 0.96 when round 3 comes
        ([0.1, 0.97], 1.0),  # exactly there
        ([0.99, 0.1], 0.0),  # from the start
        ([0.1, 0.5, 0.9], None),
        ([0.1, math.nan, math.nan, 0.97], 3.0),  # rounds that were not evaluated are no points
        ([0.1, math.nan, 0.94, math.nan, 1.0], 3.0),
        ([], None),
        ([math.nan], None),
    ],
)
def test_crossing_by_hand(values, expected):
    found = ACCURACY.crossing(range(len(values)), values)
    assert found is None if expected is None else found == pytest.approx(expected)


def test_a_loss_that_was_infinite_is_there_at_once():
    assert Target("test_loss", 0.5).crossing([0, 1], [math.inf, 0.4]) == 1.0


def test_text_has_every_digit():
    """Else an interrupted run would stop in another round."""
    for value in (1.9395019445404769, 0.9999999, 1e-17):
        assert Target.parse(str(Target("test_loss", value))).value == value


@pytest.mark.parametrize("value", ["0.9", None, True])
def test_a_value_that_is_no_number(value):
    with pytest.raises(InputError, match="give a number"):
        Target("test_accuracy", value)


@pytest.mark.parametrize("value", [1, np.float64(1), np.float32(1), np.int64(1), torch.tensor(1.0)])
def test_any_kind_of_number_is_the_same_target(value):
    """Its text is what an interrupted run goes on with."""
    assert str(Target("train_loss", value)) == "train_loss=1.0"


def test_what_is_never_measured_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"never reached without evaluation\.clients=true"):
        fedsim.run(SERIAL, results=tmp_path, stop_at={"accuracy_after_mean": 0.1})
    with pytest.raises(InputError, match="never reached"):
        fedsim.sweep(SERIAL, results=tmp_path, stop_at={"accuracy_after_mean": 0.1})
    assert not list(tmp_path.iterdir())
    run = fedsim.run(
        SERIAL.override({"evaluation.clients": True}), results=tmp_path, stop_at={"accuracy_after_mean": 0.1}
    )
    assert len(run.rounds) == 2


def test_a_loss_is_to_fall():
    target = Target("test_loss", 0.5)
    assert target.crossing([0, 1, 2, 3], [2.0, 1.0, 1.5, 0.0]) == pytest.approx(2.5)
    assert target.is_reached({"test_loss": 0.5})
    assert not target.is_reached({"test_loss": 0.6})


def test_places_may_be_seconds():
    assert ACCURACY.crossing([10.0, 30.0], [0.96, 0.98]) == pytest.approx(20.0)


@given(st.lists(st.floats(0, 1), max_size=30))
def test_crossing_is_there_exactly_if_a_round_is_and_at_most_a_round_before(values):
    reached = [i for i, value in enumerate(values) if ACCURACY.is_reached({"test_accuracy": value})]
    found = ACCURACY.crossing(range(len(values)), values)
    assert (found is not None) == bool(reached)
    if found is not None:
        assert reached[0] - 1 <= found <= reached[0]
        assert found == ACCURACY.crossing(
            range(reached[0] + 1), values[: reached[0] + 1]
        )  # what follows is nothing to it


def test_a_round_without_evaluation_has_not_reached_it():
    assert not ACCURACY.is_reached({"test_accuracy": None})
    assert ACCURACY.is_reached({"test_accuracy": 0.97})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("test_accuracy", "write it as"),
        ("test_accuracy=", "write it as"),
        ("test_accuracy=high", "write it as"),
        ("accuracy=0.9", "'accuracy' cannot be a target; there are train_loss, test_loss, test_accuracy"),
        ("round_s=1", "cannot be a target"),
        ("=0.9", "cannot be a target"),
        ("test_accuracy=97", "a fraction, above 0 and at most 1"),
        ("test_accuracy=0", "a fraction, above 0"),
        ("test_accuracy=nan", "cannot be reached"),
        ("test_loss=inf", "a finite number"),
    ],
)
def test_what_is_no_target(text, said):
    with pytest.raises(InputError, match=said):
        Target.parse(text)


def test_text_and_back():
    assert Target.parse(" test_accuracy = 0.97 ") == ACCURACY
    assert Target.parse(str(ACCURACY)) == ACCURACY
    assert targets({"test_accuracy": 0.97}) == [ACCURACY]
    with pytest.raises(InputError, match=r"0\.97 is no target: give a column and its value, such as \{'test_accuracy'"):
        targets(0.97)


LONG = SERIAL.override({"rounds": 12, "checkpoint.every_s": 0, "checkpoint.keep": "all"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fedsim.run(LONG, results=tmp_path_factory.mktemp("whole"))


@pytest.fixture
def goal(whole):
    """An accuracy that the run reaches in round 4, and not before; and that round."""
    best = whole.rounds["test_accuracy"].cummax()
    round = next(r for r in range(3, 12) if best[r] > best[r - 1])
    return {"test_accuracy": float(best[round])}, round


def test_a_run_stops_when_it_is_there(whole, goal, tmp_path):
    stop_at, round = goal
    run = fedsim.run(LONG, results=tmp_path, stop_at=stop_at)
    assert run.status == "finished"
    assert run.rounds["round"].tolist() == list(range(round + 1))
    assert repr(run.rounds["weights_sha256"].tolist()) == repr(whole.rounds["weights_sha256"].tolist()[: round + 1])
    assert run.info["stop_at"] == [f"test_accuracy={stop_at['test_accuracy']!r}"]
    assert len(fedsim.run(LONG, results=None, stop_at=stop_at).rounds) == round + 1


def test_a_run_that_has_stopped_is_finished(goal, tmp_path):
    path = fedsim.run(LONG, results=tmp_path, stop_at=goal[0]).path
    before = (path / "run.json").read_bytes()
    assert len(fedsim.resume(path).rounds) == goal[1] + 1
    assert (path / "run.json").read_bytes() == before


def test_it_goes_further_when_asked_to(whole, goal, tmp_path):
    path = fedsim.run(LONG, results=tmp_path, stop_at=goal[0]).path
    run = fedsim.resume(path, changes={"rounds": 12})
    assert run.info["stop_at"] == []
    assert run.status == "finished"
    assert_same_results(run, whole)


SELDOM = LONG.override({"evaluation.every": 5})


@pytest.fixture(scope="module")
def early(whole):
    """A loss that the run reaches in round 3, which is not tested, and not before."""
    losses = whole.rounds["train_loss"]
    assert losses[3] < losses[1:3].min()
    return {"train_loss": float(losses[3])}


def test_the_round_that_ends_a_run_is_tested(whole, early, tmp_path):
    run = fedsim.run(SELDOM, results=tmp_path, stop_at=early)
    assert run.rounds["test_accuracy"].notna().tolist() == [True, False, False, True]
    last, same = run.rounds.iloc[3], whole.rounds.iloc[3]
    assert (last["test_accuracy"], last["test_loss"]) == (same["test_accuracy"], same["test_loss"])
    assert last["evaluate_s"] > 0
    assert last["round_s"] >= last["fit_s"] + last["evaluate_s"]
    assert results_of(fedsim.run(SELDOM, results=None, stop_at=early)) == results_of(run)
    assert fedsim.verify(run.path, rounds="all").is_equal
    assert fedsim.verify(run.path).is_equal


@pytest.mark.parametrize("round", [3, 4])
def test_a_client_of_it_or_of_the_next_one_can_be_replayed(early, tmp_path, round):
    """Also where that round has to be computed again."""
    run = fedsim.run(SELDOM, results=tmp_path, stop_at=early)
    for saved in (run.path / "checkpoint").iterdir():
        saved.unlink()
    client = prepare(SELDOM).sample(round)[0]
    assert fedsim.replay(run.path, round=round, client=client).differences == ()


def test_and_is_not_where_it_goes_further(early, tmp_path):
    path = fedsim.run(SELDOM, results=tmp_path, stop_at=early).path
    further = fedsim.resume(path, changes={"rounds": 12})
    assert_same_results(further, fedsim.run(SELDOM, results=tmp_path, name="whole"))
    assert fedsim.verify(path, rounds="all").is_equal


@pytest.mark.parametrize("done", [0, 2, 3])
def test_and_is_where_it_was_interrupted_before(early, tmp_path, done):
    expected = results_of(fedsim.run(SELDOM, results=tmp_path, stop_at=early))
    path = tmp_path / "broken"
    with recording.Recording.of(SELDOM, results=tmp_path, name="broken", stop_at=targets(early)) as broken:
        for record in broken:
            if record.round == done:
                break
    text = (path / "run.json").read_text()
    (path / "run.json").write_text(text.replace('"status": "finished"', '"status": "running"'))
    assert results_of(fedsim.resume(path)) == expected


@pytest.mark.parametrize("done", [0, 2, "all"])
def test_an_interrupted_run_still_stops(goal, tmp_path, done):
    """Also one that was killed after its last round was written, and before it was said to be finished."""
    stop_at, round = goal
    expected = fedsim.run(LONG, results=tmp_path, stop_at=stop_at)
    path = tmp_path / "broken"
    with recording.Recording.of(LONG, results=tmp_path, name="broken", stop_at=targets(stop_at)) as broken:
        for record in broken:
            if record.round == (round if done == "all" else done):
                break
    assert fedsim.load_run(path).status == ("finished" if done == "all" else "interrupted")
    text = (path / "run.json").read_text()
    (path / "run.json").write_text(text.replace('"status": "finished"', '"status": "running"'))
    run = fedsim.resume(path)
    assert run.status == "finished"
    assert results_of(run) == results_of(expected)


def test_a_damaged_run_that_had_stopped_stops_there_again(goal, tmp_path):
    path = fedsim.run(LONG, results=tmp_path, stop_at=goal[0]).path
    expected = results_of(fedsim.load_run(path))
    part = max((path / "rounds.parquet").glob("part-0*"))
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.warns(FedsimWarning, match="damaged"):
        run = fedsim.resume(path)
    assert results_of(run) == expected


def test_on_the_command_line(goal, tmp_path, capsys):
    stop_at, round = goal
    (tmp_path / "long.toml").write_text(LONG.to_toml())
    words = ["run", str(tmp_path / "long.toml"), "--results", str(tmp_path), "--quiet"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--name", "short", "--stop-at", f"test_accuracy={stop_at['test_accuracy']!r}"])
    assert ended.value.code == 0
    assert f"after {round} rounds" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["resume", str(tmp_path / "short")])
    assert ended.value.code == 0
    assert f"finished with test_accuracy={stop_at['test_accuracy']!r}, or all 12 rounds" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--name", "wrong", "--stop-at", "test_accuracy=97"])
    assert ended.value.code == 2
    assert not (tmp_path / "wrong").exists()
