"""What runs came to: hand-computed rows, groups of seeds, paired differences."""

import math

import numpy as np
import pandas as pd
import pytest

import fedsim
from fedsim import summaries
from fedsim.errors import InputError
from fedsim.groups import groups, one_a_seed
from fedsim.targets import Target
from tests.helpers import SERIAL


class Stub:
    """A run of these accuracies, each round taking 2 s and 100 + 50 bytes; of other weights with other parts."""

    def __init__(self, run, accuracies, parts="", **changes):
        self.name, self.status = run, "finished"
        self.config = fedsim.Config().override(changes)
        self._accuracies = accuracies
        self.info, self._parts = {}, parts

    @property
    def rounds(self):
        number = len(self._accuracies)
        return pd.DataFrame(
            {
                "round": range(number),
                "weights_sha256": [f"{self._parts}{round}" for round in range(number)],
                "test_accuracy": self._accuracies,
                "test_loss": [math.nan] * number,
                "round_s": [2.0] * number,
                "bytes_down": [0, *[100] * (number - 1)][:number],
                "bytes_up": [0, *[50] * (number - 1)][:number],
            }
        )


def test_a_row_by_hand():
    (row,) = summaries.summary([Stub("a", [0.1, 0.6, 0.8, 0.7], seed=3)], Target("test_accuracy", 0.7)).to_dict(
        "records"
    )
    assert row == {
        "run": "a",
        "group": "mnist",
        "seed": 3,
        "status": "finished",
        "rounds": 3,
        "clients_evaluated": False,
        "final_accuracy": 0.7,
        "final_round": 3,
        "best_accuracy": 0.8,
        "best_round": 2,
        "seconds": 8.0,
        "rounds_to_target": pytest.approx(1.5),
        "seconds_to_target": pytest.approx(5.0),  # the ends of rounds 1 and 2 are after 4 and 6 s
        "bytes_to_target": pytest.approx(225.0),
    }


def test_what_is_not_reached_is_nan():
    frame = summaries.summary([Stub("a", [0.1, math.nan, 0.6])], Target("test_accuracy", 0.7))
    assert frame[["rounds_to_target", "seconds_to_target", "bytes_to_target"]].isna().all(axis=None)
    assert "rounds_to_target" not in summaries.summary([Stub("a", [0.1])])


def test_a_run_without_rounds_has_a_row():
    (row,) = summaries.summary([Stub("a", [])], Target("test_accuracy", 0.7)).to_dict("records")
    assert row["rounds"] == 0
    assert math.isnan(row["final_accuracy"])
    assert math.isnan(row["rounds_to_target"])


def test_groups_are_named_after_what_differs():
    runs = [
        Stub("a", [], **{"training.lr": 0.1, "seed": 0}),
        Stub("b", [], **{"training.lr": 0.1, "seed": 1, "placement.mode": "serial", "name": "other"}),
        Stub("c", [], **{"training.lr": 0.2, "clients.per_round": 5}),
    ]
    found = groups(runs)
    assert {label: [run.name for run in members] for label, members in found.items()} == {
        "clients.per_round=all, training.lr=0.1": ["a", "b"],
        "clients.per_round=5, training.lr=0.2": ["c"],
    }


def test_own_parts_and_numbers_of_rounds_make_groups():
    runs = [Stub("a", []), Stub("b", [], seed=1), Stub("c", [], rounds=9), Stub("d", [], **{"placement.threads": 2})]
    runs[1].info = {"own": {"model": "mine.make"}}
    assert list(groups(runs)) == [
        "rounds=5, placement.threads=1",
        "rounds=5, placement.threads=1, own model=mine.make",
        "rounds=9, placement.threads=1",
        "rounds=5, placement.threads=2",
    ]


