"""The report: read back as HTML, of runs in every state, hostile ones too."""

import base64
import hashlib
import json
import os
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from helpers import SERIAL, TINY, as_version, content, make_old, rewrite
from made_runs import client_row, make, make_damaged, round_row

import fedsim
from fedsim import cli, reporting, views
from fedsim.errors import FedsimWarning, InputError, RunFolderError
from fedsim.metrics import ROUND_COLUMNS
from fedsim.reporting import html, learning
from fedsim.run_folder import lock
from fedsim.statistics import interval

FASTER = SERIAL.override({"training.lr": 0.5})
VOID = {"meta", "wbr", "line", "rect", "path", "br"}


class Page(HTMLParser):
    """A page's words by section, its charts, and what a browser would run or load."""

    def __init__(self, path):
        super().__init__()
        self.text, self.charts, self.scripts, self.attributes = {"": ""}, {}, [], []
        self._open, self._section, self._script, self._label = [], "", None, ""
        self.size = path.stat().st_size
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = "?"
        if tag == "script":
            self._script = given.get("type", "code")
        if given.get("role") == "img":
            self._label = given["aria-label"]

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._script = None if tag == "script" else self._script

    def handle_data(self, data):
        if self._script == "application/json":
            self.charts[self._label] = json.loads(data)
        elif self._script:
            self.scripts.append(data)
        elif self._open[-1:] == ["h2"]:
            self._section = data
            self.text[data] = ""
        elif "style" not in self._open:
            self.text[self._section] += data + " "

    def chart(self, start):
        (found,) = [chart for label, chart in self.charts.items() if label.startswith(start)]
        return found

    def trace(self, start, name):
        (found,) = [trace for trace in self.chart(start)["data"] if trace.get("name") == name]
        return found


def page_of(*folders, **options):
    return Page(fedsim.report(folders, **options))


# ---------------------------------------------------------------- a whole page


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    run = fedsim.run(SERIAL, results=tmp_path_factory.mktemp("results"), name="real")
    return run, Page(fedsim.report(run, target={"test_accuracy": 0.2}))


def test_it_is_in_the_runs_folder_and_changes_nothing_else(tmp_path):
    folder = make(tmp_path / "a")
    before = content(folder)
    assert fedsim.report(folder) == folder / "report.html"
    after = content(folder)
    assert {path: data for path, data in after.items() if path.name != "report.html"} == before


def test_a_real_run_has_every_section_but_fairness(real):
    assert [name for name in real[1].text if name] == [name for name in reporting.SECTIONS if name != "Fairness"]
    assert all(words.strip() for words in real[1].text.values())


def test_curves_are_the_runs_numbers(real):
    run, page = real
    rounds = run.rounds
    for title, column in (
        ("Test accuracy", "test_accuracy"),
        ("Test loss", "test_loss"),
        ("Training loss of", "train_loss"),
    ):
        trace = page.trace(title, "real")
        values = rounds.set_index("round")[column].dropna()
        assert trace["x"] == values.index.tolist()
        assert trace["y"] == pytest.approx(values.tolist(), rel=1e-4)
    assert f"Test accuracy {rounds['test_accuracy'].iloc[-1]:.4f} after 3 rounds" in page.text[""]


def test_every_chart_is_one_that_plotly_knows_and_is_said_in_words(real):
    for label, chart in real[1].charts.items():
        go.Figure(chart)  # refuses what it does not know
        assert re.fullmatch(r".+\. .*\d.*\.", label), label


def test_the_heat_map_is_the_partition(real):
    run, page = real
    (trace,) = page.chart("Labels of each client (iid)")["data"]
    assert trace["z"] == views.labels(views.view(run)).T.to_numpy().tolist()
    assert (trace["zmin"], trace["zmax"]) == (0, np.max(trace["z"])), "white is none"
    assert "A client has 500 examples, the median client 10 of 10 labels." in page.text["Who has which labels"]


def test_configuration_and_environment_are_said(real):
    run, page = real
    assert "training.batch_size 100 32" in page.text["Configuration"], "the value, and the default"
    assert run.info["versions"]["torch"] in page.text["Environment"]


def test_nothing_is_loaded_and_only_its_own_scripts_run(real):
    _, page = real
    ((_, _, policy),) = [entry for entry in page.attributes if entry[0] == "meta" and "default-src" in str(entry[2])]
    hashes = re.findall(r"'sha256-(.+?)'", policy)
    assert hashes == [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in page.scripts]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "script-src 'unsafe-inline'" not in policy
    loads = [entry for entry in page.attributes if entry[1] in ("src", "srcset", "data") or entry[0] in ("link", "img")]
    assert loads == []
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")


