"""scripts/reproduce_mcmahan2017.py: the plan is the paper's, and the search does what the plan says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from helpers import wait_until
from hypothesis import given
from hypothesis import strategies as st

import fedsim
import reproduce_mcmahan2017
from fedsim import datasets, models
from fedsim.experiment import prepare
from fedsim.recording import Recording
from fedsim.statistics import interval
from fedsim.training import Examples, Sgd, local_sgd
from mcmahan2017 import dead, page, variants
from mcmahan2017 import plan as plans
from mcmahan2017 import store as store_module
from mcmahan2017 import work as work_module
from mcmahan2017.dead import is_dead
from mcmahan2017.search import Done, Task, chosen_rate, next_tasks
from mcmahan2017.store import KEY, Store, write
from mcmahan2017.work import Finished, work

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


def finished(cell, rate, seed, rounds_to_target):
    row = {"cell": cell.name, "lr": rate, "seed": seed, "rounds_to_target": rounds_to_target, "best_accuracy": 0.9}
    row |= {"rounds": 3, "seconds": 1.0, "machine": "a machine", "versions": "some versions"}
    key = {"cell": cell.name, "lr": rate, "seed": seed}
    curve = pd.DataFrame({"round": [0, 1, 2, 3], "test_accuracy": [0.1, 0.9, 0.95, 0.98]}).assign(**key)
    return Finished(row, curve.astype({"test_accuracy": "float32"}))


def store_of(folder, cell, verdict):
    """A store with a search whose best rate is 0.1, and these rounds of seeds 1, 2, ... ."""
    store = Store(folder)
    for rate, rounds in ((0.1, 80.0), (0.215, math.nan), (0.0464, math.nan)):
        store.add(finished(cell, rate, 0, rounds))
    for seed, rounds in enumerate(verdict, start=1):
        store.add(finished(cell, 0.1, seed, rounds))
    return store


@pytest.mark.parametrize(
    ("verdict", "expected", "ratio"),
    [
        ([87.0, 80.0, 94.0], "inside", 1.0),
        ([0.8 * 87] * 3, "inside", 0.8),
        ([0.79 * 87] * 3, "outside", 0.79),
        ([1.26 * 87] * 3, "outside", 1.26),
        ([87.0, 87.0, math.nan], "outside", math.nan),
        ([87.0, 87.0], "running", math.nan),
    ],
)
def test_verdicts_by_hand(tmp_path, verdict, expected, ratio):
    found = page.outcome(PLAN, CELL, store_of(tmp_path, CELL, verdict))
    assert found.verdict == expected
    assert found.ratio == pytest.approx(ratio, nan_ok=True)
    assert found.rate == 0.1
    assert not found.is_at_edge


def test_cells_without_a_published_number_have_no_ratio(tmp_path):
    cell = CELLS["table1-2nn-iid-E1-Binf-C0.5"]
    store = Store(tmp_path)
    for rate, rounds in ((0.215, 900.0), (0.1, math.nan), (0.464, math.nan)):
        store.add(finished(cell, rate, 0, rounds))
    for seed in (1, 2, 3):
        store.add(finished(cell, 0.215, seed, 900.0))
    assert page.outcome(PLAN, cell, store).verdict == "reached"
    assert page.outcome(PLAN, CELL, store).verdict == "not run"


@pytest.mark.parametrize(
    ("name", "verdict", "expected"),
    [
        ("table1-2nn-iid-E1-B10-C0.1", [99.0, 99.5, 99.9], "99.5 [98.3, 100.6]"),
        ("table1-2nn-iid-E1-B10-C0.1", [100.4, 100.4, 100.4], "100 [100, 100]"),  # in the paper 87
        ("table1-2nn-iid-E1-Binf-C0.0", [80.0, 80.0, 80.0], "80.0 [80.0, 80.0]"),  # 1,455
        ("table1-2nn-iid-E1-Binf-C0.5", [1000.4, 1000.4, 1000.4], "1,000 [1,000, 1,000]"),  # none
    ],
)
def test_rounds_are_rounded_by_their_mean(name, verdict, expected):
    outcome = page.Outcome(CELLS[name], "inside", rounds=interval(verdict), num_reached=3)
    assert page._row(outcome)[2] == expected


@pytest.mark.long
def test_the_page_is_made_from_the_files(tmp_path):
    page.write(PLAN, store_of(tmp_path, CELL, [87.0, 80.0, 94.0]))
    text = (tmp_path / "README.md").read_text()
    assert "**1 of 53 published numbers have been run to a verdict: 1 inside the band, 0 outside.**" in text
    assert "| IID, 1, 10, 0.1 | 87 | 87.0 [69.6, 104.4] | 1.00 | 0.1 | inside |" in text
    assert text.count("| not run |") == 57
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    page.write(PLAN, Store(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_readme_shows_what_is_published():
    lines = page.overview(PLAN, Store(reproduce_mcmahan2017.PUBLISHED))
    assert len(lines) == 2 + 5
    readme = (reproduce_mcmahan2017.ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in readme, "the README's table should be:\n" + "\n".join(lines)


@pytest.mark.long
def test_the_published_page_is_that_of_the_published_runs(tmp_path):
    for path in reproduce_mcmahan2017.PUBLISHED.glob("*.parquet"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page.write(PLAN, Store(tmp_path))
    published = (reproduce_mcmahan2017.PUBLISHED / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == published, "run the script with --report"


SMALL = replace(CELL, target=0.5)


class Small:
    """A cell on synthetic data, in one of whose rounds the target is reached."""

    def __init__(self, changes):
        self.changes = changes

    def __getattr__(self, name):
        return getattr(SMALL, name)

    def config(self, rate, seed, rounds):
        changes = {"data.dataset": "synthetic", "model.name": "logistic", "clients.count": 10, "clients.per_round": 5}
        return SMALL.config(rate, seed, rounds).override(changes | self.changes)


def test_a_run_is_made_goes_on_and_comes_to_its_end(tmp_path, monkeypatch):
    task = Task(Small({"training.lr": 0.02}), "search", 0.02, 0, 30)
    whole = work(task, tmp_path / "whole", time.time() + 100)
    assert whole.row["rounds_to_target"] <= whole.row["rounds"] < 30
    assert whole.curve["round"].tolist() == list(range(whole.row["rounds"] + 1))
    assert (whole.row["cell"], whole.row["lr"], whole.row["seed"]) == (CELL.name, 0.02, 0)
    assert work(task, tmp_path / "late", time.time()) is None
    write = fedsim.results.RunWriter.write

    def stopping(self, record, *rest, **named):
        write(self, record, *rest, **named)
        if record.round == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fedsim.results.RunWriter, "write", stopping)
        assert work(task, tmp_path / "broken", time.time() + 100) is None
    again = work(task, tmp_path / "broken", time.time() + 100)
    assert again.row["weights_sha256"] == whole.row["weights_sha256"]
    assert again.curve.equals(whole.curve)
    assert again.row["machine"] == whole.row["machine"]


def test_a_run_that_went_on_elsewhere_says_so(tmp_path):
    task = Task(Small({"training.lr": 0.02}), "search", 0.02, 0, 30)
    here = work(task, tmp_path, time.time() + 100).row
    path = tmp_path / CELL.name / "lr0.02-seed0" / "run.json"
    info = json.loads(path.read_text())
    here_too = {"machine": info["machine"], "versions": info["versions"]}
    parts = [
        here_too | {"from_round": 2, "device": "cuda (A GPU)", "numerics_fingerprint": "ab"},
        here_too | {"from_round": 4, "device": "cuda (A GPU)", "numerics_fingerprint": "ab"},
        here_too
        | {
            "from_round": 5,
            "device": "cpu",
            "numerics_fingerprint": "cd",
            "versions": info["versions"] | {"torch": "9"},
        },
    ]
    path.write_text(json.dumps(info | {"resumes": parts}))
    row = work(task, tmp_path, time.time() + 100).row
    machine, versions = here["machine"], here["versions"]
    assert row["machine"] == f"{machine}; from round 2 on {machine}, cuda (A GPU); from round 5 on {machine}"
    assert row["versions"] == f"{versions}; from round 5 on {versions.replace(info['versions']['torch'], '9')}"
    fingerprint = info["numerics_fingerprint"]
    assert here["numerics_fingerprint"] == fingerprint
    assert row["numerics_fingerprint"] == f"{fingerprint}; from round 2 on ab; from round 5 on cd"
    assert row["weights_sha256"] == here["weights_sha256"]


def test_a_rate_that_diverges_has_not_reached_it(tmp_path):
    task = Task(Small({"training.lr": 1e30, "model.name": "mlp"}), "search", 0.1, 0, 30)
    found = work(task, tmp_path, time.time() + 100)
    assert math.isnan(found.row["rounds_to_target"])
    assert found.row["status"] == "failed"


@pytest.mark.parametrize("place", [1, 3])  # of the two layers below a ReLU
def test_a_model_that_no_image_reaches_is_dead_and_stays_so(monkeypatch, place):
    data = datasets.load("synthetic")
    module = models.MODELS["2nn"](data.input_shape, data.num_classes)
    rounds, config = pd.DataFrame({"test_accuracy": [0.5, 0.1]}), fedsim.Config().override({"data.dataset": data.name})
    run = SimpleNamespace(rounds=rounds, status="interrupted", config=config, model=lambda: module)
    assert not is_dead(run)
    module[place].bias.data -= 1e3
    assert is_dead(run)
    with monkeypatch.context() as patch:  # by less than rounding may change
        patch.setattr(dead, "_MARGIN", 1e4)
        assert not is_dead(run)
    assert not is_dead(replaced(run, status="failed"))
    assert not is_dead(replaced(run, rounds=rounds[:1]))
    below = [parameter.clone() for parameter in module[: place + 1].parameters()]
    examples = Examples(torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels))
    before = module[5].bias.clone()
    local_sgd(module, examples, [torch.arange(500)] * 2, batch_size=10, sgd=Sgd(lr=0.5))
    assert not torch.equal(module[5].bias, before)
    assert all(map(torch.equal, module[: place + 1].parameters(), below))
    assert is_dead(run)


def replaced(run, **changes):
    return SimpleNamespace(**{**vars(run), **changes})


def test_an_interrupted_run_that_is_dead_has_ended(tmp_path, monkeypatch):
    task = Task(Small({"training.lr": 0.02}), "search", 0.02, 0, 30)
    monkeypatch.setattr(work_module, "is_dead", lambda run: len(run.rounds) == 3)
    config = task.cell.config(task.rate, task.seed, task.rounds)
    with Recording.of(config, results=tmp_path / CELL.name, name="lr0.02-seed0") as recording:
        next(record for record in recording if record.round == 2)
    row = work(task, tmp_path, time.time() + 100).row
    assert (row["status"], row["rounds"]) == ("dead", 2)
    assert math.isnan(row["rounds_to_target"])
    store = Store(tmp_path)
    store.add(Finished(row, pd.DataFrame({"cell": [], "lr": [], "seed": [], "round": []})))
    assert f"{CELL.name} at rate 0.02 (ended with round 2) cannot get there" in "\n".join(page._page(PLAN, store, []))


def test_a_run_that_was_added_half_is_added_once(tmp_path, monkeypatch):
    Store(tmp_path).add(finished(CELL, 0.1, 1, 30.0))
    with monkeypatch.context() as patch:  # killed between the two files
        patch.setattr(store_module, "write", lambda path, frame: path.stem == "runs" or write(path, frame))
        Store(tmp_path).add(finished(CELL, 0.1, 2, 40.0))
    store = Store(tmp_path)
    assert [run.seed for run in store.done(CELL)] == [1]
    store.add(finished(CELL, 0.1, 2, 40.0))
    whole = Store(tmp_path)
    assert whole.curves.groupby(KEY).size().tolist() == [4, 4]
    assert [run.seed for run in whole.done(CELL)] == [1, 2]


def test_a_bug_is_not_taken_for_that(tmp_path):
    task = Task(Small({"data.dataset": "nothing"}), "search", 0.1, 0, 30)
    with pytest.raises(Exception, match="nothing"):
        work(task, tmp_path, time.time() + 100)


@pytest.mark.parametrize(
    ("make", "deviations", "bias"),
    [
        (variants.glorot, [0.045, 0.071, 0.098], 0.0),
        (variants.tutorial, [0.088] * 3, 0.1),
        (variants.he, [0.0505, 0.1, 0.1], 0),
        (variants.tutorial_cnn, [0.088] * 4, 0.1),
    ],
)
def test_initialisations_by_hand(make, deviations, bias):
    """Glorot uniform: sqrt(2 / (in + out)); a normal cut at two deviations keeps 0.88 of its own; He: sqrt(2 / in)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [layer for layer in make((1, 28, 28), 10).children() if list(layer.parameters(recurse=False))]
    assert [float(layer.weight.detach().std()) for layer in layers] == pytest.approx(deviations, rel=0.05)
    assert all(bool((layer.bias == bias).all()) for layer in layers)