def test_runs_of_one_seed_with_other_weights_are_of_two_groups():
    """An edited model has the name that it had: what it computed tells the two apart, seed by seed."""
    runs = [
        Stub("old-0", [0.1, 0.2]),
        Stub("old-1", [0.1, 0.2], seed=1),
        Stub("new-0", [0.1, 0.4], "new "),
        Stub("again-0", [0.1, 0.2, 0.3]),
        Stub("new-1", [0.1, 0.4], "new ", seed=1),
        Stub("new-2", [0.1, 0.4], "new ", seed=2),
        Stub("other", [0.1], rounds=9),
    ]
    for run in runs:
        run.info = {"model": {"num_values": 2 if run._parts else 1}}
    assert {label: [run.name for run in members] for label, members in groups(runs).items()} == {
        "rounds=5 (1: old-0)": ["old-0", "old-1", "again-0"],
        "rounds=5 (2: new-0)": ["new-0", "new-1", "new-2"],
        "rounds=9": ["other"],
    }
    means = summaries.over_seeds(summaries.summary(runs)).query("measure == 'final_accuracy'").set_index("group")
    assert means["number"].tolist() == [2, 3, 1]
    assert means["mean"].tolist() == pytest.approx([0.25, 0.4, 0.1])


@pytest.mark.parametrize("order", [[0, 1, 4, 2, 3], [0, 3, 1, 2, 4], [4, 2, 0, 3, 1]])
def test_an_edited_part_is_told_apart_also_where_its_first_seed_was_not_run_before(order):
    every = [(name, seed) for name, seeds in (("old", (1, 2)), ("new", (1, 2, 0))) for seed in seeds]
    runs = [Stub(f"{name}-{seed}", [0.1, 0.2], name, seed=seed) for name, seed in (every[place] for place in order)]
    for run in runs:
        run.info = {"model": {"num_values": {"old": 1, "new": 2}[run._parts]}}
    found = [{run.name for run in members} for members in groups(runs).values()]
    assert {frozenset(names) for names in found} == {
        frozenset(["old-1", "old-2"]),
        frozenset(["new-0", "new-1", "new-2"]),
    }
    assert [run.name for members in groups(runs[:1] * 2).values() for run in members] == [runs[0].name] * 2


def test_data_of_each_seed_are_of_one_group():
    runs = [Stub(f"a-{seed}", [0.1, 0.2], f"{seed} ", seed=seed) for seed in range(3)]
    runs += [Stub("again-1", [0.1], "1 ", seed=1)]
    for run in runs:
        run.info = {"data": {"sha256": run._parts}}
    assert list(groups(runs).values()) == [runs]