def test_links_lead_to_sections(real):
    ids = [value for _, name, value in real[1].attributes if name == "id"]
    assert [value for _, name, value in real[1].attributes if name == "href"] == [f"#{name}" for name in ids]
    assert len(ids) == len(set(ids)) > 5


# ---------------------------------------------------------------- by hand


def test_the_time_ends_with_what_dominates(tmp_path):
    page = page_of(make(tmp_path / "a", [round_row(0, round_s=0.25), round_row(1, fit_s=0.625)]))
    time = page.text["Where the time went"]
    assert time.strip().endswith("Local training takes most: 50% of the 1.25 s that the rounds took.")
    assert page.trace("Time of each round", "local training")["y"] == [0.0, 0.625]
    assert page.trace("Time of each round", "evaluation")["y"] == [0.25, 0.25]


def test_what_went_wrong_is_counted_and_said(tmp_path):
    rows = [round_row(0), round_row(1), round_row(2, num_rejected=1, num_dropped=1, num_completed=1, num_retries=4)]
    clients = [client_row(1, client) for client in range(3)]
    clients += [client_row(2, 0), client_row(2, 1, status="rejected", error="update is not finite\nsecond line")]
    clients += [client_row(2, 2, status="dropped", error="actor died")]
    page = page_of(make(tmp_path / "a", rows, clients))
    words = page.text["Failures and retries"]
    assert "In 1 of 2 rounds, round 2 the first." in words
    assert "update is not finite rejected 1 2 to 2 1" in words
    assert "second line" not in words
    assert "actor died dropped" in words
    assert page.trace("Mishaps in each round", "started again")["y"] == [0, 0, 4]
    assert page.trace("Rounds of each client", "dropped")["y"] == [0, 0, 1, 0]
    assert page.trace("Rounds of each client", "completed")["y"] == [2, 1, 1, 0]
    assert (
        "A client was sampled in 0 to 2 of 2 rounds, half of them in 2 or more; 1 of 4 never were."
        in page.text["Participation"]
    )


def test_where_nothing_went_wrong_it_says_so(tmp_path):
    page = page_of(make(tmp_path / "a"))
    assert "No client failed, was rejected or left out" in page.text["Failures and retries"]


def test_all_clients_in_all_rounds_need_no_chart(tmp_path):
    clients = [client_row(round, client) for round in (1, 2, 3) for client in range(4)]
    page = page_of(make(tmp_path / "a", clients=clients))
    assert "Each of the 4 clients was sampled in 3 of 3 rounds." in page.text["Participation"]


def test_bands_are_quantiles_over_clients(tmp_path):
    page = page_of(make(tmp_path / "a"))
    chart = page.chart("Training loss. ")
    outer, inner, median = chart["data"]
    assert median["y"] == pytest.approx([1.1, 1.2, 1.3])
    assert inner["y"] == pytest.approx([1.6, 1.7, 1.8, 0.8, 0.7, 0.6])
    assert outer["y"] == pytest.approx([2.0, 2.1, 2.2, 0.4, 0.3, 0.2])
    assert outer["x"] == inner["x"] == [1, 2, 3, 3, 2, 1]


def test_targets_are_reached_or_not(tmp_path):
    folders = [make(tmp_path / "fast"), make(tmp_path / "slow", [round_row(r, test_accuracy=0.2) for r in range(4)])]
    page = page_of(*folders, target={"test_accuracy": 0.75, "test_loss": 0.5})
    words = page.text["Rounds to target"]
    assert "1 of 2 runs reached test_accuracy ≥ 0.75." in words
    assert "fast 2.7 3.667 16 kB" in words
    assert "slow not reached" in words
    assert "test_loss ≤ 0.5" in words
    assert len(page.chart("Test accuracy")["layout"]["shapes"]) == 1


def test_a_target_that_was_never_measured_is_not_recorded(tmp_path, evaluated):
    without = make(tmp_path / "a")
    assert "a not recorded" in page_of(without, target={"accuracy_before_mean": 1.0}).text["Rounds to target"]
    page = page_of(without, evaluated[0], path=tmp_path / "page.html", target={"accuracy_before_mean": 1.0})
    words = page.text["Rounds to target"]
    assert re.findall(r" (a|fair) (not \w+)", words) == [("a", "not recorded"), ("fair", "not reached")]
    assert re.findall(r" (A|B): .*? (not \w+) 0 of 1", words) == [("A", "not recorded"), ("B", "not reached")]