@pytest.mark.long
@pytest.mark.mnist
def test_pixels_are_scaled_as_said():
    data, plain = variants.VARIANTS["pixels of mean 0 and deviation 1"]["dataset"](), datasets.load("mnist")
    assert float(data.train_images.mean()) == pytest.approx(0, abs=1e-3)
    assert float(data.train_images.std()) == pytest.approx(1, abs=1e-3)
    assert (data.train_labels == plain.train_labels).all()


def test_a_variant_changes_one_thing():
    """But for pixels in -1..1 at other rates: whether they explain the difference also where each has its best one.

    In the last trial what changes is the model, at the rate that its cell's search chose.
    """
    tried = variants.trials(plans.read())
    plain = tried[0]
    *tried, cnn = tried
    assert (cnn.cell.model, cnn.model, cnn.dataset) == ("cnn", variants.tutorial_cnn, None)
    assert cnn.rate == chosen_rate(plans.read(), cnn.cell, Store(reproduce_mcmahan2017.PUBLISHED).done(cnn.cell))
    for trial in tried:
        changed = [trial.rate != plain.rate, trial.model is not None, trial.dataset is not None]
        is_plain = trial.cell == plain.cell and not trial.variant.startswith("pixels in -1..1")
        assert sum(changed) == (trial is not plain) if is_plain else changed[2]
        assert len(trial.seeds) >= 3
    names = [(trial.cell.name, trial.variant) for trial in (*tried, cnn)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("rate", "is_there"), [(0.02, True), (1e38, False)])
