"""Views of runs, the plots for notebooks, and the recipes: hand-computed, on runs of every state."""

import math
import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import SERIAL, make_old
from made_runs import client_row, make, make_damaged, round_row

import analyse_runs
import fedsim
from fedsim import views
from fedsim.errors import FedsimWarning, InputError, RunFolderError
from fedsim.strategies import fedavgm


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


# ---------------------------------------------------------------- views


def test_a_run_is_read_from_all_that_names_it(tmp_path):
    folder = make(tmp_path / "a")
    make(tmp_path / "b")
    by_path, by_text, by_run = (views.view(given) for given in (folder, str(folder), fedsim.load_run(folder)))
    assert by_path.name == by_text.name == by_run.name == "a"
    assert [view.name for view in views.views(tmp_path / "*")] == ["a", "b"]
    assert [view.name for view in views.views([tmp_path / "b", folder, folder])] == ["b", "a"], "each once, as given"
    assert [view.name for view in views.views(fedsim.load_runs(tmp_path / "*"))] == ["a", "b"]


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path):
    paths = [str(make(tmp_path / folder / "mnist")) for folder in ("a", "b")]
    assert [view.name for view in views.views(paths)] == paths


def test_what_is_no_run(tmp_path):
    with pytest.raises(RunFolderError, match="nothing is not there"):
        views.views(tmp_path / "nothing")
    with pytest.raises(RunFolderError, match="no run among no paths"):
        views.views([])
    make(tmp_path / "a")
    make(tmp_path / "b")
    with pytest.raises(InputError, match="one run is drawn at a time, and these are 2: a, b"):
        fedsim.plot.timing(tmp_path / "*")


def test_a_dollar_in_a_folders_name_is_no_formula(tmp_path):
    ax = fedsim.plot.clients(make(tmp_path / "$\\foo$"))
    ax.figure.canvas.draw()
    assert ax.get_title(loc="left").startswith("$\\foo$")


@pytest.mark.parametrize("content", [b"PAR1 but no more", b""])
@pytest.mark.parametrize(("kind", "last"), [("rounds", [0, 1, 3]), ("clients", [0, 1, 2, 3])])
def test_a_damaged_part_is_named_and_the_rest_is_drawn(tmp_path, kind, last, content):
    part = make_damaged(tmp_path / "a", kind, content)
    with pytest.warns(FedsimWarning, match=rf"^{part} is damaged: .*; its rows are left out$") as said:
        view = views.view(tmp_path / "a")
    assert len(said) == 1
    assert [str(part) in problem for problem in view.damage] == [True]
    assert view.rounds["round"].tolist() == last
    assert view.clients["round"].tolist() == [1, 1, 1, 3, 3, 3], "of whole rounds"
    with pytest.warns(FedsimWarning, match="is damaged") as said:
        ax = fedsim.plot.accuracy(tmp_path / "a")
    assert ax.get_lines()[0].get_xdata().tolist() == last
    assert said[0].filename == __file__, "where it was asked for"


def test_a_run_of_which_no_round_can_be_read(tmp_path):
    folder = make(tmp_path / "a")
    part = folder / "rounds.parquet" / "part-000000-000003.parquet"
    part.write_bytes(b"")
    with pytest.raises(RunFolderError, match=rf"^not a round of a can be read: {part} is damaged: .*$"):
        views.view(folder)


def test_a_run_whose_clients_cannot_be_read_has_its_rounds(tmp_path):
    folder = make(tmp_path / "a")
    (folder / "clients.parquet" / "part-000000-000003.parquet").write_bytes(b"")
    with pytest.warns(FedsimWarning, match=r"clients\.parquet/part-000000-000003\.parquet is damaged"):
        view = views.view(folder)
    assert (view.last, len(view.clients)) == (3, 0)


