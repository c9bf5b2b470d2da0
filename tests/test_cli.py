"""The command line: what it prints, writes and answers with, in this process and as the user starts it."""

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
import tomllib
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import nn

import fedsim
from fedsim import cli, models
from fedsim.cli.terminal import mishaps
from fedsim.config import Config, keys
from fedsim.datasets import DATASETS
from fedsim.metrics import RoundRecord
from fedsim.partition import PARTITIONERS
from fedsim.presets import PRESETS
from fedsim.run_folder import lock
from fedsim.sampling import SAMPLERS
from fedsim.strategies import STRATEGIES


def sets(*changes):
    return [argument for change in changes for argument in ("--set", change)]


QUICK = sets("data.dataset=synthetic", "placement.mode=serial", "model.name=logistic", "training.local_epochs=1")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, no Ray and no data set in sight; the process is left as it was."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "data"))
    handlers, hook = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, sys.excepthook
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.excepthook = hook


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys):
    """Runs a command in this process."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        return Answer(end.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def start():
    """Starts a command as the user does, with Ctrl-C as a terminal has it; none outlives its test."""
    processes = []

    def start(*arguments, **more):
        command = [sys.executable, "-m", "fedsim", *arguments]
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and hand that on
        try:
            process = subprocess.Popen(command, text=True, **more)
        finally:
            signal.signal(signal.SIGINT, before)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def listing(folder):
    """Every file and folder below, and what is in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def info(folder):
    return json.loads((Path(folder) / "run.json").read_text())


def written(folder="results/mnist"):
    return tomllib.loads((Path(folder) / "config.toml").read_text())


# --- A run -----------------------------------------------------------------------------------------------------------


def test_a_run_prints_its_rounds_its_path_its_accuracy_and_how_to_read_it(call):
    answer = call("run", *QUICK, *sets("rounds=3", "evaluation.every=2"))
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert len(lines) == 1 + 4 + 2
    assert lines[0] == "mnist: 10 clients in this process"
    number = r"\d+\.\d\d"
    for r, line in enumerate(lines[1:5]):
        accuracy = "" if r == 1 else r"  test_accuracy 0\.\d{4}"
        assert re.fullmatch(rf"round {r}/3{accuracy}  {number} s", line)
    frame = eval_last(lines[-1])
    assert frame["round"].tolist() == [0, 1, 2, 3]
    accuracy = frame["test_accuracy"].iloc[-1]
    assert re.fullmatch(rf"results/mnist: test accuracy {accuracy:.4f} after 3 rounds \(\d+\.\d s\)", lines[-2])
    assert info("results/mnist")["status"] == "finished"
    assert accuracy > frame["test_accuracy"].iloc[0]


def eval_last(line):
    """Executes a line of statements, and gives the value of the last one, as a notebook would."""
    statements, _, last = line.rpartition(";")
    names = {}
    exec(statements, names)
    return eval(last, names)


def test_quiet_prints_the_outcome_alone(call):
    answer = call("run", *QUICK, *sets("rounds=1"), "--quiet")
    assert (answer.code, answer.err) == (0, "")
    first, last = answer.out.splitlines()
    assert first.startswith("results/mnist: test accuracy 0.")
    assert "after 1 round (" in first
    assert eval_last(last)["round"].tolist() == [0, 1]


@pytest.mark.parametrize("results", ["other", "a b", "it's here", "deep/er", "ü"])
def test_the_outcome_can_be_read_wherever_it_is(call, results):
    answer = call("run", *QUICK, *sets("rounds=0"), "--results", results, "--quiet")
    first, last = answer.out.splitlines()
    assert first.startswith(f"{results}/mnist: test accuracy 0.")
    assert eval_last(last)["round"].tolist() == [0]


@pytest.mark.parametrize("results", ["a[b]c", ":cat:"])
def test_a_path_is_printed_as_it_is(call, results):
    answer = call("run", *QUICK, *sets("rounds=0"), "--results", results, "--quiet")
    first, last = answer.out.splitlines()
    assert first.startswith(f"{results}/mnist: test accuracy 0.")
    assert eval_last(last)["round"].tolist() == [0]


def test_a_run_gets_its_name_from_the_option_else_from_the_experiment(call):
    for _ in range(2):
        assert call("run", "seed", *QUICK, *sets("rounds=0")).code == 0
    assert call("run", *QUICK, *sets("rounds=0", "name=mine")).code == 0
    assert call("run", *QUICK, *sets("rounds=0"), "--name", "own.1").code == 0
    assert {path.name for path in Path("results").iterdir()} == {"seed", "seed-2", "mine", "own.1"}


def test_overwrite_replaces_a_run(call):
    for rounds in (3, 1):
        answer = call("run", *QUICK, *sets(f"rounds={rounds}"), "--name", "a", "--overwrite")
        assert answer.code == 0
    assert [path.name for path in Path("results").iterdir()] == ["a"]
    assert len(pd.read_parquet("results/a/rounds.parquet")) == 2


def test_an_experiment_is_a_toml_file(call):
    text = """
    rounds = 1
    seed = 5
    [data]
    dataset = "synthetic"
    [data.partition]
    name = "dirichlet"
    alpha = 0.5
    [placement]
    mode = "serial"
    """
    for file, name in (("experiment.toml", "experiment"), ("no-suffix", "no-suffix")):
        Path(file).write_text(text)
        assert call("run", file, "--set", "rounds=2").code == 0
        config = written(f"results/{name}")
        assert (config["name"], config["rounds"], config["seed"]) == (name, 2, 5)
        assert config["data"]["partition"] == {"name": "dirichlet", "alpha": 0.5, "min_examples": 1}
    loaded = fedsim.load_run("results/experiment")
    assert loaded.config == Config.from_toml(Path("results/experiment/config.toml"))
    assert len(loaded.rounds) == 3