def test_a_variant_that_diverges_has_not_reached_its_target(rate, is_there):
    trial = variants.Trial(Small({"training.lr": rate}), "a rate", rate, None, None, (1,), 30)
    row = variants.run(trial, 1)
    assert (not math.isnan(row["rounds_to_target"])) == is_there
    assert (row["cell"], row["variant"], row["seed"]) == (CELL.name, "a rate", 1)
    assert row["seconds"] > 0


def test_interrupted_variants_go_on(tmp_path, monkeypatch):
    made, allowed, kept, write = [], 7, [], variants.store.write

    def writing(path, frame):
        write(path, frame)
        kept.append(len(frame))

    def run(trial, seed):
        if len(made) == allowed:
            wait_until(lambda: len(kept) == allowed)
            raise KeyboardInterrupt
        made.append((trial.cell.name, trial.variant, seed))
        rounds = {"rounds_to_target": float(seed), "first_round_at_target": float(seed), "seconds": 1.0}
        return {"cell": trial.cell.name, "variant": trial.variant, "seed": seed, **rounds}

    monkeypatch.setattr(variants, "run", run)
    monkeypatch.setattr(variants.store, "write", writing)
    the_plan = plans.read()
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        variants.measure(the_plan, tmp_path, pool)
    allowed = math.inf
    with ThreadPoolExecutor(1) as pool:
        variants.measure(the_plan, tmp_path, pool)
    trials = variants.trials(the_plan)
    assert sorted(made) == sorted((t.cell.name, t.variant, seed) for t in trials for seed in t.seeds), "each once"
    assert next(variants.rows(tmp_path, trials)) == (
        trials[0].variant,
        "3.0 [1.0, 5.0]",
        "1.0, 2.0, 3.0, 4.0, 5.0",
        "0.03",
    )