@pytest.mark.parametrize("rows", [None, [], [round_row(0)]])
def test_runs_of_an_earlier_fedsim_are_as_those_of_this_one(tmp_path, rows):
    """They have no evaluation of clients, and their columns for it are null."""
    folder = make(tmp_path / "a", rows)
    new = views.view(folder)
    make_old(folder)
    old = views.view(folder)
    pd.testing.assert_frame_equal(old.rounds, new.rounds)
    pd.testing.assert_frame_equal(old.clients, new.clients)
    with pytest.raises(InputError, match=r"accuracy_before is empty in a: evaluation\.clients=true records it"):
        fedsim.plot.clients(folder, "accuracy_before")


def test_clients_of_a_round_that_is_not_there_yet_are_left_out(tmp_path):
    rows = [client_row(round, 0) for round in (1, 2)]
    view = views.view(make(tmp_path / "a", [round_row(0), round_row(1)], rows))
    assert view.clients["round"].tolist() == [1]
    assert view.last == 1


def test_quantiles_are_over_completed_clients_with_a_finite_value(tmp_path):
    losses = [*(float(number) for number in range(101)), math.inf, 1e9]
    rows = [client_row(1, number, train_loss=loss) for number, loss in enumerate(losses)]
    rows[-1]["status"] = "rejected"
    view = views.view(make(tmp_path / "a", [round_row(0), round_row(1)], rows))
    frame = views.quantiles([view], "train_loss")
    assert frame.loc[1].tolist() == pytest.approx([5, 25, 50, 75, 95])
    assert list(views.quantiles([view], "fit_s").loc[1]) == pytest.approx([0.25] * 5)


def test_the_parts_of_a_rounds_time_are_the_round(tmp_path):
    frame = views.seconds(views.view(make(tmp_path / "a")))
    assert frame.loc[1].to_dict() == {"fit": 0.5, "aggregate": 0.125, "evaluate": 0.25, "rest": 0.125}
    assert frame.loc[0].to_dict() == {"fit": 0.0, "aggregate": 0.0, "evaluate": 0.25, "rest": 0.75}


def test_thinning_keeps_the_mean():
    frame = pd.DataFrame({"x": np.arange(10.0)}, index=pd.RangeIndex(10, name="round"))
    thin, width = views.thinned(frame, 5)
    assert width == 2
    assert thin["x"].tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert thin.index.tolist() == [0, 2, 4, 6, 8]
    assert views.thinned(frame, 10)[1] == 1
    assert views.thinned(frame.iloc[:0], 10)[1] == 1


def test_labels_are_those_of_the_runs_shards():
    """Each client's row sums to its examples; iid over a balanced set leaves nobody without a label."""
    run = fedsim.run(SERIAL.override({"data.partition.name": "dirichlet"}), results=None)
    counts = views.labels(views.view(run))
    recorded = run.clients.drop_duplicates("client_id").set_index("client_id")["num_examples"]
    assert counts.sum(axis=1).loc[recorded.index].tolist() == recorded.tolist()
    assert counts.shape == (4, 10)
    assert counts.sum().tolist() == [200] * 10, "2,000 examples, as many of each label"


def own_dataset():
    labels = np.arange(120, dtype=np.int64) % 3
    images = np.zeros((120, 1, 4, 4), np.uint8)
    return fedsim.Dataset("mine", images, labels, images[:9], labels[:9], num_classes=3)


def test_labels_of_an_own_data_set_need_it(tmp_path):
    run = fedsim.run(SERIAL, results=tmp_path, dataset=own_dataset())
    with pytest.raises(InputError, match=r"mnist had a data set of its own; give it from Python: dataset=\.\.\."):
        fedsim.plot.partition(run)
    ax = fedsim.plot.partition(run, dataset=own_dataset())
    assert (
        np.asarray(ax.get_images()[0].get_array()).tolist()
        == views.labels(views.view(run), own_dataset()).T.to_numpy().tolist()
    )
    with pytest.raises(InputError, match="another data set than this synthetic"):
        views.labels(views.view(run), fedsim.datasets.load("synthetic"))


def test_labels_of_an_own_data_set_in_memory_are_not_those_of_another():
    run = fedsim.run(SERIAL, results=None, dataset=own_dataset())
    with pytest.raises(InputError, match="mnist had a data set of its own"):
        fedsim.plot.partition(run)