@pytest.mark.parametrize(
    ("change", "section", "value"),
    [
        ("training.lr=0.05", "training", 0.05),
        ("training.lr=1e-3", "training", 1e-3),
        ("training.lr=1", "training", 1.0),
        ("clients.count=1_000", "clients", 1000),
        ("clients.per_round=0.5", "clients", 0.5),
        ("clients.per_round=3", "clients", 3),
        ("clients.per_round=all", "clients", "all"),
        ('clients.per_round="all"', "clients", "all"),
        ("clients.per_round='all'", "clients", "all"),
        ("evaluation.clients=false", "evaluation", False),
        ("evaluation.clients=true", "evaluation", True),
        ("model.name=2nn", "model", "2nn"),
        ("strategy.name=fedavgm", "strategy", "fedavgm"),
        ("training.lr = 0.5", "training", 0.5),
        ("strategy.weighting = uniform", "strategy", "uniform"),
        ("placement.address=a=b", "placement", "a=b"),
        ("placement.address=10.0.0.1:6379", "placement", "10.0.0.1:6379"),
        ("checkpoint.keep=all", "checkpoint", "all"),
    ],
)
def test_a_value_is_toml_or_else_a_string(call, change, section, value):
    answer = call("run", *QUICK, *sets("rounds=0", change))
    assert (answer.code, answer.err) == (0, "")
    found = written()[section][change.partition("=")[0].strip().partition(".")[2]]
    assert (found, type(found)) == (value, type(value))


def test_the_last_change_of_a_key_counts(call):
    assert call("run", *QUICK, *sets("rounds=0", "seed=1", "seed=2")).code == 0
    assert written()["seed"] == 2


def test_the_address_option_is_above_the_key(call):
    options = ("--address", "1.2.3.4:5")
    assert call("run", *QUICK, *sets("rounds=0", "placement.address=auto"), *options).code == 0
    assert written()["placement"]["address"] == "1.2.3.4:5"


# --- Wrong input -----------------------------------------------------------------------------------------------------

EACH_AN_ACTOR = ["placement.mode=actor-per-client", "data.partition.name=sampled"]

BAD_INPUT = {
    "unknown key": (sets("training.learning_rate=1"), ["training.learning_rate", "did you mean training.lr?"]),
    "misspelt section": (sets("trainnig.lr=1"), ["trainnig", "did you mean training"]),
    "key in no section": (sets("lr=1"), ["unknown key lr", "did you mean training.lr?"]),
    "word for a number": (sets("rounds=many"), ["rounds = 'many'", "integer"]),
    "fraction for a count": (sets("rounds=1.5"), ["rounds = 1.5", "integer"]),
    "negative": (sets("training.lr=-1"), ["training.lr = -1", "greater than 0"]),
    "not a number": (sets("training.lr=nan"), ["training.lr = nan", "finite"]),
    "zero": (sets("clients.count=0"), ["clients.count = 0", "greater than or equal to 1"]),
    "boolean for a count": (sets("clients.count=true"), ["clients.count = True", "integer"]),
    "list for a count": (sets("clients.count=[1, 2]"), ["clients.count = [1, 2]", "integer"]),
    "number for a boolean": (sets("evaluation.clients=1"), ["evaluation.clients = 1", "true or false"]),
    "Python's boolean": (sets("evaluation.clients=False"), ["evaluation.clients = 'False'", "true or false"]),
    "cohort above count": (sets("clients.per_round=11"), ["per_round = 11", "count = 10"]),
    "cohort above one": (sets("clients.per_round=1.5"), ["clients.per_round = 1.5", '"all"', "fraction"]),
    "more clients than data": (sets("clients.count=2001"), ["2001 clients", "2000 training examples"]),
    "no equals sign": (sets("rounds"), ["--set rounds", "key=value"]),
    "no key": (sets("=3"), ["--set =3", "key=value"]),
    "unknown preset": (["mnits"], ["'mnits'", *PRESETS, "did you mean mnist?"]),
    "no such file": (["nothing.toml"], ["nothing.toml: No such file", "`fedsim presets` lists"]),
    "folder": (["folder"], ["'folder'", "no preset"]),
    "not toml": (["broken.toml"], ["broken.toml", "not valid TOML", "line 2"]),
    "unknown key in a file": (["wrong.toml"], ["wrong.toml", "clients.number"]),
    "unknown model": (sets("model.name=mpl"), ["model.name = 'mpl'", *models.MODELS, "did you mean mlp?"]),
    "unknown partition": (sets("data.partition.name=dirichlett"), ["'dirichlett'", *PARTITIONERS, "mean dirichlet?"]),
    "unknown strategy": (sets("strategy.name=fedavgg"), ["strategy.name = 'fedavgg'", *STRATEGIES]),
    "unknown data set": (sets("data.dataset=minst"), ["data.dataset = 'minst'", *DATASETS, "did you mean mnist?"]),
    "unknown sampler": (sets("clients.sampler=unifrom"), ["'unifrom'", *SAMPLERS, "did you mean uniform?"]),
    "partition argument": (
        sets("data.partition.name=dirichlet", "data.partition.alpha=0"),
        ["data.partition.alpha = 0", "greater than 0"],
    ),
    "unknown partition argument": (
        sets("data.partition.name=dirichlet", "data.partition.alhpa=1"),
        ["data.partition.alhpa", "did you mean alpha?"],
    ),
    "impossible partition": (
        sets("data.partition.name=dirichlet", "data.partition.min_examples=201"),
        ["min_examples = 201", "2010", "at most 200"],
    ),
    "strategy argument": (
        sets("strategy.name=fedadam", "strategy.beta1=1.0"),
        ["strategy.beta1 = 1.0", "less than 1"],
    ),
    "unknown strategy argument": (
        sets("strategy.server_lr=1"),
        ["strategy.server_lr is not known; fedavg takes: none; fedavgm, fedadam take server_lr"],
    ),
    "engine": (sets("training.engine=vmap"), ["training.engine = 'vmap'", "'auto', 'loop' or 'stacked'"]),
    "failure policy": (sets("failures.on_exhausted=skip"), ["failures.on_exhausted = 'skip'", "'stop'", "'drop'"]),
    "name with a path": (["--name", "a/b"], ["'a/b'", "letters, digits"]),
    "name above": (["--name", "../a"], ["'../a'", "letters, digits"]),
    "no name": (["--name", ""], ["''", "letters, digits"]),
    "configured name with a path": (sets("name=a/b"), ["name = 'a/b'", "letters, digits"]),
    "taken name": (["--name", "taken", "--results", "old"], ["old/taken exists already", "--overwrite"]),
    "not a run to overwrite": (["--name", "folder", "--results", ".", "--overwrite"], ["not a run of fedsim"]),
    "results are a file": (["--results", "file"], ["file is not a folder", "--results"]),
    "results below a file": (["--results", "file/below"], ["file/below"]),
    "more CPUs than there are": (
        sets(*EACH_AN_ACTOR, "clients.count=2", "placement.num_cpus=10000"),
        ["2 actors of 10000 CPU", "at most"],
    ),
    "more actors than fit": (
        sets(*EACH_AN_ACTOR, "clients.count=10000", "data.partition.examples_per_client=1", "placement.num_cpus=1"),
        ["10,000 actors"],
    ),
    "actors for clients": (sets(*EACH_AN_ACTOR, "placement.actors=3"), ["placement.actors = 3", "needs 10"]),
    "no share of a CPU": (sets("placement.num_cpus=0.00001"), ["placement.num_cpus", "0.0001"]),
}