@pytest.mark.parametrize("what", ["a file", "a damaged one"])
def test_a_place_that_cannot_be_used_is_refused(tmp_path, capsys, what):
    output = tmp_path / "out"
    if what == "a file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "runs.parquet").write_bytes(b"torn")
    with pytest.raises(SystemExit) as ended:
        reproduce_mcmahan2017.main(["--output", str(output)])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--output {output}: File exists; name a folder" in said if what == "a file" else "cannot be read" in said


@pytest.mark.parametrize("option", ["--output", "--runs"])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_place_that_cannot_be_made_is_refused(tmp_path, capsys, option, below):
    (tmp_path / "file").write_text("mine")
    folders = {"--output": tmp_path / "out", "--runs": tmp_path / "runs"} | {option: tmp_path / "file" / below}
    with pytest.raises(SystemExit) as ended:
        reproduce_mcmahan2017.main(["--hours", "0", *(str(word) for pair in folders.items() for word in pair)])
    assert ended.value.code == 2
    assert f"{option} {folders[option]}: " in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_cells_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        reproduce_mcmahan2017.main(["--cells", "table2-*", "table3-*"])
    assert ended.value.code == 2
    assert "no cell 'table3-*'; there are table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jobs", "0"], "--jobs 0: give a number of processes, from 1"),
        (["--jobs", "-2", "--variants"], "--jobs -2: give"),
        (["--hours", "-1"], "--hours -1: give a number of hours, from 0"),
        (["--hours", "nan"], "--hours nan: give"),
        (["--report"], "--report: nothing has been run into"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_refused_before_anything_is_made(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(reproduce_mcmahan2017, "reproduce", None)
    monkeypatch.setattr(variants, "measure", None)
    with pytest.raises(SystemExit) as ended:
        reproduce_mcmahan2017.main([*words, "--output", str(tmp_path / "new"), "--runs", str(tmp_path / "runs")])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_help_says_where_things_are_written(capsys):
    with pytest.raises(SystemExit) as ended:
        reproduce_mcmahan2017.main(["--help"])
    assert ended.value.code == 0
    said = "".join(capsys.readouterr().out.split())
    for folder in (reproduce_mcmahan2017.PUBLISHED, reproduce_mcmahan2017.RUNS):
        assert f"(default:{folder})" in said


def test_several_patterns_are_taken_in_the_order_of_cost(tmp_path, monkeypatch):
    taken = []

    def reproduce(plan, cells, *rest, on_gpu):
        assert not on_gpu
        taken.extend(cell.name for cell in cells)

    monkeypatch.setattr(reproduce_mcmahan2017, "reproduce", reproduce)
    named = ["table1-2nn-iid-E1-B10-C1.0", "table1-2nn-iid-E1-B10-C0.*"]
    reproduce_mcmahan2017.main(["--cells", *named, "--output", str(tmp_path)])
    assert taken == [cell.name for cell in PLAN.cells if cell.name.startswith("table1-2nn-iid-E1-B10-")]
    assert len(taken) == 5


def test_a_gpu_that_is_not_there_is_said_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce_mcmahan2017, "gpus", lambda: 0)
    with pytest.raises(SystemExit) as ended:
        reproduce_mcmahan2017.main(["--gpu", "--output", str(tmp_path / "new")])
    assert ended.value.code == 2
    assert "--gpu: torch finds no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    for other in ("--variants", "--report"):
        with pytest.raises(SystemExit):
            reproduce_mcmahan2017.main(["--gpu", other, "--output", str(tmp_path / "new")])
        assert "--gpu is for the cells" in capsys.readouterr().err
    monkeypatch.setattr(reproduce_mcmahan2017, "gpus", lambda: 1)
    monkeypatch.setattr(reproduce_mcmahan2017, "reproduce", lambda *rest, on_gpu: taken.append(on_gpu))
    taken = []
    reproduce_mcmahan2017.main(["--gpu", "--output", str(tmp_path)])
    assert taken == [True]


def test_two_at_a_time_would_overwrite_each_other(tmp_path, capsys):
    with reproduce_mcmahan2017._alone(tmp_path) as is_alone:
        assert is_alone
        with pytest.raises(SystemExit) as ended:
            reproduce_mcmahan2017.main(["--output", str(tmp_path), "--hours", "0"])
    assert ended.value.code == 2
    assert f"another reproduction writes into {tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    reproduce_mcmahan2017.main(["--output", str(tmp_path), "--hours", "0"])
    assert (tmp_path / "README.md").exists()


@pytest.mark.long
def test_workers_end_with_the_script_however_it_ends():
    code = (
        "import sys, time, os; sys.path.insert(0, 'scripts'); import reproduce_mcmahan2017 as r\n"
        "with r._pool(1) as pool:\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 60).result()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=reproduce_mcmahan2017.ROOT, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        worker = psutil.Process(int(script.stdout.readline()))
        script.kill()
    assert psutil.wait_procs([worker], timeout=20)[1] == []