def test_runs_in_memory_with_other_parts_are_a_line_each():
    runs = [fedsim.run(SERIAL, results=None, strategy=strategy) for strategy in (None, fedavgm())]
    ax = fedsim.plot.accuracy(runs)
    assert [line.get_label() for line in ax.get_lines()] == [
        "mnist",
        "own strategy=fedsim.strategies.fedavgm(server_lr=1.0, server_momentum=0.9)",
    ]


def test_labels_are_never_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr("fedsim.datasets.idx.fetch", lambda *given: pytest.fail("it fetches"))
    folder = make(tmp_path / "a", config=SERIAL.override({"data.dataset": "mnist"}))
    with pytest.raises(InputError, match=r"mnist is not here \(absent\); `fedsim data fetch mnist` gets it"):
        fedsim.plot.partition(folder)


# ---------------------------------------------------------------- plots


def test_accuracy_draws_a_line_a_group_with_its_band(tmp_path):
    for seed, accuracy in enumerate((0.4, 0.6)):
        rows = [round_row(0, test_accuracy=0.1), round_row(1, test_accuracy=accuracy)]
        make(tmp_path / f"a{seed}", rows, config=SERIAL.override({"seed": seed}))
    make(tmp_path / "b", config=SERIAL.override({"training.lr": 0.5}))
    ax = fedsim.plot.accuracy(tmp_path / "*", target=0.5)
    one, other = ax.get_lines()[:2]
    assert list(one.get_ydata()) == pytest.approx([0.1, 0.5])
    assert one.get_linestyle() != other.get_linestyle(), "not by colour alone"
    assert one.get_color() != other.get_color()
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == 1.0, "0.5 + 12.7 * 0.1 is more than an accuracy can be"
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == [
        "training.lr=0.1 (2 seeds): 0.5 in 0.8 rounds in 1 of 2 runs",
        "training.lr=0.5: 0.5 in 0.9 rounds",
    ]


def test_a_seed_counts_once(tmp_path):
    for name, seed, last in (("a", 0, 1), ("a-2", 0, 3), ("b", 1, 3)):
        make(tmp_path / name, [round_row(round) for round in range(last + 1)], config=SERIAL.override({"seed": seed}))
    (text,) = fedsim.plot.accuracy([tmp_path / "a", tmp_path / "a-2"]).get_legend().get_texts()
    assert text.get_text() == "mnist"
    ax = fedsim.plot.accuracy(tmp_path / "*", target=0.5)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mnist (2 seeds): 0.5 in 0.9 rounds"]
    assert len(ax.get_lines()) == 2, "the mean, to its end, and the target"


def test_a_mean_is_thin_where_some_seeds_have_ended(tmp_path):
    for seed, last in enumerate((2, 4)):
        rows = [round_row(round, test_accuracy=0.1 * (1 + round)) for round in range(last + 1)]
        make(tmp_path / f"a{seed}", rows, config=SERIAL.override({"seed": seed}))
    of_all, of_some = fedsim.plot.accuracy(tmp_path / "*").get_lines()
    assert of_all.get_xdata().tolist() == [0, 1, 2]
    assert of_some.get_xdata().tolist() == [2, 3, 4]
    assert of_some.get_linewidth() < of_all.get_linewidth()
    assert of_some.get_color() == of_all.get_color()


def test_a_target_that_nobody_reached(tmp_path):
    ax = fedsim.plot.accuracy(make(tmp_path / "a"), target=0.99)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mnist: 0.99 not reached"]


def make_groups(folder, count):
    """Runs of as many groups, which differ in so many keys that a name takes several lines."""
    for n in range(count):
        changes = {"training.lr": 0.01 * (n + 1), "training.batch_size": 10 + n % 2, "rounds": 3 + n % 2}
        changes |= {"data.partition.name": ("iid", "shards")[n % 2], "clients.per_round": 2 + n % 2}
        make(folder / f"r{n:02}", config=SERIAL.override(changes))
    return folder / "*"