@pytest.fixture
def things(workplace):
    """Folders and files that wrong input could damage."""
    Path("old/taken").mkdir(parents=True)
    Path("old/taken/run.json").write_text('{"fedsim_run": 1}')
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("mine")
    Path("file").write_text("mine too")
    Path("broken.toml").write_text("rounds = 3\nseed = = 4\n")
    Path("wrong.toml").write_text("[clients]\nnumber = 3\n")


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_wrong_input_is_answered_in_two_lines_and_writes_nothing(call, workplace, things, arguments, said):
    before = listing(workplace)
    experiment, options = (arguments[:1], arguments[1:]) if not arguments[0].startswith("--") else ([], arguments)
    answer = call("run", *experiment, *QUICK, *options)
    assert answer.code == 2
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert answer.err.startswith("fedsim: ")
    assert 1 <= len(answer.err.splitlines()) <= 2
    for words in said:
        assert words in answer.err
    assert listing(workplace) == before


@pytest.mark.long
@pytest.mark.parametrize("case", ["unknown key", "more clients than data", "unknown model", "more actors than fit"])
def test_plan_refuses_what_run_refuses(call, workplace, case):
    arguments, said = BAD_INPUT[case]
    answer = call("plan", *QUICK, *arguments)
    assert (answer.code, answer.out) == (2, "")
    assert all(words in answer.err for words in said)
    assert "Traceback" not in answer.err
    assert listing(workplace) == {}


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["run", "--bogus"], ["run", "--set"], ["run", "mnist", "seed"], ["data", "bogus"]],
    ids=" ".join,
)
def test_wrong_usage_is_wrong_input(call, workplace, arguments):
    answer = call(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert "Traceback" not in answer.err
    assert "Error: " in answer.err
    assert listing(workplace) == {}


def test_debug_shows_the_traceback(call):
    answer = call("run", "--debug", *sets("clients.count=0"))
    assert answer.code == 2
    assert "Traceback (most recent call last)" in answer.err
    assert "ConfigError: clients.count = 0" in answer.err


# --- Runs that end otherwise -----------------------------------------------------------------------------------------


def break_model(monkeypatch, what, num_clients=10):
    """Puts a model into the table whose second round of training goes wrong: 10 clients of 7 steps come first."""
    batches = []

    class Broken(nn.Linear):
        def forward(self, x):
            batches.extend([len(x)] * self.training)
            if len(batches) > num_clients * 7:
                raise what
            return super().forward(x.flatten(1))

    monkeypatch.setitem(models.MODELS, "logistic", lambda input_shape, num_classes: Broken(784, num_classes))


def test_a_client_that_fails_ends_the_run_with_its_own_traceback(call, monkeypatch):
    break_model(monkeypatch, KeyError("a bug in my model"))
    answer = call("run", *QUICK, *sets("rounds=3"))
    assert answer.code == 1
    assert answer.err.startswith("fedsim: client 0 failed in round 2:\n")
    assert answer.err.count("Traceback (most recent call last)") == 1
    assert "test_cli.py" in answer.err
    assert "in forward" in answer.err
    assert "KeyError: 'a bug in my model'" in answer.err
    assert "in main" not in answer.err  # of fedsim's own way there, nothing
    how = "fedsim replay results/mnist --round 2 --client 0 re-trains it in this process"
    assert answer.err.splitlines()[-1] == how
    assert answer.out.splitlines()[-1].startswith("round 1/3")
    assert info("results/mnist")["status"] == "failed"
    assert "a bug in my model" in info("results/mnist")["error"]
    assert pd.read_parquet("results/mnist/rounds.parquet")["round"].tolist() == [0, 1]


def test_the_command_that_replays_a_client_can_be_pasted(call, monkeypatch):
    with monkeypatch.context() as patch:
        break_model(patch, KeyError("a bug in my model"))
        answer = call("run", *QUICK, *sets("rounds=3"), "--results", "my results")
    command = shlex.split(answer.err.splitlines()[-1].removesuffix(" re-trains it in this process"))
    assert command[:3] == ["fedsim", "replay", "my results/mnist"]
    with monkeypatch.context() as patch:
        break_model(patch, KeyError("a bug in my model"), num_clients=0)  # the failed run left a checkpoint of round 1
        again = call(*command[1:])
    assert (again.code, len(again.out.splitlines())) == (1, 1)
    assert again.err.startswith("fedsim: client 0 failed in round 2:\n")
    assert "KeyError: 'a bug in my model'" in again.err
    with monkeypatch.context() as patch:
        break_model(patch, None, num_clients=10)  # the same tensors: the checkpoint must fit them
        mended = call(*command[1:])
    assert (mended.code, mended.err) == (0, "")
    assert mended.out.splitlines()[-1] == "my results/mnist: the run has no row of it to compare with"


def test_a_run_that_diverges_fails_in_a_line(call):
    answer = call("run", *QUICK, *sets("training.lr=1e38"))
    assert answer.code == 1
    assert len(answer.err.splitlines()) == 1
    assert "round 1" in answer.err
    assert "training.lr = 1e+38" in answer.err
    assert info("results/mnist")["status"] == "failed"


def test_an_interrupted_run_says_what_it_has(call, monkeypatch):
    break_model(monkeypatch, KeyboardInterrupt())
    answer = call("run", *QUICK, *sets("rounds=3"))
    said = "fedsim: interrupted: results/mnist holds the rounds up to 1; fedsim resume results/mnist goes on\n"
    assert (answer.code, answer.err) == (130, said)
    assert info("results/mnist")["status"] == "interrupted"
    assert pd.read_parquet("results/mnist/rounds.parquet")["round"].tolist() == [0, 1]


def test_an_interrupt_before_the_run_begins_writes_nothing(call, monkeypatch, workplace):
    def interrupted(input_shape, num_classes):
        raise KeyboardInterrupt

    monkeypatch.setitem(models.MODELS, "logistic", interrupted)
    answer = call("run", *QUICK)
    assert answer.code == 130
    assert "Traceback" not in answer.err
    assert listing(workplace) == {}


def test_an_error_while_writing_fails_the_run_in_a_line(call, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    answer = call("run", *QUICK)
    assert answer.code in (1, 2)
    assert len(answer.err.splitlines()) == 1
    assert "No space left on device" in answer.err


@pytest.mark.long
def test_ctrl_c_and_sigterm_end_a_run_within_seconds(start):
    """Both at once: most of the time goes into loading torch."""
    numbers, pipes = (signal.SIGINT, signal.SIGTERM), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments = [*QUICK, *sets("rounds=999999")]
    started = [(number, start("run", *arguments, "--name", number.name, **pipes)) for number in numbers]
    for number, process in started:
        assert any(line.startswith("round 2/999999") for line in iter(process.stdout.readline, ""))
        sent = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - sent < 10
        assert process.returncode == 130
        assert "Traceback" not in out + err
        folder = f"results/{number.name}"
        said = rf"fedsim: interrupted: {folder} holds the rounds up to (\d+); fedsim resume {folder} goes on\n"
        last = re.fullmatch(said, err)
        stopped = fedsim.load_run(f"results/{number.name}")
        assert info(stopped.path)["status"] == stopped.status == "interrupted"
        rounds, clients = stopped.rounds, stopped.clients
        # a round that had ended but was not handed on yet may be there too
        assert rounds["round"].tolist() in ([*range(int(last[1]) + 1)], [*range(int(last[1]) + 2)])
        assert clients.groupby("round").size().to_dict() == {r: 10 for r in rounds["round"] if r > 0}
        assert not list(stopped.path.rglob("*.tmp"))


@pytest.mark.long
def test_who_presses_ctrl_c_on_and_on_does_not_break_the_end_off(start):
    process = start(
        "run", *QUICK, *sets("rounds=999999"), "--name", "often", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert any(line.startswith("round 2/999999") for line in iter(process.stdout.readline, ""))
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err.count("\n")) == (130, 1), err
    assert info("results/often")["status"] == "interrupted"


@pytest.mark.long
def test_an_interrupt_that_an_import_swallows_still_ends_the_command():
    code = """
import signal, sys

class Swallowing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException:
                pass

sys.meta_path.insert(0, Swallowing())
from fedsim.cli import main
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "run", *QUICK, *sets("rounds=0")]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == 130
    assert not Path("results").exists()


def test_an_interrupt_that_is_swallowed_later_ends_the_run_after_its_round(call, monkeypatch):
    sent = []

    class Deaf(nn.Linear):
        def forward(self, x):
            if self.training and not sent:
                sent.append(signal.SIGTERM)
                with contextlib.suppress(BaseException):  # as a bare except does, and a library while it is imported
                    signal.raise_signal(signal.SIGTERM)
            return super().forward(x.flatten(1))

    monkeypatch.setitem(models.MODELS, "logistic", lambda input_shape, num_classes: Deaf(784, num_classes))
    answer = call("run", *QUICK, *sets("rounds=3"))
    assert answer.code == 130
    assert info("results/mnist")["status"] == "interrupted"
    assert len(pd.read_parquet("results/mnist/rounds.parquet")) < 4


# --- A run that goes on -----------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(call, monkeypatch):
    """A run that was interrupted in its second round of four."""
    with monkeypatch.context() as patch:
        break_model(patch, KeyboardInterrupt())
        assert call("run", *QUICK, *sets("rounds=4", "training.engine=loop")).code == 130
    break_model(monkeypatch, None, num_clients=1_000)  # from now on it has the same tensors and does no harm
    return Path("results/mnist")


def test_resume_says_where_the_run_goes_on_and_ends_as_run_does(call, interrupted, monkeypatch):
    answer = call("resume", "mnist")
    assert (answer.code, answer.err) == (0, "")
    first, second, *rounds, outcome, how = answer.out.splitlines()
    assert first == "results/mnist: goes on with round 2/4"
    assert second == "mnist: 10 clients in this process"
    assert [line.split()[1] for line in rounds] == ["2/4", "3/4", "4/4"]
    frame = eval_last(how)
    assert frame["round"].tolist() == [0, 1, 2, 3, 4]
    accuracy = f"{frame['test_accuracy'].iloc[-1]:.4f}"
    assert re.fullmatch(rf"results/mnist: test accuracy {accuracy} after 4 rounds \(\d+\.\d s\)", outcome)
    whole = call("run", *QUICK, *sets("rounds=4", "training.engine=loop"), "--name", "whole", "--quiet")
    assert f"test accuracy {accuracy} " in whole.out
    assert fedsim.load_run("results/whole").rounds["weights_sha256"].equals(frame["weights_sha256"])


def test_resume_takes_a_path_and_is_quiet_if_asked_to(call, interrupted):
    answer = call("resume", "results/mnist", "--quiet", *sets("rounds=3"))
    assert (answer.code, answer.err, len(answer.out.splitlines())) == (0, "", 2)
    assert "after 3 rounds" in answer.out


def test_a_finished_run_says_so_and_can_be_extended(call):
    call("run", *QUICK, *sets("rounds=1"), "--quiet")
    before = listing(Path("results"))
    answer = call("resume", "mnist")
    said = "results/mnist: finished after 1 round; --set rounds=N goes on to round N\n"
    assert answer == (0, said, "")
    assert listing(Path("results")) == before
    assert call("resume", "mnist", *sets("rounds=3")).out.startswith("results/mnist: goes on with round 2/3\n")
    assert (written()["rounds"], info("results/mnist")["status"]) == (3, "finished")


def test_a_run_that_was_killed_at_its_end_is_only_ended(call):
    call("run", *QUICK, *sets("rounds=1"), "--quiet")
    path = Path("results/mnist/run.json")
    path.write_text(json.dumps(info("results/mnist") | {"status": "running"}))
    answer = call("resume", "mnist")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith("results/mnist: has all its rounds\n")
    assert "after 1 round" in answer.out
    assert info("results/mnist")["status"] == "finished"


def test_an_interrupted_resume_says_what_it_has(call, interrupted, monkeypatch):
    break_model(monkeypatch, KeyboardInterrupt())
    answer = call("resume", "mnist")
    said = "fedsim: interrupted: results/mnist holds the rounds up to 2; fedsim resume results/mnist goes on\n"
    assert (answer.code, answer.err) == (130, said)


@pytest.mark.parametrize("module", ["fedsim.resumption.prepare", "fedsim.launch.open_pool"])
def test_a_resume_interrupted_before_it_begins_changes_nothing(call, interrupted, monkeypatch, module):
    def interrupting(*arguments, **named):
        raise KeyboardInterrupt

    before = listing(interrupted)
    monkeypatch.setattr(module, interrupting)
    answer = call("resume", "mnist")
    assert (answer.code, answer.err) == (130, "fedsim: interrupted: nothing was changed in results/mnist\n")
    assert listing(interrupted) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "'nothing' is not a run: neither a run's folder nor a name in results; `fedsim runs` lists them"),
        (["foreign"], "foreign is not a run: it has no run.json of fedsim's"),
        (["results"], "results is not a run, it holds runs: name one, such as results/mnist; a sweep goes on when its"),
        (["mnist", *sets("training.lr=0.5")], "training.lr = 0.5, but the run has 0.1"),
        (["mnist", *sets("rounds=0")], "rounds = 0, but results/mnist has done 1 already"),
        (["mnist", *sets("rounds")], "write it as key=value"),
        (["mnist", *sets("placement.mode=parallel")], "placement.mode = 'parallel'"),
        (["mnist", "--address", "127.0.0.1:1", *sets("placement.mode=packed")], "no Ray answers at '127.0.0.1:1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_go_on_is_wrong_input(call, interrupted, arguments, said):
    Path("foreign").mkdir()
    Path("foreign/run.json").write_text("{}")
    before = listing(Path("results"))
    answer = call("resume", *arguments, "--quiet")
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert len(answer.err.splitlines()) == 1
    assert listing(Path("results")) == before


def test_a_running_run_is_refused(call, interrupted):
    with lock(interrupted):
        answer = call("resume", "mnist")
    assert answer.code == 2
    assert answer.err == "fedsim: results/mnist is being written by a running fedsim; wait until that ends\n"


def test_what_differs_is_said_if_the_user_goes_on(call, interrupted):
    path = interrupted / "run.json"
    path.write_text(json.dumps(info(interrupted) | {"versions": info(interrupted)["versions"] | {"torch": "1.0"}}))
    assert "torch 1.0 in the run" in call("resume", "mnist").err
    assert "nevertheless: torch 1.0 in the run" in call("resume", "mnist", "--anyway").out


def test_a_damaged_checkpoint_is_said_in_a_line(call, interrupted):
    path = interrupted / "checkpoint" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        answer = call("resume", "mnist")
    assert answer.code == 0
    assert re.fullmatch(r"fedsim: .*000001\.safetensors is damaged.*; going on with round 0\n", answer.err)


def test_a_full_disk_ends_a_run_with_what_to_do(call, monkeypatch):
    write_bytes, names = Path.write_bytes, []

    def full(path, data):
        names.append(path.name)
        if "000002" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        answer = call("run", *QUICK, *sets("rounds=3", "checkpoint.every_s=0"))
    assert answer.code == 1
    problem, what_to_do = answer.err.splitlines()
    assert re.fullmatch(r"fedsim: cannot write results/mnist/\S+: No space left on device; free some space", problem)
    assert what_to_do == "fedsim resume results/mnist goes on with the run"
    assert call(*shlex.split(what_to_do)[1:3]).code == 0
    assert info("results/mnist")["status"] == "finished"


# --- Rounds computed again -------------------------------------------------------------------------------------------

SERIALLY = sets("placement.mode=serial")


@pytest.fixture
def verified(call):
    call("run", *QUICK, *sets("rounds=3"), "--quiet")
    return Path("results/mnist")


def test_verify_says_the_cost_the_rounds_and_that_they_are_equal(call, verified):
    for run in ("mnist", "results/mnist", verified.resolve()):
        answer = call("verify", run, "--rounds", "1..2", *SERIALLY)
        assert (answer.code, answer.err) == (0, "")
        cost, *rounds, outcome = answer.out.splitlines()
        path = run if isinstance(run, Path) else "results/mnist"
        what = f"{path}: computes rounds 1 to 2 again from round 0, serial where the run was serial; about "
        assert re.fullmatch(rf"{re.escape(what)}\d+\.\d s at the pace of the run", cost)
        assert all(re.fullmatch(rf"round {r}/2  equal  \d+\.\d\d s", line) for r, line in enumerate(rounds))
        assert len(rounds) == 3
        assert outcome == f"{path}: equal, every client's update and the weights of every round"


def test_verify_names_the_first_difference_and_exits_with_1(call, verified):
    break_rows(verified, "clients", update_sha256="0" * 64)
    answer = call("verify", "mnist", *SERIALLY)
    assert (answer.code, answer.err) == (1, "")
    *_, last_round, outcome = answer.out.splitlines()
    assert last_round.startswith("round 1/3  different")
    assert re.fullmatch(
        r"results/mnist: round 1, client 0: update_sha256 was 0{12}\.\.\. in the run and is [0-9a-f]{12}\.\.\. here",
        outcome,
    )


def break_rows(folder, kind, **values):
    for part in (folder / f"{kind}.parquet").glob("part-0*"):
        rows = pq.read_table(part)
        for name, value in values.items():
            field = rows.schema.get_field_index(name)
            rows = rows.set_column(field, name, pa.array([value] * len(rows), rows.schema.types[field]))
        pq.write_table(rows, part)


def test_replay_says_the_cost_what_the_client_did_and_whether_it_is_equal(call, verified):
    answer = call("replay", "mnist", "--round", "3", "--client", "7")
    assert (answer.code, answer.err) == (0, "")
    cost, did, outcome = answer.out.splitlines()
    what = "results/mnist: trains client 7 of round 3 in this process, after rounds 1 to 2 again from round 0; about "
    assert cost.startswith(what)
    clients = pd.read_parquet(verified / "clients.parquet").set_index(["round", "client_id"])
    row = clients.loc[(3, 7)]
    assert did == f"{row.num_steps} steps, train_loss {row.train_loss}, update_sha256 {row.update_sha256}"
    assert outcome == "results/mnist: equal to the recorded row"

    break_rows(verified, "clients", num_steps=99, train_loss=1.5)
    answer = call("replay", "mnist", "--round", "3", "--client", "7")
    assert (answer.code, answer.err) == (1, "")
    told = answer.out.splitlines()[2:]
    assert told[0].startswith("results/mnist: round 1, client 0: num_steps was 99 in the run and is "), "on the way"
    assert told[1:] == [
        f"results/mnist: round 3, client 7: num_steps was 99 in the run and is {row.num_steps} here",
        f"results/mnist: round 3, client 7: train_loss was 1.5 in the run and is {row.train_loss} here",
    ]


def test_anyway_goes_on_and_says_nevertheless_what(call, verified):
    said = json.loads((verified / "run.json").read_text())
    said["versions"]["torch"] = "1.0"
    (verified / "run.json").write_text(json.dumps(said))
    for command in (["verify", "mnist", *SERIALLY], ["replay", "mnist", "--round", "1", "--client", "0"]):
        answer = call(*command)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith("fedsim: results/mnist need not give the same bits here: torch 1.0 in the run, ")
        assert answer.err.splitlines()[1] == "Go on nevertheless with --anyway (from Python: anyway=True)"
        answer = call(*command, "--anyway")
        assert (answer.code, answer.err) == (0, "")
        assert answer.out.splitlines()[1].startswith("nevertheless: torch 1.0 in the run, ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["verify", "mist"], "'mist' is not a run: neither a run's folder nor a name in results"),
        (["replay", "mist", "--round", "1", "--client", "0"], "'mist' is not a run"),
        (["verify", "results"], "results is not a run, it holds runs: name one, such as results/mnist"),
        (["verify", "mnist", "--results", "elsewhere"], "nor a name in elsewhere"),
        (["verify", "mnist", "--rounds", "2..9"], "rounds = 2..9: results/mnist has rounds 1 to 3"),
        (["verify", "mnist", "--rounds", "some"], "write a round such as 1, a range such as 1..2, or all"),
        (
            ["verify", "mnist", *sets("training.lr=1")],
            "--set training.lr: a run is verified with its own configuration",
        ),
        (["verify", "mnist", *sets("placement")], "--set placement: write it as key=value"),
        (["verify", "mnist", *sets("placement.actor=2")], "did you mean placement.actors?"),
        (["verify", "mnist", *sets("placement.threads=2")], "placement.threads 1 in the run, 2 here"),
        (
            ["replay", "mnist", "--round", "4", "--client", "0"],
            "round 4 cannot be replayed: results/mnist has rounds 1",
        ),
        (["replay", "mnist", "--round", "2", "--client", "10"], "client 10 had no part in round 2 of results/mnist"),
        (["replay", "mnist", "--round", "2"], "Missing option '--client'"),
        (["replay", "mnist", "--round", "x", "--client", "0"], "Invalid value for '--round'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_computed_again_is_wrong_input(call, verified, command, said):
    before = listing(Path())
    answer = call(*command)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert len(answer.err.splitlines()) <= (2 if answer.err.startswith("fedsim: ") else 4)  # or of wrong usage
    assert listing(Path()) == before


def test_an_interrupt_ends_one_command_only(call, monkeypatch):
    class Interrupted(nn.Linear):
        def forward(self, x):
            signal.raise_signal(signal.SIGTERM)
            return super().forward(x.flatten(1))

    with monkeypatch.context() as patch:
        patch.setitem(models.MODELS, "logistic", lambda input_shape, num_classes: Interrupted(784, num_classes))
        answer = call("run", *QUICK, *sets("rounds=0"))
    assert (answer.code, answer.err) == (130, "fedsim: interrupted: no round was finished\n")
    assert call("run", *QUICK, *sets("rounds=0")).code == 0


def test_progress_says_what_went_wrong_in_a_round():
    record = RoundRecord(round=1, started_at=datetime.now(UTC), weights_sha256="", round_s=1.0)
    assert mishaps(record) == ""
    assert mishaps(replace(record, num_retries=3)) == "  3 started again"
    assert mishaps(replace(record, num_rejected=1, num_dropped=2)) == "  1 rejected  2 left out"


@pytest.mark.long
def test_a_terminal_shows_a_bar(start):
    main_end, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 160))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = start("run", *QUICK, *sets("rounds=3"), **streams, env={**os.environ, "TERM": "xterm"})
    os.close(terminal)
    shown = b""
    while chunk := read_terminal(main_end):
        shown += chunk
    os.close(main_end)
    assert process.wait(timeout=30) == 0
    text = shown.decode()
    assert "\x1b[" in text  # it moves the cursor
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "mnist: 10 clients in this process" in plain
    assert re.search(r"round 3/3  test accuracy 0\.\d{4}  .*(rounds/s|s/round)", plain)
    assert not re.search(r"^round \d", plain, re.MULTILINE)  # the lines of a log
    accuracy = pd.read_parquet("results/mnist/rounds.parquet")["test_accuracy"].iloc[-1]
    path, reading = plain.splitlines()[-2:]
    assert f"results/mnist: test accuracy {accuracy:.4f} after 3 rounds" in path
    assert len(eval_last(reading)) == 4


def read_terminal(end):
    try:
        return os.read(end, 65536)
    except OSError:  # Linux: the other end is closed
        return b""


# --- The other commands ----------------------------------------------------------------------------------------------


def test_version(call):
    assert call("--version") == (0, f"fedsim {fedsim.__version__}\n", "")


@pytest.mark.long
def test_the_module_is_the_command_and_answers_without_torch():
    code = (
        "import sys; from fedsim.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    for command in (["-m", "fedsim"], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *command, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, f"fedsim {fedsim.__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["plan"],
        ["resume"],
        ["verify"],
        ["replay"],
        ["presets"],
        ["runs"],
        ["data"],
        ["data", "fetch"],
        ["data", "status"],
    ],
    ids=" ".join,
)
def test_each_command_has_help(call, command):
    answer = call(*command, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert " ".join(["Usage: fedsim", *command]) in answer.out
    assert "--help" in answer.out


@pytest.mark.parametrize(
    ("command", "argument"), [("run", "EXPERIMENT"), ("presets", "PRESET"), ("data fetch", "DATASET")]
)
def test_arguments_are_in_capitals(call, command, argument):
    assert f"Usage: fedsim {command} [OPTIONS] [{argument}]\n" in call(*command.split(), "--help").out


def test_the_help_lists_the_commands(call):
    out, names = call("--help").out, ("run", "plan", "resume", "verify", "replay", "presets", "runs", "data")
    assert all(re.search(rf"^ +{name} ", out, re.MULTILINE) for name in names)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_the_help_lists_every_key_with_its_default_and_meaning(call, command):
    out = call(command, "--help").out
    all_keys = list(keys())
    assert len(all_keys) > 30
    for key in all_keys:
        assert f"{key.name} = {json.dumps(key.default)}: {key.description}" in out, "as TOML and --set have it"
    assert "evaluation.clients = false: " in out
    assert all(name in out for name in PRESETS)


def test_the_help_of_run_lists_its_options(call):
    out = call("run", "--help").out
    for option in ("--set", "--name", "--results", "--address", "--overwrite", "--quiet", "--debug"):
        assert re.search(rf"^ +{option}\b", out, re.MULTILINE)


def test_presets_lists_them_with_what_they_are(call):
    answer = call("presets")
    assert (answer.code, answer.err) == (0, "")
    for name, (description, _) in PRESETS.items():
        assert re.search(rf"^ *{re.escape(name)} ", answer.out, re.MULTILINE)
        assert description.split()[0] in answer.out


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_printed_as_toml_that_is_the_same_configuration(call, name):
    answer = call("presets", name)
    assert (answer.code, answer.err) == (0, "")
    Path("printed.toml").write_text(answer.out)
    assert Config.from_toml(Path("printed.toml")) == fedsim.preset(name)


def test_a_printed_preset_can_be_run(call):
    Path("mine").write_text(call("presets", "mnist").out)
    assert call("run", "mine", *QUICK, *sets("rounds=1")).code == 0
    Path("mine.toml").write_text(call("presets", "mnist").out)
    assert call("run", "mine.toml", *QUICK, *sets("rounds=1")).code == 0
    assert call("run", "mnist", *QUICK, *sets("rounds=1")).code == 0
    answer = call("run", "mnist", *QUICK, *sets("rounds=1"))
    assert answer.out.splitlines()[0] == "results/mnist is there already, so this run is mnist-4"
    runs = fedsim.load_runs("results/*")
    assert [run.name for run in runs] == ["mnist", "mnist-2", "mnist-3", "mnist-4"]  # the file names itself
    assert runs.rounds.groupby("round")["weights_sha256"].nunique().tolist() == [1, 1]


def test_an_unknown_preset_is_wrong_input(call):
    answer = call("presets", "mnsit")
    assert (answer.code, answer.out) == (2, "")
    assert "did you mean mnist?" in answer.err
    assert len(answer.err.splitlines()) == 1


def test_plan_says_what_would_be_done_and_does_nothing(call, workplace):
    answer = call("plan", *QUICK, *sets("clients.per_round=3", "rounds=7", "data.partition.name=quantity"))
    assert (answer.code, answer.err) == (0, "")
    said = {line.split()[0]: line for line in answer.out.splitlines() if not line.startswith("   ")}
    assert "2,000 training examples" in said["data"]
    assert "logistic: 7,850 values" in said["model"]
    assert "10, of which 3 a round, in 7 rounds" in said["clients"]
    assert "serial" in said["placement"]
    assert listing(workplace) == {}


@pytest.mark.long
def test_plan_gives_each_actor_its_share_and_starts_none(call, workplace):
    options = sets("data.dataset=synthetic", "clients.count=2", "placement.num_cpus=0.25")
    answer = call("plan", *options, *sets("placement.mode=actor-per-client"))
    assert (answer.code, answer.err) == (0, "")
    assert "2 forked, each with 0.25 CPU and 1 thread" in answer.out
    assert "actor-per-client" in answer.out
    assert listing(workplace) == {}


def test_plan_counts_one_as_one(call):
    answer = call("plan", *QUICK, *sets("clients.count=1", "rounds=1"))
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in answer.out.splitlines()}
    assert said["data"] == "synthetic: 2,000 training examples, 2,000 a client"
    assert said["clients"] == "1, of which 1 a round, in 1 round"


@pytest.mark.parametrize("results", [None, "empty"])
def test_a_folder_without_runs_has_none(call, workplace, results):
    Path("empty").mkdir()
    answer = call("runs", *([] if results is None else ["--results", results]))
    assert answer == (0, f"no runs in {results or 'results'}\n", "")
    assert listing(workplace) == {workplace / "empty": None}


@pytest.mark.parametrize("results", ["nowhere", "results", "file"])
def test_a_results_folder_that_is_named_must_be_there(call, workplace, results):
    Path("file").touch()
    before = listing(workplace)
    assert call("runs", "--results", results) == (
        2,
        "",
        f"fedsim: {results} is not a folder; name another with --results\n",
    )
    assert "Traceback" in call("runs", "--results", results, "--debug").err
    assert listing(workplace) == before


def test_runs_lists_them_with_status_rounds_and_accuracy(call, monkeypatch):
    call("run", *QUICK, *sets("rounds=2", "evaluation.every=100"), "--name", "done")
    call("run", *QUICK, *sets("training.lr=1e38"), "--name", "far")
    with monkeypatch.context() as patch:
        break_model(patch, KeyboardInterrupt())
        call("run", *QUICK, *sets("rounds=4"), "--name", "stopped")
    Path("results/foreign").mkdir()
    answer = call("runs")
    assert (answer.code, answer.err) == (0, "")
    rows = [line.split() for line in answer.out.splitlines()]
    assert rows[0][:3] == ["run", "status", "rounds"]
    last = [pd.read_parquet(f"results/{name}/rounds.parquet")["test_accuracy"] for name in ("done", "far", "stopped")]
    assert [row[:4] for row in rows[1:]] == [
        ["done", "finished", "2/2", f"{last[0].iloc[-1]:.4f}"],
        ["far", "failed", "1/5", f"{last[1].iloc[-1]:.4f}"],
        ["stopped", "interrupted", "1/4", f"{last[2].iloc[-1]:.4f}"],
    ]


@pytest.mark.parametrize(
    "damage", ["no config.toml", "cut config.toml", "no rounds.parquet", "newer", "bare run.json", "no date"]
)
def test_a_damaged_run_hides_no_other(call, damage):
    for name in ("bad", "good"):
        assert call("run", *QUICK, *sets("rounds=0"), "--name", name).code == 0
    folder = Path("results/bad")
    if damage == "no config.toml":
        (folder / "config.toml").unlink()
    elif damage == "cut config.toml":
        (folder / "config.toml").write_text("rounds =")
    elif damage == "no rounds.parquet":
        (folder / "rounds.parquet").rename(folder / "elsewhere")
    elif damage == "newer":
        (folder / "run.json").write_text(json.dumps(info(folder) | {"fedsim_run": 999}))
    elif damage == "no date":
        (folder / "run.json").write_text(json.dumps(info(folder) | {"started_at": None}))
    else:
        (folder / "run.json").write_text(json.dumps({"fedsim_run": 1}))
    answer = call("runs")
    assert (answer.code, answer.err) == (0, "")
    assert re.search(r"^ *good +finished +0/0 ", answer.out, re.MULTILINE)
    assert re.search(r"^ *bad +\S", answer.out, re.MULTILINE)
    assert damage != "no date" or "None" not in answer.out


def test_data_status_looks_and_fetches_nothing(call, workplace):
    answer = call("data", "status")
    assert (answer.code, answer.err) == (0, "")
    for name in DATASETS:
        state = "in memory" if name == "synthetic" else "absent"
        assert re.search(rf"^ *{name} +{state}", answer.out, re.MULTILINE)
    assert listing(workplace) == {}


def test_fetching_an_unknown_data_set_is_wrong_input(call, workplace):
    answer = call("data", "fetch", "minst")
    assert (answer.code, answer.out) == (2, "")
    assert all(name in answer.err for name in DATASETS)
    assert len(answer.err.splitlines()) == 1
    assert listing(workplace) == {}