def test_a_target_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be a target"):
        fedsim.report(make(tmp_path / "a"), target={"accuracy": 0.9})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Of shards of two labels, so that the clients differ."""
    config = SERIAL.override({"evaluation.clients": True, "data.partition.name": "shards", "clients.count": 10})
    run = fedsim.run(config, results=tmp_path_factory.mktemp("results"), name="fair")
    return run, Page(fedsim.report(run))


@pytest.mark.parametrize("title", learning.FAIRNESS)
def test_fairness_is_the_runs_numbers(evaluated, title):
    run, page = evaluated
    for column, (called, _) in learning.FAIRNESS[title].items():
        trace, values = page.trace(title, called), run.rounds.set_index("round")[column].dropna()
        assert trace["x"] == values.index.tolist() == [1, 2, 3]
        assert trace["y"] == pytest.approx(values.tolist(), rel=1e-4)
        assert f"{called} {values.iloc[-1]:.4g} in round 3." in page.text["Fairness"]


def test_every_column_of_fairness_is_drawn():
    drawn = {column for columns in learning.FAIRNESS.values() for column in columns}
    assert drawn == {column.name for column in ROUND_COLUMNS if column.name.startswith("accuracy_")}


def test_the_clients_accuracies_are_drawn(evaluated):
    run, page = evaluated
    median = page.chart("Accuracy on its own data, after its training")["data"][-1]
    assert median["y"] == pytest.approx(run.clients.groupby("round")["accuracy_after"].median().tolist(), rel=1e-4)


def test_fairness_beside_a_run_that_did_not_measure_it(evaluated, real, tmp_path):
    page = page_of(real[0], evaluated[0], path=tmp_path / "page.html")
    names = [trace["name"] for trace in page.chart("Accuracy on a client's own data, after")["data"]]
    assert names == ["B: mean client", "B: worst tenth of the clients"]


def test_accuracies_of_one_moment_only(tmp_path):
    """As of clients whose updates were rejected."""
    measured = {"accuracy_before_mean": 0.5, "accuracy_before_worst_decile": 0.25}
    words = page_of(make(tmp_path / "a", [round_row(0), round_row(1, **measured)])).text["Fairness"]
    assert "worst tenth of the clients 0.25 in round 1." in words
    assert "after its training" not in words


# ---------------------------------------------------------------- states


def test_a_run_that_is_going_on_says_so(tmp_path):
    folder = make(tmp_path / "a", config=SERIAL.override({"rounds": 30}), status="running")
    with lock(folder):
        page = page_of(folder)
    assert "still going" in page.text[""]
    assert "after 3 of 30 rounds" in page.text[""]
    assert "fedsim resume" not in page.text[""]


def test_a_run_that_went_on_says_when_and_what_was_another(tmp_path):
    run = fedsim.run(SERIAL, results=tmp_path, name="a")
    fedsim.resume(run.path, changes={"rounds": 5})
    (part,) = run.info["resumes"]
    assert f"resumes round 4 ({part['at']})" in page_of(run.path).text["Environment"]
    info = json.loads((run.path / "run.json").read_text())
    unlike = {"resumes": [part | {"unlike": ["torch 1.0 in the run, 2.0 here"]}, "edited"]}
    (run.path / "run.json").write_text(json.dumps(info | unlike))
    assert f"round 4 ({part['at']}, torch 1.0 in the run, 2.0 here)" in page_of(run.path).text["Environment"]


@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_run_that_ended_early_says_how_to_go_on(tmp_path, status):
    error = "RunFailedError: node lost\nin a second line" if status == "failed" else None
    page = page_of(make(tmp_path / "a", config=SERIAL.override({"rounds": 30}), status=status, error=error))
    assert ("failed" if status == "failed" else "interrupted") in page.text[""], "nobody writes it"
    assert f"To go on: fedsim resume {tmp_path / 'a'}" in page.text[""]
    assert ("node lost\nin a second line" in page.text["Failures and retries"]) == (status == "failed")


def test_a_run_without_a_round(tmp_path):
    page = page_of(make(tmp_path / "a", []))
    assert "No round of 3 is there yet." in page.text[""]
    assert "Accuracy and loss" not in page.text
    assert "Who has which labels" in page.text


def test_a_run_with_round_0_only(tmp_path):
    page = page_of(make(tmp_path / "a", [round_row(0)]), target={"test_accuracy": 0.9})
    assert "Test accuracy 0.1000 after 0 of 3 rounds, 1 s of rounds." in page.text[""]
    assert "Participation" not in page.text
    assert page.trace("Test accuracy", "a")["y"] == [0.1]


def test_rounds_without_an_evaluation_are_gaps(tmp_path):
    nulls = {"test_accuracy": None, "test_loss": None, "evaluate_s": None}
    page = page_of(make(tmp_path / "a", [round_row(r, **(nulls if r % 2 else {})) for r in range(4)]))
    assert page.trace("Test accuracy", "a")["x"] == [0, 2]
    assert "measured in round 2" in page.text[""]
    none = page_of(make(tmp_path / "b", [round_row(r, **nulls) for r in range(4)]))
    assert "No accuracy was measured in 3 rounds" in none.text[""]


def test_a_run_of_an_earlier_fedsim_has_the_page_of_this_one(tmp_path):
    folder = make(tmp_path / "a")
    new = page_of(folder)
    make_old(folder)
    old = page_of(folder)
    assert old.charts == new.charts
    assert list(old.text) == list(new.text)
    assert "Fairness" not in old.text
    assert "No client failed" in old.text["Failures and retries"]


def test_old_and_new_runs_side_by_side(tmp_path, evaluated):
    make_old(make(tmp_path / "a"))
    page = page_of(tmp_path / "a", evaluated[0], path=tmp_path / "page.html")
    assert [trace["name"] for trace in page.chart("Test accuracy")["data"]] == ["A", "B"]


@pytest.mark.parametrize("name", ["a", "<img src=x onerror=alert(1)>"])
@pytest.mark.parametrize(("kind", "rounds"), [("rounds", [0, 1, 3]), ("clients", [0, 1, 2, 3])])
def test_a_damaged_part_is_named_on_the_page(tmp_path, name, kind, rounds):
    part = make_damaged(tmp_path / name, kind)
    make(tmp_path / "whole")
    with pytest.warns(FedsimWarning, match="is damaged") as said:
        pages = page_of(tmp_path / name), page_of(tmp_path / name, tmp_path / "whole")
    assert len(said) == 2, "once a page"
    for page in pages:
        assert f"Rows are missing: {part} is damaged: Parquet" in page.text[""]
        assert not [entry for entry in page.attributes if entry[0] == "img"]
    assert pages[0].chart("Test accuracy")["data"][0]["x"] == rounds
    assert pages[0].chart("Training loss. ")["data"][-1]["x"] == [1, 3]


def test_labels_of_an_own_data_set_are_left_out(tmp_path):
    page = page_of(make(tmp_path / "a", own={"dataset": "mine.Dataset"}))
    assert "a had a data set of its own" in page.text["Who has which labels"]
    assert not [label for label in page.charts if label.startswith("Labels")]


def test_labels_of_a_data_set_that_is_not_here_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr("fedsim.datasets.idx.fetch", lambda *given: pytest.fail("it fetches"))
    page = page_of(make(tmp_path / "a", config=SERIAL.override({"data.dataset": "mnist"})))
    assert "mnist is not here (absent)" in page.text["Who has which labels"]


# ---------------------------------------------------------------- several


def test_groups_of_seeds_are_a_line_each(tmp_path):
    for seed, accuracy in enumerate((0.25, 0.75, 0.8)):
        rows = [round_row(0, test_accuracy=0.1), round_row(1, test_accuracy=accuracy)]
        make(tmp_path / f"a{seed}", rows, config=SERIAL.override({"seed": seed}))
    make(tmp_path / "b", config=SERIAL.override({"training.lr": 0.5}))
    page = page_of(tmp_path / "*")
    lines = [trace for trace in page.chart("Test accuracy")["data"] if trace["name"] in ("A", "B")]
    assert lines[0]["y"] == pytest.approx([0.1, 0.6])
    assert lines[0]["line"]["dash"] != lines[1]["line"]["dash"], "not by colour alone"
    (band,) = [trace for trace in page.chart("Test accuracy")["data"] if trace["name"] == "confidence interval, A"]
    high = interval([0.25, 0.75, 0.8]).high
    assert max(band["y"]) == pytest.approx(min(1.0, high))
    assert "A: training.lr=0.1 (3 seeds)" in page.text["Accuracy and loss"]
    assert "Highest last test accuracy: 0.775, of B: training.lr=0.5. Runs: 4 finished." in page.text[""]
    assert "training. lr" in page.text["Configuration"].partition("What all share")[0], "with a place to break"
    assert page.chart("Time of a mean round")["layout"]["yaxis"]["ticktext"] == ["a0", "a1", "a2", "b"]
    assert page.trace("Time of a mean round", "evaluation")["x"] == [0.25] * 4


def test_a_seed_counts_once_and_the_page_says_for_which_run(tmp_path):
    clients = [client_row(1, client, train_loss=9.0) for client in range(3)]
    make(tmp_path / "a", [round_row(round, test_accuracy=0.1) for round in range(2)], clients)
    make(tmp_path / "a-2", [round_row(round, test_accuracy=0.3) for round in range(4)])
    make(tmp_path / "b", config=SERIAL.override({"training.lr": 0.5}))
    page = page_of(tmp_path / "*")
    assert "A: training.lr=0.1 0.3 1 B: training.lr=0.5" in page.text[""], "no 2 seeds"
    said = "Of runs of one group and seed one counts in means: a is left out for a-2."
    assert said in page.text[""]
    assert page.trace("Test accuracy", "A")["y"] == pytest.approx([0.3] * 4)
    assert page.trace("Training loss. ", "A")["y"] == pytest.approx([1.1, 1.2, 1.3])
    assert "Shown: one run of each group." in page.text["Participation"]
    assert "a-2, b: rounds of each client" in page.text["Participation"]
    assert "left out" not in page_of(tmp_path / "a-2", tmp_path / "b").text[""]


def test_the_runs_are_said_with_the_letters_of_their_groups(tmp_path):
    for name, changes in (("x", {"seed": 1}), ("y", {"training.lr": 0.5}), ("z", {})):
        make(tmp_path / name, config=SERIAL.override(changes))
    words = page_of(tmp_path / "*").text[""]
    assert "run group status seed" in words
    assert re.findall(r"([xyz]) ([AB]) finished (\d)", words) == [("x", "A", "1"), ("y", "B", "0"), ("z", "A", "0")]
    assert "run status seed" in page_of(tmp_path / "x", tmp_path / "z").text[""], "of one group: no letters"


def test_a_mean_is_thin_where_some_seeds_have_ended(tmp_path):
    for seed, last in enumerate((2, 4)):
        rows = [round_row(round, test_accuracy=0.1 * (1 + round)) for round in range(last + 1)]
        make(tmp_path / f"a{seed}", rows, config=SERIAL.override({"seed": seed}))
    page = page_of(tmp_path / "*", path=tmp_path / "page.html")
    of_all, of_some = [trace for trace in page.chart("Test accuracy")["data"] if trace["type"] == "scatter"][-2:]
    assert of_all["x"] == [0, 1, 2]
    assert (of_some["x"], of_some["name"][-14:]) == ([2, 3, 4], ", not all runs")
    assert of_some["line"]["width"] < of_all["line"]["width"]
    assert "thin where some of its runs have ended" in page.text["Accuracy and loss"]


@pytest.mark.long
def test_where_the_page_of_several_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b, c = make(tmp_path / "one" / "a"), make(tmp_path / "one" / "b"), make(tmp_path / "two" / "c")
    assert fedsim.report([a, b]) == tmp_path / "one" / "report.html"
    assert fedsim.report([a, c]).resolve() == tmp_path / "report.html"
    assert fedsim.report([a, c], tmp_path / "own.html") == tmp_path / "own.html"


def test_a_run_in_memory_needs_a_file(tmp_path):
    run = fedsim.run(SERIAL, results=None)
    with pytest.raises(InputError, match="name a file"):
        fedsim.report(run)
    page = Page(fedsim.report(run, tmp_path / "page.html"))
    assert f"numerics_fingerprint {run.info['numerics_fingerprint']}" in page.text["Environment"]
    assert page.trace("Test accuracy", "mnist")["x"] == [0, 1, 2, 3]


def test_runs_in_memory_of_one_name_have_rows_of_their_own(tmp_path):
    runs = [fedsim.run(SERIAL.override({"seed": seed}), results=None) for seed in range(2)]
    page = Page(fedsim.report(runs, tmp_path / "page.html"))
    assert page.chart("Time of a mean round")["layout"]["yaxis"]["ticktext"] == ["mnist", "mnist (2)"]
    assert re.search(r"What differs run seed mnist 0 mnist \(2\) 1 ", page.text["Configuration"])


@pytest.mark.parametrize("rounds", [201, 1001])
def test_mishaps_are_counted_once_in_bars_of_many_rounds(tmp_path, rounds):
    rows = [round_row(round, num_rejected=int(round == rounds - 1)) for round in range(rounds)]
    page = page_of(make(tmp_path / "a", rows, []))
    assert sum(page.trace("Mishaps in each", "rejected: update not finite")["y"]) == 1
    assert f"In 1 of {rounds - 1} rounds, round {rounds - 1} the first." in page.text["Failures and retries"]


def test_a_target_that_may_be_in_missing_rows_is_not_called_not_reached(tmp_path):
    make_damaged(tmp_path / "a")
    with pytest.warns(FedsimWarning, match="damaged"):
        page = page_of(tmp_path / "a", target={"test_accuracy": 0.9})
    assert "a not known, as rows are missing" in page.text["Rounds to target"]


@pytest.mark.long
def test_more_groups_than_colours_have_names_of_their_own(tmp_path):
    runs = [make(tmp_path / f"r{n:02}", config=SERIAL.override({"training.lr": n / 100})) for n in range(1, 31)]
    page = page_of(*runs)
    names = [trace["name"] for trace in page.chart("Test accuracy")["data"]]
    assert names[0] == "A"
    assert names[-1] == "D2"
    assert len(set(names)) == 30


# ---------------------------------------------------------------- size


@pytest.mark.long
def test_a_thousand_rounds_of_a_hundred_clients_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    rounds = [round_row(round, test_accuracy=float(rng.random()), fit_s=float(rng.random())) for round in range(1001)]
    clients = [
        client_row(round, client, train_loss=float(rng.random()), update_l2_norm=float(rng.random()))
        for round in range(1, 1001)
        for client in range(100)
    ]
    page = page_of(make(tmp_path / "a", rounds, clients, config=SERIAL.override({"clients.count": 100})))
    assert page.size < 6_000_000
    assert len(page.chart("Training loss. ")["data"][-1]["x"]) <= 1001
    assert sum(len(trace["x"]) for trace in page.chart("Time of a round")["data"]) <= 4 * 200
    assert "means of 6 rounds" in " ".join(page.charts)


def test_many_clients_are_counted_not_drawn(tmp_path):
    config = SERIAL.override(
        {"clients.count": 1000, "data.partition.name": "sampled", "data.partition.examples_per_client": 9}
    )
    clients = [client_row(round, client, num_examples=9) for round in (1, 2, 3) for client in range(round * 100)]
    page = page_of(make(tmp_path / "a", clients=clients, config=config))
    assert page.trace("Rounds of each client", "clients")["x"] == [0, 1, 2, 3]
    assert page.trace("Rounds of each client", "clients")["y"] == [700, 100, 100, 100]
    (heat,) = page.chart("Labels of each client")["data"]
    assert len(heat["x"]) == 200
    assert "Shown: 200 of 1,000 clients, evenly spaced." in page.text["Who has which labels"]


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (47_810_400, "47.8 MB"), (3e15, "3e+03 TB")]
)
def test_bytes_for_a_person(number, said):
    assert learning.size(number) == said


@pytest.mark.parametrize(
    ("number", "said"), [(5, "5"), (12345, "12,345"), (11712.34, "11,712"), (0.05381, "0.0538"), (float("nan"), "")]
)
def test_numbers_for_a_person(number, said):
    assert html.number(number) == said


# ---------------------------------------------------------------- hostile


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "<!--<script>",
    "]]> &lt; &amp; ' \u2028",
    "<b>bold</b><a href='javascript:alert(1)'>x</a>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_in_the_files_stays_text(tmp_path, text):
    clients = [client_row(round, client, status="failed", error=text) for round in (1, 2) for client in range(3)]
    rows = [round_row(0), round_row(1, num_failed=3), round_row(2, num_failed=3)]
    config = SERIAL.override({"data.partition.name": text})
    folder = tmp_path / text.replace("/", "|")
    make(folder, rows, clients, config=config, status="failed", error=text, started_at=text, machine={text: text})
    make(tmp_path / "b", rows, clients, status=text, versions={"python": text})
    for page in (page_of(folder), page_of(tmp_path / "*", path=tmp_path / "page.html")):
        assert len(page.scripts) == 2, "plotly's and the page's own"
        assert not [
            entry
            for entry in page.attributes
            if entry[1].startswith("on") or (entry[0] in ("img", "a") and entry[1] == "src")
        ]
        assert text.strip() in page.text["Failures and retries"]
        assert text.replace("/", "|") in page.text[""]
        for chart in page.charts.values():
            shown = [trace.get("name", "") + trace.get("hovertemplate", "") for trace in chart["data"]]
            assert not [words for words in shown if re.search(r"<(?!/?extra>)", words)], (
                "plotly would take it for markup"
            )


def test_what_is_no_text_is_written(tmp_path):
    page = page_of(make(tmp_path / "a", machine={"node": b"caf\xe9".decode("utf-8", "surrogateescape")}))
    assert "caf?" in page.text["Environment"]


def test_json_cannot_end_its_script():
    text = html.data({"</script>": "<!-- & -->"})
    assert not re.search(r"[<>&]", text)
    assert json.loads(text) == {"</script>": "<!-- & -->"}


# ---------------------------------------------------------------- files and the command


@pytest.mark.parametrize("what", ["run.json", "a text", "a pipe", "/dev/null"])
def test_nothing_but_a_page_is_replaced(tmp_path, capsys, what):
    folder = make(tmp_path / "a")
    path = {"run.json": folder / what, "/dev/null": Path(what)}.get(what, tmp_path / "other")
    if what == "a text":
        path.write_text("mine")
    elif what == "a pipe":
        os.mkfifo(path)
    before = content(folder)
    assert command(folder, "--output", path) == 2
    assert "is there and no HTML page, so it is not replaced; name another file" in capsys.readouterr().err
    assert content(folder) == before
    assert what != "a text" or path.read_text() == "mine"


def test_links_in_a_circle_are_no_bug(tmp_path, capsys):
    for one, other in (("a.html", "b.html"), ("b.html", "a.html")):
        (tmp_path / one).symlink_to(tmp_path / other)
    assert command(make(tmp_path / "a"), "--output", tmp_path / "a.html") == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_page_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    folder = make(tmp_path / "a")
    (tmp_path / "old.html").write_text("<!DOCTYPE html>")
    (tmp_path / "link.html").symlink_to("old.html")
    fedsim.report(folder, tmp_path / "link.html")
    assert (tmp_path / "link.html").is_symlink()
    assert Page(tmp_path / "old.html").trace("Test accuracy", "a")


def test_labels_of_an_own_data_set_are_shown_where_it_is_given(tmp_path):
    run = fedsim.run(SERIAL, results=tmp_path, dataset=TINY)
    assert (
        "Labels are not shown: mnist had a data set of its own; give it from Python: dataset=..."
        in (page_of(run).text["Who has which labels"])
    )
    page = page_of(run, dataset=TINY)
    assert np.sum(page.chart("Labels of each client")["data"][0]["z"]) == 60


def test_a_run_that_diverged_presses_no_other_flat(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", [round_row(n, train_loss=10.0**n, test_loss=2.0) for n in range(4)], config=FASTER)
    page = page_of(tmp_path / "a", tmp_path / "b")
    axis = page.chart("Training loss of the sampled clients")["layout"]["yaxis"]
    assert axis["range"] == [0, pytest.approx(2.2)]
    assert axis["title"]["text"] == "nats, cut at 2.2"
    assert "range" not in page.chart("Test loss")["layout"]["yaxis"]


def test_a_small_line_cuts_no_other_off(tmp_path):
    for place, accuracy in enumerate((0.01, 0.9, 0.98)):
        rows = [round_row(n, test_accuracy=accuracy, test_loss=0.001 if place == 0 else 2.0) for n in range(4)]
        make(tmp_path / f"a{place}", rows, config=SERIAL.override({"training.lr": 0.1 + place}))
    page = page_of(tmp_path / "*", target={"test_loss": 0.0005})
    for title in ("Test accuracy", "Test loss"):
        assert "range" not in page.chart(title)["layout"]["yaxis"]


def test_a_target_is_never_beyond_the_axis(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b", [round_row(n, test_loss=10.0**n) for n in range(4)], config=FASTER)
    page = page_of(tmp_path / "*", target={"test_loss": 5.0})
    assert page.chart("Test loss")["layout"]["yaxis"]["range"] == [0, pytest.approx(5.5)]


def test_a_run_that_diverged_is_not_told_to_go_on(tmp_path):
    folder = make(tmp_path / "a", status="failed", error="DivergedError: round 4: not finite")
    assert "To go on" not in page_of(folder).text[""]


def test_a_run_without_its_clients_is_shown_without_them(tmp_path):
    folder = make(tmp_path / "a")
    shutil.rmtree(folder / "clients.parquet")
    with pytest.warns(FedsimWarning, match=r"clients\.parquet is missing"):
        page = page_of(folder)
    assert "Rows are missing" in page.text[""]
    assert page.trace("Test accuracy", "a")
    assert "Participation" not in page.text


def test_few_clients_have_whole_numbers(tmp_path):
    config = SERIAL.override({"clients.count": 1, "clients.per_round": 1})
    page = Page(fedsim.report(fedsim.run(config, results=None), tmp_path / "page.html"))
    assert page.chart("Labels of each client")["layout"]["xaxis"]["dtick"] == 1
    assert "The only client was sampled in 3 of 3 rounds." in page.text["Participation"]


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = make(tmp_path / "a")
    (folder / "report.html").write_text("<!doctype html> the old one")

    def full(*given, **named):
        raise OSError(28, "No space left on device", str(folder / "report.html"))

    monkeypatch.setattr("fedsim.reporting.publish", full)
    with pytest.raises(RunFolderError, match=r"cannot write .*report.html: No space left on device"):
        fedsim.report(folder)
    assert (folder / "report.html").read_text() == "<!doctype html> the old one"


@pytest.mark.parametrize(
    ("where", "message"), [("folder", "is a folder; name a file"), ("no/where.html", "cannot write")]
)
def test_a_file_that_cannot_be(tmp_path, where, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunFolderError, match=message):
        fedsim.report(make(tmp_path / "a"), tmp_path / where)


def command(*words):
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *map(str, words)])
    return ended.value.code


@pytest.mark.long
def test_the_command_says_where_it_is(tmp_path, capsys):
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert command("a", "--results", tmp_path) == 0
    assert f"{tmp_path / 'a' / 'report.html'}: 4." in capsys.readouterr().out.replace("\n", "")
    assert command("a", tmp_path / "b", "--results", tmp_path, "--target", "test_accuracy=0.5") == 0
    assert "Rounds to target" in Page(tmp_path / "report.html").text
    (tmp_path / "report.html").unlink()
    assert command(tmp_path) == 0, "a sweep's folder is all its runs"
    assert "2 runs" not in (words := Page(tmp_path / "report.html").text[""])
    assert "a, b" in words
    assert command("a", "--results", tmp_path, "--output", tmp_path / "own.html") == 0
    assert (tmp_path / "own.html").exists()


def test_the_command_warns_of_a_damaged_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command line replaces
    part = make_damaged(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert command("a", "--results", tmp_path) == 0
    assert f"fedsim: {part} is damaged: " in capsys.readouterr().err
    assert "Rows are missing" in Page(tmp_path / "a" / "report.html").text[""]


PART = "rounds.parquet/part-000000-000003.parquet"


@pytest.mark.parametrize("words", [["a", "b"], ["."]], ids=str)
@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: (folder / PART).write_bytes(b"PAR1"),
        lambda folder: (folder / "run.json").write_text("{"),
        lambda folder: (folder / "config.toml").write_text("rounds = 'many'"),
    ],
)
def test_of_several_runs_one_that_cannot_be_read_is_left_out(tmp_path, capsys, monkeypatch, words, break_it):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a")
    break_it(make(tmp_path / "b"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert command(*words, "--results", tmp_path, "--output", "page.html") == 0
    said = capsys.readouterr().err
    assert re.search(r"\bb\b", said)
    assert "this run is left out" in said
    assert len(said.splitlines()) == 1
    page = Page(tmp_path / "page.html")
    assert [trace["name"] for trace in page.chart("Test accuracy")["data"]] == ["a"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / PART).write_bytes(b"PAR1"), "not a round of a can be read"),
        (lambda folder: rewrite(folder / PART, lambda rows: as_version(rows, 999)), "update fedsim"),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json is damaged"),
        (lambda folder: (folder / "run.json").unlink(), "`fedsim runs` lists them"),
        (lambda folder: (folder / "config.toml").write_text("rounds = 'many'"), "rounds"),
        (lambda folder: (folder / "config.toml").unlink(), "config.toml"),
    ],
)
def test_a_run_that_cannot_be_read(tmp_path, capsys, break_it, message):
    folder = make(tmp_path / "a")
    break_it(folder)
    assert command("a", "--results", tmp_path) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) <= 2
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "`fedsim runs` lists them"),
        (["a", "--target", "0.9"], "is no target"),
        ([], "Missing argument"),
    ],
)
def test_a_mistake_has_exit_code_2(tmp_path, capsys, words, message):
    make(tmp_path / "a")
    assert command(*words, "--results", tmp_path) == 2
    assert message in capsys.readouterr().err