def test_rows_are_read_once_a_run_and_only_where_a_seed_is_there_again():
    class Counting(Stub):
        reads = 0

        @property
        def rounds(self):
            self.reads += 1
            return super().rounds

    runs = [Counting(f"a-{number}", [0.1, 0.2], str(number % 3), seed=number // 9) for number in range(10)]
    assert [len(members) for members in groups(runs).values()] == [4, 3, 3]
    assert [run.reads for run in runs] == [1] * 9 + [0]


def test_of_damaged_runs_what_is_left_tells_them_apart():
    """Rows that are there twice, or not at all."""

    class Damaged(Stub):
        @property
        def rounds(self):
            rounds = super().rounds
            return pd.concat([rounds, rounds[1:]]) if self.name == "twice" else rounds[:0]

    runs = [Stub("whole", [0.1, 0.2]), Damaged("twice", [0.1, 0.2]), Damaged("none", [0.1]), Stub("b", [0.1], "x")]
    assert [[run.name for run in members] for members in groups(runs).values()] == [["whole", "twice", "none"], ["b"]]


def test_other_data_under_one_name_are_seen(tmp_path):
    """Also where the models, and so the initial weights, are the same."""
    images, labels = np.zeros((40, 1, 28, 28), np.uint8), np.arange(40) % 2
    config = SERIAL.override({"clients.count": 4, "clients.per_round": "all", "rounds": 1})
    for name, brightness in (("dark", 10), ("bright", 200), ("dark-again", 10)):
        data = fedsim.Dataset("mine", images + np.uint8(brightness), labels, images, labels, num_classes=2)
        fedsim.run(config, dataset=data, results=tmp_path, name=name)
    found = groups(fedsim.load_runs([tmp_path / name for name in ("dark", "bright", "dark-again")]))
    assert [[run.name for run in members] for members in found.values()] == [["dark", "dark-again"], ["bright"]]


def test_a_seed_counts_once():
    """The same run twice, or shorter, says nothing more."""
    runs = [Stub("a", [0.1, 0.2]), Stub("b", [0.1]), Stub("c", [0.1, 0.4], seed=1), Stub("d", [0.1, 0.2])]
    (row,) = summaries.over_seeds(summaries.summary(runs)).query("measure == 'final_accuracy'").to_dict("records")
    assert (row["number"], row["of"]) == (2, 2)
    assert row["mean"] == pytest.approx(0.3)
    assert summaries.curve(runs, "test_accuracy")["number"].tolist() == [2, 2]


def test_of_a_seed_the_longest_run_counts_and_the_others_are_named():
    """Long is what has more rounds: by one rule, whoever asks."""

    class Damaged(Stub):
        @property
        def rounds(self):
            return super().rounds.drop(index=[0, 1])

    runs = [Stub("a", [0.1, 0.2, 0.3]), Damaged("a-2", [0.1, 0.3, 0.4, 0.5]), Stub("a-3", [0.1, 0.2, 0.3, 0.4])]
    runs += [Stub("a-4", [0.1, 0.2, 0.3, 0.4]), Stub("b", [0.1], seed=1)]
    other = Stub("c", [0.1], **{"training.lr": 0.5})
    frame = summaries.summary([*runs, other])
    assert [run.name for run in one_a_seed(runs)] == ["a-3", "b"], "of equally long ones the first"
    (final,) = summaries.over_seeds(frame).query("measure == 'final_accuracy' and group.str.endswith('0.1')")["mean"]
    assert final == pytest.approx((0.4 + 0.1) / 2)
    assert summaries.curve(runs, "test_accuracy").loc[3, "mean"] == 0.4
    assert summaries.left_out(frame) == (
        "Of runs of one group and seed one counts in means: "
        "a is left out for a-3, a-2 is left out for a-3, a-4 is left out for a-3."
    )
    assert summaries.left_out(summaries.summary([*runs[3:], other])) == ""


def test_of_equally_long_runs_one_counts_that_has_the_clients_accuracies():
    runs = [Stub("a", [0.1, 0.2]), Stub("b", [0.1, 0.2], **{"evaluation.clients": True}), Stub("c", [0.1, 0.2])]
    assert [run.name for run in one_a_seed(runs)] == ["b"]
    said = summaries.left_out(summaries.summary(runs))
    assert said.endswith(": a is left out for b, c is left out for b.")


def test_where_rounds_are_missing_nothing_is_said_of_the_target():
    class Damaged(Stub):
        @property
        def rounds(self):
            return super().rounds.drop(index=2)

    runs = [Damaged("a", [0.1, 0.2, 0.9, 0.9]), Damaged("b", [0.1, 0.8, 0.9, 0.9])]
    frame = summaries.summary(runs, Target("test_accuracy", 0.7))
    assert frame["bytes_to_target"].isna().tolist() == [True, False]
    assert frame["best_accuracy"].tolist() == [0.9, 0.9]


def test_groups_of_other_strategies_have_other_keys():
    runs = [Stub("a", []), Stub("b", [], **{"strategy.name": "fedavgm", "strategy.server_lr": 0.5})]
    assert list(groups(runs)) == ["strategy.name=fedavg", "strategy.name=fedavgm, strategy.server_lr=0.5"]


def test_means_over_seeds_by_hand():
    runs = [Stub(str(seed), [0.0, accuracy], seed=seed) for seed, accuracy in enumerate([0.2, 0.4, 0.6])]
    frame = summaries.over_seeds(summaries.summary(runs, Target("test_accuracy", 0.4))).set_index("measure")
    final = frame.loc["final_accuracy"]
    assert final["mean"] == pytest.approx(0.4)
    assert final["high"] == pytest.approx(0.4 + 4.302653 * 0.2 / math.sqrt(3), rel=1e-6)
    assert (final["number"], final["of"]) == (3, 3)
    assert (frame.loc["rounds_to_target", "number"], frame.loc["rounds_to_target", "of"]) == (2, 3)


def test_paired_differences_are_by_seed():
    """The seeds differ by much, the groups by 0.1 in each: the pairs say so exactly."""
    base = [Stub(f"a{seed}", [0.1 * seed], seed=seed) for seed in (1, 2, 3)]
    better = [Stub(f"b{seed}", [0.1 * seed + 0.1], seed=seed, **{"training.lr": 0.3}) for seed in (3, 2, 5)]
    frame = summaries.paired(summaries.summary(base + better)).set_index("measure")
    row = frame.loc["final_accuracy"]
    assert (row["group"], row["than"], row["number"]) == ("training.lr=0.3", "training.lr=0.1", 2)
    assert row["mean"] == pytest.approx(0.1)
    assert row["high"] - row["low"] == pytest.approx(0.0, abs=1e-12)


def test_groups_without_a_common_seed_have_no_pairs():
    runs = [Stub("a", [0.1], seed=0), Stub("b", [0.2], seed=1, **{"training.lr": 1.0})]
    frame = summaries.paired(summaries.summary(runs))
    assert frame.empty
    assert list(frame) == ["group", "than", "measure", "mean", "low", "high", "number", "of"]


def test_a_curve_by_hand():
    runs = [Stub("a", [0.1, math.nan, 0.3]), Stub("b", [0.3, math.nan, 0.5, 0.7], seed=1)]
    frame = summaries.curve(runs, "test_accuracy")
    assert frame.index.tolist() == [0, 2, 3]
    assert frame["mean"].tolist() == pytest.approx([0.2, 0.4, 0.7])
    assert frame["number"].tolist() == [2, 2, 1]
    assert frame.loc[0, ["low", "high"]].tolist() == [0, 1], "no accuracy is beyond"
    assert math.isnan(frame.loc[3, "low"])
    of_all, of_some = summaries.by_number(frame)
    assert of_all.index.tolist() == [0, 2]
    assert of_some.index.tolist() == [2, 3], "the two meet"


def test_an_interval_ends_where_a_value_must():
    runs = [Stub("a", [0.2, 0.7]), Stub("b", [0.4, 0.7, 0.9], seed=1), Stub("c", [0.4, 0.4], **{"training.lr": 1.0})]
    frame = summaries.summary(runs, Target("test_accuracy", 0.5))
    means = summaries.over_seeds(frame).set_index(["group", "measure"])
    assert means.loc[("training.lr=0.1", "final_accuracy"), ["mean", "low", "high"]].tolist() == [0.8, 0, 1]
    rounds = means.loc[("training.lr=0.1", "rounds_to_target")]
    assert rounds["mean"] == pytest.approx((0.6 + 1 / 3) / 2)
    assert rounds["low"] == 0
    assert rounds["high"] == pytest.approx(rounds["mean"] + 12.7062 * (0.6 - 1 / 3) / 2, rel=1e-4)


def test_means_over_runs_of_unequal_length_are_said():
    runs = [Stub("a", [0.2, 0.7]), Stub("b", [0.4, 0.7, 0.9], seed=1), Stub("c", [0.4, 0.4], **{"training.lr": 1.0})]
    frame = summaries.summary(runs)
    said = summaries.uneven(frame)
    assert said == "Last accuracies of training.lr=0.1 are of rounds 1 to 2: their runs went unequally far."
    assert summaries.uneven(frame[frame["run"] != "a"]) == ""
    later = [Stub("a", [0.2, 0.7, math.nan, math.nan]), Stub("b", [0.2, 0.7, math.nan, 0.9], seed=1)]
    assert "mnist are of rounds 1 to 3:" in summaries.uneven(summaries.summary(later))


@pytest.mark.parametrize("accuracies", [[0.1, 0.2], [0.1], [], [math.nan]])
def test_where_all_end_together_nothing_is_of_some(accuracies):
    frame = summaries.curve([Stub("a", accuracies), Stub("b", accuracies, seed=1)], "test_accuracy")
    of_all, of_some = summaries.by_number(frame)
    assert of_all.equals(frame)
    assert of_some.empty


@pytest.mark.parametrize("column", ["accuracy", "weights_sha256", "run"])
def test_what_is_no_column_to_draw(column):
    with pytest.raises(InputError, match="no column to be drawn; there are num_sampled"):
        summaries.curve([Stub("a", [0.1])], column)


def test_of_real_runs():
    runs = [fedsim.run(SERIAL.override({"seed": seed}), results=None) for seed in (0, 1)]
    frame = summaries.summary(runs, Target("test_accuracy", 0.5))
    assert frame["best_accuracy"].tolist() == [run.rounds["test_accuracy"].max() for run in runs]
    assert (frame["rounds_to_target"] <= 3).all()