@pytest.mark.parametrize("count", [1, 2, 8, 20])
def test_a_legend_is_in_the_figure_however_many_groups_there_are(tmp_path, count):
    ax = fedsim.plot.accuracy(make_groups(tmp_path, count), target=0.7)
    with warnings.catch_warnings(action="error"):  # matplotlib's, where there is no room for all
        ax.figure.canvas.draw()
    legend, figure = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert legend.y0 >= figure.y0
    assert legend.x1 <= figure.x1
    assert legend.y1 < ax.xaxis.label.get_window_extent().y0, "below the axes"
    assert ax.bbox.height > 3 * ax.figure.dpi, "the axes keep their height"
    names = [text.get_text().replace("\n", " ") for text in ax.get_legend().get_texts()]
    assert [name.endswith(": 0.7 in 2.0 rounds") for name in names] == [True] * count


def test_a_figure_of_the_users_keeps_its_size(tmp_path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 8), layout="constrained")
    fedsim.plot.accuracy(make_groups(tmp_path, 8), target=0.7, ax=left)
    fedsim.plot.timing(tmp_path / "r00", ax=right)
    with warnings.catch_warnings(action="error"):
        figure.canvas.draw()
    assert figure.get_size_inches().tolist() == [12, 8]
    assert left.get_legend().get_window_extent().y0 >= 0


def test_clients_draws_the_median_and_bands(tmp_path):
    ax = fedsim.plot.clients(make(tmp_path / "a"), "update_l2_norm")
    (median,) = ax.get_lines()
    assert list(median.get_xdata()) == [1, 2, 3]
    assert list(median.get_ydata()) == pytest.approx([2.0] * 3)
    assert len(ax.collections) == 2
    assert ax.get_ylabel() == "update_l2_norm"
    assert fedsim.plot.clients(tmp_path / "a").get_ylabel() == "train_loss (nats)"


@pytest.mark.parametrize("column", ["accuracy_before", "accuracy_after"])
def test_clients_draws_their_own_evaluation(column):
    run = fedsim.run(SERIAL.override({"evaluation.clients": True}), results=None)
    ax = fedsim.plot.clients(run, column)
    (median,) = ax.get_lines()
    assert median.get_ydata().tolist() == pytest.approx(run.clients.groupby("round")[column].median().tolist())
    assert ax.get_ylabel() == f"{column} (fraction)"


@pytest.mark.parametrize("column", ["loss_before", "accuracy_before", "loss_after", "accuracy_after"])
def test_a_column_that_was_never_recorded_is_refused(tmp_path, column):
    with pytest.raises(InputError, match=rf"^{column} is empty in a: evaluation\.clients=true records it$"):
        fedsim.plot.clients(make(tmp_path / "a"), column)
    assert plt.get_fignums() == [], "nor are there empty axes"


def test_a_column_without_a_number_is_refused(tmp_path):
    rows = [client_row(1, 0, train_loss=math.inf), client_row(1, 1, train_loss=None, status="failed")]
    folder = make(tmp_path / "a", clients=rows)
    with pytest.raises(InputError, match=r"^train_loss is empty in a: no client that completed has a finite value$"):
        fedsim.plot.clients(folder)
    assert fedsim.plot.clients(folder, "fit_s").get_lines()[0].get_xdata().tolist() == [1]


def test_a_run_that_may_record_a_column_yet_has_empty_axes(tmp_path):
    config = SERIAL.override({"evaluation.clients": True})
    folder = make(tmp_path / "a", [round_row(0)], config=config, status="running")
    assert len(fedsim.plot.clients(folder, "accuracy_before").get_lines()[0].get_xdata()) == 0


@pytest.mark.parametrize("column", ["loss", "status", "client_id", "pid"])
def test_what_is_no_column_of_clients(tmp_path, column):
    with pytest.raises(
        InputError, match=r"no column of clients to be drawn; there are num_examples, num_steps, train_loss"
    ):
        fedsim.plot.clients(make(tmp_path / "a"), column)


def test_timing_stacks_to_the_round(tmp_path):
    ax = fedsim.plot.timing(make(tmp_path / "a"))
    tops = [
        max(bar.get_y() + bar.get_height() for bar in ax.patches if math.isclose(bar.get_x() + 0.45, r))
        for r in range(4)
    ]
    assert tops == pytest.approx([1.0] * 4)
    assert len({bar.get_hatch() for bar in ax.patches}) == 4, "not by colour alone"
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == "local training, 38 %"


def test_timing_of_many_rounds_has_few_bars(tmp_path):
    ax = fedsim.plot.timing(make(tmp_path / "a", [round_row(round) for round in range(1001)], []))
    assert len(ax.patches) <= 4 * 100
    assert ax.get_xlabel() == "round (means of 11)"


@pytest.mark.long
@pytest.mark.parametrize("rows", [[], [round_row(0)], [round_row(0), round_row(1, test_accuracy=None, test_loss=None)]])
def test_a_run_that_has_just_begun_can_be_drawn(tmp_path, rows):
    folder = make(tmp_path / "a", rows, status="running")
    for draw in (fedsim.plot.accuracy, fedsim.plot.partition, fedsim.plot.clients, fedsim.plot.timing):
        ax = draw(folder)
        ax.figure.canvas.draw()
        assert ax.get_xlabel()


def test_plots_leave_the_settings_alone_and_draw_where_they_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("it shows"))
    folder = make(tmp_path / "a")
    before = dict(mpl.rcParams)
    _, axes = plt.subplots(2, 2)
    drawn = [
        fedsim.plot.accuracy(folder, ax=axes[0, 0]),
        fedsim.plot.partition(folder, ax=axes[0, 1]),
        fedsim.plot.clients(folder, ax=axes[1, 0]),
        fedsim.plot.timing(folder, ax=axes[1, 1]),
    ]
    assert drawn == list(axes.flat)
    assert dict(mpl.rcParams) == before
    assert len(plt.get_fignums()) == 1


# ---------------------------------------------------------------- recipes


def test_recipes_by_hand(tmp_path):
    rows = [client_row(round, client) for round in (1, 2, 3) for client in range(3)]
    rows[-1] |= {"status": "rejected", "train_loss": None, "update_l2_norm": None, "cosine_to_mean": None}
    make(tmp_path / "a", [*map(round_row, range(3)), round_row(3, num_retries=2)], rows)
    runs = fedsim.load_runs(tmp_path / "*")
    tables = {recipe.__name__: recipe(runs.rounds, runs.clients) for recipe in analyse_runs.RECIPES}
    assert tables["accuracy_by_round"]["a"].tolist() == pytest.approx([0.1, 0.55, 0.7, 0.775])
    assert tables["best_rounds"].loc["a", ["round", "seconds"]].tolist() == [3, 4.0]
    assert tables["time_shares"].loc["a", ["fit_s", "round_s"]].tolist() == pytest.approx([0.375, 4.0])
    assert tables["participation"].loc["a"].tolist() == [3, 3, 3, 3]
    hardest = tables["hardest_clients"]["train_loss"]
    assert hardest.index.tolist() == [("a", 2), ("a", 1), ("a", 0)]
    assert hardest.tolist() == pytest.approx([2.2, 1.25, 0.25])
    assert tables["drift"].loc["a", ("update_l2_norm", 0.5)] == 1.5
    assert tables["mishaps"].loc["a"].to_dict() == {"completed": 8, "rejected": 1, "retries": 2}


def test_recipes_of_real_runs_are_printed(tmp_path, capsys):
    for seed in (0, 1):
        fedsim.run(SERIAL.override({"seed": seed}), results=tmp_path, name=f"s{seed}")
    analyse_runs.main([str(tmp_path / "*")])
    printed = capsys.readouterr().out
    assert printed.count("\n# ") == len(analyse_runs.RECIPES) + 1
    assert all(printed.count(name) > 5 for name in ("s0", "s1"))


def test_the_recipes_help_and_refuse_as_commands_do(tmp_path, capsys):
    for words, code in ((["--help"], 0), ([], 2), ([str(tmp_path)], 2)):
        with pytest.raises(SystemExit) as ended:
            analyse_runs.main(words)
        assert ended.value.code == code
    said = capsys.readouterr()
    assert "recipes to copy from" in said.out
    assert said.err.count("usage: ") == 1
    assert f"no run among {tmp_path}" in said.err.splitlines()[-1]
