"""A run's folder: its name, its files at every moment, and what is read back from them."""

import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SERIAL, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fedsim
from fedsim import checkpoint, datasets, models
from fedsim.config import RUN_NAME, Config
from fedsim.errors import ClientError, ConfigError, FedsimWarning, InputError, RunFailedError, RunFolderError
from fedsim.metrics import CLIENT_COLUMNS, CLIENT_SCHEMA, ROUND_COLUMNS, ROUND_SCHEMA, RoundRecord
from fedsim.recording import Recording
from fedsim.results import Run, Runs, begin, find_whole, load_run, load_runs
from fedsim.run_folder import find_runs, is_live, target
from fedsim.strategies import Strategy, fedavg
from fedsim.weights import Layout

SCHEMAS = {"rounds": ROUND_SCHEMA, "clients": CLIENT_SCHEMA}
COLUMNS = {"rounds": [c.name for c in ROUND_COLUMNS], "clients": [c.name for c in CLIENT_COLUMNS]}


@pytest.fixture
def every_round(monkeypatch):
    """A part for each round, as if each took a second."""
    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 0)


def run(results, changes=(), **more):
    return fedsim.run(SERIAL.override(dict(changes)), results=results, **more)


def read(folder, kind="rounds"):
    """As a user reads it, with pandas alone."""
    frame = pd.read_parquet(folder / f"{kind}.parquet")
    assert list(frame.columns) == COLUMNS[kind]
    return frame


def parts(folder, kind="rounds"):
    return sorted(path.name for path in (folder / f"{kind}.parquet").iterdir())


def content(folder):
    """Every file below, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def info(folder):
    return json.loads((folder / "run.json").read_text())


def failing_in(round):
    """A strategy with a bug that shows in one round."""
    average = fedavg()

    def aggregate(state, weights, updates, num_examples):
        if state["round"] == round - 1:
            raise ZeroDivisionError("a bug in the strategy")
        return average.aggregate({}, weights, updates, num_examples)[0], {"round": state["round"] + 1}

    return Strategy(lambda weights: {"round": torch.zeros(())}, aggregate)


@contextlib.contextmanager
def locked_by_another_process(folder):
    """Holds the run's lock as a fedsim in another process would."""
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-S", "-c", code, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"\n"
        yield
        other.communicate(b"\n", timeout=10)


def is_lockable_by_another_process(folder):
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-S", "-c", code, folder / ".lock"]
    done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    assert done.returncode == 0 or b"BlockingIOError" in done.stderr
    return done.returncode == 0


# --- Names -----------------------------------------------------------------------------------------------------------


def test_a_run_is_called_after_its_configuration_and_takes_the_next_free_number(tmp_path):
    assert [run(tmp_path, {"rounds": 0}).name for _ in range(3)] == ["mnist", "mnist-2", "mnist-3"]
    assert run(tmp_path, {"rounds": 0, "name": "other"}).path == tmp_path / "other"
    assert run(tmp_path, {"rounds": 0}, name="mine").path == tmp_path / "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"mnist", "mnist-2", "mnist-3", "other", "mine"}


def test_only_a_free_number_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").write_text("a file")
    (tmp_path / "a-3").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a-5").mkdir()
    assert target(tmp_path, None, "a", overwrite=False) == tmp_path / "a-4"


def test_nothing_is_made_by_asking_for_a_name(tmp_path):
    assert target(tmp_path / "results", "a", "b", overwrite=True) == tmp_path / "results" / "a"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "9", "a..b", "x" * 100])
@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_are_fine(tmp_path, name, overwrite):
    assert target(tmp_path, name, "b", overwrite) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-a", "_a", "a/b", "../a", "/tmp/a", "a\\b", "a b", "a\n", "ä", "x" * 101]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_are_refused(tmp_path, name, overwrite):
    with pytest.raises(RunFolderError, match="cannot be a run's name"):
        target(tmp_path, name, "b", overwrite)


def test_a_numbered_name_is_a_name_too(tmp_path):
    (tmp_path / ("x" * 100)).mkdir()
    assert RUN_NAME.fullmatch(target(tmp_path, None, "x" * 100, overwrite=False).name)


def test_a_given_name_that_exists_is_refused(tmp_path):
    run(tmp_path, {"rounds": 0}, name="a")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = content(tmp_path)
    for name in ("a", "file", "link"):
        with pytest.raises(RunFolderError, match=r"exists already.*--overwrite"):
            run(tmp_path, name=name)
    assert content(tmp_path) == before


def test_a_results_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for results in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RunFolderError, match="file"):
            run(results)
    assert content(tmp_path) == {Path("file"): b"mine"}


def test_a_name_that_is_taken_meanwhile_is_not_taken_twice(tmp_path):
    one, other = (Recording.of(SERIAL, results=tmp_path) for _ in range(2))
    with one, other:
        assert (one.folder.name, other.folder.name) == (one.name, other.name) == ("mnist", "mnist-2")
        for recording in (other, one):
            assert [record.round for record in recording] == [0, 1, 2, 3]
    for name in ("mnist", "mnist-2"):
        assert load_run(tmp_path / name).rounds["run"].tolist() == [name] * 4


def test_a_folder_that_appears_meanwhile_is_left_alone(tmp_path):
    recording = Recording.of(SERIAL, results=tmp_path, name="a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError), recording:
        pass
    assert content(tmp_path) == {Path("a/mine.txt"): b"mine"}


# --- Overwriting -----------------------------------------------------------------------------------------------------


def test_overwriting_replaces_what_is_fedsims_and_nothing_else(tmp_path, every_round):
    folder = run(tmp_path, {"rounds": 6, "checkpoint.every_s": 0, "checkpoint.keep": "all"}).path
    (folder / "report.html").write_text("of the earlier run")
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots" / "plot.png").write_bytes(b"mine too")
    again = run(tmp_path, {"rounds": 2, "seed": 1}, overwrite=True)
    assert again.path == folder
    assert again.rounds["round"].tolist() == [0, 1, 2]
    assert again.clients["round"].unique().tolist() == [1, 2]
    assert checkpoint.rounds(folder / "checkpoint") == [2]
    fresh = run(tmp_path, {"rounds": 2, "seed": 1}, name="fresh")
    assert fresh.rounds["weights_sha256"].equals(again.rounds["weights_sha256"])
    foreign = {Path("notes.txt"): b"mine", Path("plots/plot.png"): b"mine too"}
    files = content(folder)
    assert files.keys() == content(fresh.path).keys() | foreign.keys()
    assert {path: files[path] for path in foreign} == foreign


def test_overwriting_nothing_is_a_first_run(tmp_path):
    assert run(tmp_path, {"rounds": 0}, name="new", overwrite=True).path == tmp_path / "new"


@pytest.mark.parametrize("what", ["foreign folder", "empty folder", "foreign run.json", "link to a run", "file"])
def test_what_is_no_run_is_not_overwritten(tmp_path, what):
    folder = tmp_path / "a"
    if what == "file":
        folder.write_text("mine")
    elif what == "link to a run":
        folder.symlink_to(run(tmp_path / "elsewhere", {"rounds": 0}).path)
    else:
        folder.mkdir()
        if what == "foreign folder":
            (folder / "thesis.tex").write_text("mine")
        elif what == "foreign run.json":
            (folder / "run.json").write_text('{"status": "finished"}')
    before = content(tmp_path)
    with pytest.raises(RunFolderError, match="not a run of fedsim"):
        run(tmp_path, name="a", overwrite=True)
    assert content(tmp_path) == before


def test_a_run_that_is_being_written_is_not_overwritten(tmp_path):
    with Recording.of(SERIAL, results=tmp_path, name="a") as recording:
        iterator = iter(recording)
        next(iterator)
        with pytest.raises(RunFolderError, match="being written"):
            run(tmp_path, name="a", overwrite=True)
        for _ in iterator:
            pass
    assert load_run(tmp_path / "a").rounds["round"].tolist() == [0, 1, 2, 3]
    with locked_by_another_process(tmp_path / "a"), pytest.raises(RunFolderError, match="being written"):
        run(tmp_path, name="a", overwrite=True)
    run(tmp_path, {"rounds": 0}, name="a", overwrite=True)


@pytest.mark.parametrize(
    "changes",
    [{"clients.count": 2001}, {"model.name": "nope"}, {"strategy.server_lr": 1.0}],
    ids=lambda c: next(iter(c)),
)
def test_wrong_input_overwrites_nothing(tmp_path, changes):
    run(tmp_path, {"rounds": 1})
    before = content(tmp_path)
    with pytest.raises(InputError):
        run(tmp_path, changes, overwrite=True)
    assert content(tmp_path) == before


# --- Files -----------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_finished_run(tmp_path):
    folder = run(tmp_path).path
    assert {path.name for path in folder.iterdir()} == {
        "config.toml",
        "run.json",
        "rounds.parquet",
        "clients.parquet",
        "checkpoint",
        ".lock",
    }
    assert all(re.fullmatch(r"part-(empty|\d{6}-\d{6})\.parquet", part) for part in parts(folder))
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["000003.json", "000003.safetensors"]
    assert not any(path.suffix in (".pt", ".pkl", ".pickle", ".tmp") for path in folder.rglob("*"))


def test_parts_are_called_after_their_rounds(tmp_path, every_round):
    folder = run(tmp_path).path
    ranges = [f"part-{r:06d}-{r:06d}.parquet" for r in range(4)]
    assert parts(folder) == [*ranges, "part-empty.parquet"]
    assert parts(folder, "clients") == [*ranges[1:], "part-empty.parquet"]
    for kind in ("rounds", "clients"):
        for part in parts(folder, kind)[:-1]:
            held = pq.read_table(folder / f"{kind}.parquet" / part)["round"].to_pylist()
            assert set(held) == {int(part[5:11])}


def test_quick_rounds_share_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 1000)
    folder = run(tmp_path).path
    assert parts(folder) == parts(folder, "clients") == ["part-000000-000003.parquet", "part-empty.parquet"]


def test_rows_do_not_wait_for_the_next_round(tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 0.2)
    with begin(tmp_path / "a", SERIAL, {}) as writer:
        for round in range(2):
            writer.write(record_of(round, 0.0), dict, {})
        wait_until(lambda: parts(tmp_path / "a") == ["part-000000-000001.parquet", "part-empty.parquet"])
        writer.write(record_of(2, 0.0), dict, {})
    assert read(tmp_path / "a")["round"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("is_still_full", [True, False])
def test_rows_that_could_not_be_written_meanwhile_are_written_with_the_next_round(tmp_path, monkeypatch, is_still_full):
    tried, publish = [], fedsim.files.publish

    def full(path, content, **options):
        if path.parent.name == "rounds.parquet":  # when that of the clients is there
            tried.append(path)
            raise OSError(28, "No space left on device", str(path))
        publish(path, content, **options)

    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 0.05)
    records = list(fedsim.rounds(SERIAL.override({"rounds": 2})))
    expected = pytest.raises(RunFailedError, match=r"cannot write .*: No space left on device")
    with expected if is_still_full else contextlib.nullcontext(), begin(tmp_path / "a", SERIAL, {}) as writer:
        writer.write(records[0], dict, {})
        wait_until(lambda: not writer._waiting)
        monkeypatch.setattr("fedsim.results.parts.publish", full)
        writer.write(records[1], dict, {})
        wait_until(lambda: tried)
        if not is_still_full:
            monkeypatch.setattr("fedsim.results.parts.publish", publish)
        writer.write(records[2], dict, {})
    done = [0] if is_still_full else [0, 1, 2]
    assert read(tmp_path / "a")["round"].tolist() == done
    assert sorted(read(tmp_path / "a", "clients")["round"]) == sorted(done[1:] * 3), "none twice"


def test_when_a_run_has_ended_nobody_writes_it(tmp_path, monkeypatch):
    """Not even an alarm that has begun to."""
    publish, writes = fedsim.files.publish, threading.Event()

    def slow(path, content, **options):
        writes.set()
        time.sleep(0.2)
        publish(path, content, **options)

    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 0.05)
    with begin(tmp_path / "a", SERIAL, {}) as writer:
        monkeypatch.setattr("fedsim.results.parts.publish", slow)
        writer.write(record_of(0, 0.0), dict, {})
        assert writes.wait(10)
    before = content(tmp_path / "a")
    assert read(tmp_path / "a")["round"].tolist() == [0]
    time.sleep(0.3)
    assert content(tmp_path / "a") == before


@given(st.lists(st.floats(0, 0.02), min_size=1, max_size=12))
@settings(max_examples=10, deadline=None)
def test_whoever_writes_them_each_row_is_there_once(pauses):
    with tempfile.TemporaryDirectory() as folder, unittest.mock.patch("fedsim.results.writer.FLUSH_S", 0.01):
        config = SERIAL.override({"rounds": len(pauses)})
        with begin(Path(folder) / "a", config, {}) as writer:
            for round, pause in enumerate(pauses):
                writer.write(record_of(round, 0.0), dict, {})
                time.sleep(pause)
        assert read(Path(folder) / "a")["round"].tolist() == list(range(len(pauses)))
        assert find_whole(Path(folder) / "a").last == len(pauses) - 1


def test_run_json_says_what_was_run_with_what(tmp_path):
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    finished = run(tmp_path)
    said = info(finished.path)
    assert said["name"] == "mnist"
    assert said["status"] == finished.status == "finished"
    assert said["error"] is None
    started, ended = (datetime.datetime.fromisoformat(said[key]) for key in ("started_at", "ended_at"))
    assert before <= started <= ended <= datetime.datetime.now(datetime.UTC)
    assert said["versions"]["fedsim"] == fedsim.__version__
    assert said["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert said["machine"]["num_cpus"] == os.cpu_count()
    assert (said["device"], said["engine"], said["placement"]["mode"]) == ("cpu", "stacked", "serial")
    assert re.fullmatch("[0-9a-f]{16}", said["numerics_fingerprint"])
    assert said["data"]["sha256"] == datasets.load("synthetic").sha256()
    assert said["model"] == {
        "num_values": 7850,
        "num_bytes": 31400,
        "initial_weights_sha256": finished.rounds["weights_sha256"][0],
    }
    assert said["git_commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", said["git_commit"])
    assert said["own"] == {}


def test_run_json_names_the_users_own_parts(tmp_path):
    def small():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    own = info(run(tmp_path, model=small, dataset=datasets.load("synthetic"), strategy=fedavg()).path)["own"]
    assert own.keys() == {"model", "dataset", "strategy"}
    assert own["model"].endswith("small")
    assert own["strategy"] == "fedsim.strategies.fedavg"
    again = info(run(tmp_path, strategy=failing_in(9)).path)["own"]
    assert again["strategy"] == f"{__name__}.failing_in(average=fedsim.strategies.fedavg, round=9)"


def test_there_is_one_row_a_sampled_client_a_round(tmp_path):
    finished = run(tmp_path)
    rounds, clients = read(finished.path), read(finished.path, "clients")
    assert rounds["round"].tolist() == [0, 1, 2, 3]
    assert (rounds["run"] == "mnist").all()
    assert not clients.duplicated(["round", "client_id"]).any()
    assert clients.groupby("round").size().to_dict() == {1: 3, 2: 3, 3: 3}
    cohorts = {record.round: [client.client_id for client in record.clients] for record in fedsim.rounds(SERIAL)}
    assert all(rows["client_id"].tolist() == cohorts[r] for r, rows in clients.groupby("round"))


@pytest.mark.parametrize("kind", ["rounds", "clients"])
def test_each_part_has_the_schema_with_its_units_and_marks(tmp_path, every_round, kind):
    folder = run(tmp_path).path
    for part in parts(folder, kind):
        assert pq.read_schema(folder / f"{kind}.parquet" / part).equals(SCHEMAS[kind], check_metadata=True)
    whole = pq.read_table(folder / f"{kind}.parquet").schema
    assert whole.names == COLUMNS[kind]
    assert [field.metadata[b"kind"] for field in whole] == [field.metadata[b"kind"] for field in SCHEMAS[kind]]


def test_frames_are_the_same_from_disk_and_from_memory(tmp_path, every_round):
    with Recording.of(SERIAL.override({"evaluation.every": 2}), results=tmp_path) as recording:
        records = tuple(recording)
    on_disk, in_memory = load_run(tmp_path / "mnist"), Run("mnist", None, SERIAL, _records=records)
    for kind in ("rounds", "clients"):
        pd.testing.assert_frame_equal(getattr(on_disk, kind), getattr(in_memory, kind), check_exact=True)
        pd.testing.assert_frame_equal(read(tmp_path / "mnist", kind), getattr(in_memory, kind), check_exact=True)
    nothing = run(None, {"rounds": 0})
    assert (nothing.clients.dtypes == on_disk.clients.dtypes).all()
    assert (nothing.rounds.dtypes == on_disk.rounds.dtypes).all()


def test_nothing_is_written_without_a_results_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(None).path is None
    assert list(tmp_path.iterdir()) == []


# --- Reading while the run goes on -----------------------------------------------------------------------------------


def test_the_rounds_can_be_read_after_each_of_them(tmp_path, every_round):
    with Recording.of(SERIAL, results=tmp_path) as recording:
        folder = recording.folder
        for kind, schema in SCHEMAS.items():
            empty = read(folder, kind)
            assert len(empty) == 0
            assert (empty.dtypes == schema.empty_table().to_pandas().dtypes).all()
        for record in recording:
            assert read(folder)["round"].tolist() == list(range(record.round + 1))
            assert read(folder, "clients")["round"].tolist() == [r for r in range(1, record.round + 1) for _ in "123"]
            assert read(folder)["weights_sha256"].iloc[-1] == record.weights_sha256
            assert load_run(folder).status == "running"
    assert load_run(folder).status == "finished"


def test_the_rounds_can_be_read_at_any_moment(tmp_path, every_round, monkeypatch):
    """Whenever a file has been written by half, and by whole, but does not have its name yet."""
    folder, lengths, beside = tmp_path / "mnist", [], set()

    def look():
        if not (folder / "run.json").exists():
            return
        rounds, clients = read(folder), read(folder, "clients")
        assert set(rounds["round"]) - {0} <= set(clients["round"])  # a round that shows has all its clients
        assert clients.groupby("round").size().isin([3]).all()
        assert load_run(folder).config == SERIAL.override({"checkpoint.every_s": 0, "data.partition.name": "iid"})
        assert load_run(folder).status == "running" or len(rounds) == 4
        saved = checkpoint.rounds(folder / "checkpoint")
        if saved:
            assert Layout.of(models.logistic((1, 28, 28), 10)).num_values == sum(
                tensor.numel() for tensor in load_run(folder).weights().values()
            )
        lengths.append(len(rounds))
        beside.update(path.name for path in folder.rglob(".*.tmp"))

    write_bytes = Path.write_bytes

    def slowly(path, data):
        write_bytes(path, data[: len(data) // 2])
        look()
        size = write_bytes(path, data)
        look()
        return size

    monkeypatch.setattr(Path, "write_bytes", slowly)
    run(tmp_path, {"checkpoint.every_s": 0})
    assert lengths == sorted(lengths)
    assert set(lengths) == {0, 1, 2, 3, 4}
    for what in ("part-000002-000002.parquet", "run.json", "000002.safetensors", "000002.json"):
        assert any(name.startswith(f".{what}") for name in beside), what
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("rounds_s", "num_parts"),
    [
        ([0.0625] * 24, 2),
        ([0.125] * 24, 3),
        ([0.25] * 24, 6),
        ([0.75] * 24, 12),
        ([30.0] * 24, 24),
        ([0.1, 0.1, 30.0, 0.1, 0.1, 0.1], 3),
    ],
)
def test_no_row_waits_for_more_than_a_second_and_quick_rounds_share_a_part(tmp_path, monkeypatch, rounds_s, num_parts):
    """By a clock of its own, that of the alarm too."""
    clock, alarms = SimpleNamespace(now=1000.0), []

    class Alarm:
        def __init__(self, after_s, ring):
            self.at, self.ring = clock.now + after_s, ring

        def start(self):
            alarms.append(self)

        def cancel(self):
            alarms[:] = []

    monkeypatch.setattr("fedsim.results.writer.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("fedsim.results.writer.threading.Timer", Alarm)
    config = SERIAL.override({"rounds": 100, "checkpoint.every_s": 10_000})
    with begin(tmp_path / "a", config, {}) as writer:
        times = []
        for r, round_s in enumerate(rounds_s):
            end = clock.now + round_s
            for alarm in list(alarms):
                if alarm.at <= end:
                    clock.now = alarm.at
                    alarm.ring()
            clock.now = end
            assert all(end - written <= 1.0 + 1e-6 for written in times[num_on_disk(tmp_path / "a") :])
            writer.write(record_of(r, round_s), dict, {})
            times.append(end)
    assert read(tmp_path / "a")["round"].tolist() == list(range(len(rounds_s)))
    assert len(parts(tmp_path / "a")) - 1 == num_parts


def num_on_disk(folder):
    return sum(pq.read_metadata(folder / "rounds.parquet" / part).num_rows for part in parts(folder))


def record_of(round, round_s=0.0):
    now = datetime.datetime.now(datetime.UTC)
    return RoundRecord(round=round, started_at=now, weights_sha256=f"{round:064x}", round_s=round_s)


@pytest.mark.long
def test_a_kill_leaves_what_was_whole(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import fedsim
from fedsim.results import writer

writer.FLUSH_S = 0
write_bytes = Path.write_bytes

def dying(path, data):
    if path.name.startswith(".part-000002"):
        write_bytes(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write_bytes(path, data)

Path.write_bytes = dying
fedsim.run(fedsim.Config.from_toml(Path("config.toml")), results="results")
"""
    (tmp_path / "config.toml").write_text(SERIAL.override({"checkpoint.every_s": 0}).to_toml())
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "results" / "mnist"
    assert len(list(folder.rglob(".part-000002*"))) == 1  # the half of a part that lies there
    killed = load_run(folder)
    assert read(folder)["round"].tolist() == [0, 1]
    assert read(folder, "clients")["round"].unique().tolist() == [1]
    assert info(folder)["status"] == "running"  # nobody could write another
    assert killed.status == "interrupted"
    assert not is_live(folder)
    model = killed.model()
    assert Layout.of(model).flatten(model).sha256() == killed.rounds["weights_sha256"].iloc[-1]
    assert len(run(tmp_path / "results", overwrite=True).rounds) == 4
    assert not list(folder.rglob(".part*"))


# --- Endings ---------------------------------------------------------------------------------------------------------


def test_a_failed_run_says_why_and_keeps_its_rounds(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, strategy=failing_in(2))
    failed = load_run(tmp_path / "mnist")
    assert failed.status == info(failed.path)["status"] == "failed"
    assert failed.info["error"] == "ZeroDivisionError: a bug in the strategy"
    assert datetime.datetime.fromisoformat(failed.info["ended_at"])
    assert failed.rounds["round"].tolist() == [0, 1]
    assert failed.clients["round"].unique().tolist() == [1]
    assert not is_live(failed.path)


def test_the_error_of_a_client_is_in_run_json(tmp_path):
    class Broken(nn.Linear):
        def forward(self, x):
            if self.training:
                raise ValueError("a bug in the model")
            return super().forward(x.flatten(1))

    with pytest.raises(ClientError):
        run(tmp_path, {"clients.per_round": "all"}, model=lambda: Broken(784, 10))
    error = info(tmp_path / "mnist")["error"]
    assert "client 0 failed in round 1" in error
    assert "a bug in the model" in error


def test_a_run_that_is_interrupted_says_so_and_keeps_its_rounds(tmp_path):
    def interrupt_after_round_1():
        with Recording.of(SERIAL, results=tmp_path) as recording:
            for record in recording:
                if record.round == 1:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt_after_round_1()
    stopped = load_run(tmp_path / "mnist")
    assert stopped.status == info(stopped.path)["status"] == "interrupted"
    assert stopped.info["error"] is None
    assert stopped.info["ended_at"]
    assert stopped.rounds["round"].tolist() == [0, 1]
    assert not is_live(stopped.path)


def test_a_recording_in_a_generator_that_is_closed_is_interrupted(tmp_path):
    def records():
        with Recording.of(SERIAL, results=tmp_path) as recording:
            yield from recording

    iterator = records()
    assert [next(iterator).round, next(iterator).round] == [0, 1]
    assert load_run(tmp_path / "mnist").status == "running"
    iterator.close()
    assert info(tmp_path / "mnist")["status"] == "interrupted"
    assert load_run(tmp_path / "mnist").rounds["round"].tolist() == [0, 1]


def test_a_recording_that_is_left_by_break_is_not_finished(tmp_path):
    with Recording.of(SERIAL, results=tmp_path) as recording:
        for _ in recording:
            break
    assert info(tmp_path / "mnist")["status"] == "interrupted"


def test_a_run_cannot_be_taken_from_a_recording_that_has_not_begun():
    with pytest.raises(InputError, match="not started"):
        Recording.of(SERIAL, results=None).run  # noqa: B018 - the property raises


def fails_from_round_2(monkeypatch, where, num_times):
    """Lets the writing of parts from round 2 on fail so many times; returns the failures."""
    failures = []

    def fail():
        if len(failures) < num_times:
            failures.append(where)
            raise OSError("no space left on device")

    if where == "pq.write_table":
        write_table = pq.write_table

        def write(rows, *args, **kwargs):
            if max(rows["round"].to_pylist(), default=0) >= 2:
                fail()
            write_table(rows, *args, **kwargs)

        monkeypatch.setattr(pq, "write_table", write)
    else:
        replace = os.replace

        def rename(source, destination, **kwargs):
            if "part-000002" in os.fspath(destination):
                fail()
            replace(source, destination, **kwargs)

        monkeypatch.setattr(os, "replace", rename)
    return failures


@pytest.mark.parametrize("where", ["pq.write_table", "os.replace"])
@pytest.mark.parametrize("num_times", [1, 1000], ids=["once", "for good"])
def test_a_part_that_cannot_be_written_costs_no_earlier_round(tmp_path, every_round, monkeypatch, where, num_times):
    failures = fails_from_round_2(monkeypatch, where, num_times)
    with pytest.raises(RunFailedError, match="no space left"):
        run(tmp_path)
    assert failures
    folder = tmp_path / "mnist"
    rounds, clients = read(folder), read(folder, "clients")
    assert rounds["round"].tolist() in ([0, 1], [0, 1, 2])
    assert clients.groupby("round").size().to_dict() == {r: 3 for r in rounds["round"] if r > 0}
    assert all(re.fullmatch(r"part-(empty|\d{6}-\d{6})\.parquet", part) for part in parts(folder))
    assert not list(folder.rglob(".*.tmp"))
    assert not is_live(folder)
    assert load_run(folder).status in ("failed", "interrupted")


def test_a_failure_to_write_is_a_failure_of_the_run(tmp_path, every_round, monkeypatch):
    fails_from_round_2(monkeypatch, "pq.write_table", 1)
    with pytest.raises(RunFailedError, match="no space left"):
        run(tmp_path)
    assert info(tmp_path / "mnist")["status"] == "failed"
    assert "no space left" in info(tmp_path / "mnist")["error"]


def test_a_lasting_failure_to_write_is_a_failure_of_the_run_too(tmp_path, every_round, monkeypatch):
    fails_from_round_2(monkeypatch, "pq.write_table", 1000)
    with pytest.raises(RunFailedError, match="no space left"):
        run(tmp_path)
    assert info(tmp_path / "mnist")["status"] == "failed"
    assert "no space left" in info(tmp_path / "mnist")["error"]


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted"])
def test_an_ended_run_keeps_its_status(tmp_path, status):
    folder = run(tmp_path, {"rounds": 0}).path
    (folder / "run.json").write_text(json.dumps(info(folder) | {"status": status}))
    assert load_run(folder).status == status


def test_a_run_is_running_while_somebody_holds_its_lock(tmp_path):
    folder = run(tmp_path, {"rounds": 0}).path
    (folder / "run.json").write_text(json.dumps(info(folder) | {"status": "running"}))
    assert load_run(folder).status == "interrupted"
    with locked_by_another_process(folder):
        assert is_live(folder)
        assert load_run(folder).status == "running"
    assert not is_live(folder)
    assert load_run(folder).status == "interrupted"
    (folder / ".lock").unlink()
    assert not is_live(folder)


def test_a_writer_holds_the_lock_until_it_ends(tmp_path):
    with Recording.of(SERIAL, results=tmp_path) as recording:
        assert is_live(recording.folder)
        assert is_live(recording.folder)  # looking takes nothing away
        assert not is_lockable_by_another_process(recording.folder)
        for _ in recording:
            pass
        assert not is_lockable_by_another_process(recording.folder)
    assert is_lockable_by_another_process(recording.folder)


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"checkpoint.every_s": 0}, [2, 3]),
        ({"checkpoint.every_s": 0, "checkpoint.keep": 1}, [3]),
        ({"checkpoint.every_s": 0, "checkpoint.keep": 10}, [0, 1, 2, 3]),
        ({"checkpoint.every_s": 0, "checkpoint.keep": "all"}, [0, 1, 2, 3]),
        ({"checkpoint.every_s": 1000, "checkpoint.keep": "all"}, [3]),
        ({"checkpoint.every_s": 1000, "rounds": 0}, [0]),
    ],
    ids=str,
)
def test_the_newest_checkpoints_are_kept(tmp_path, changes, expected):
    folder = run(tmp_path, changes).path / "checkpoint"
    assert checkpoint.rounds(folder) == expected
    assert {path.name for path in folder.iterdir()} == {
        f"{r:06d}.{s}" for r in expected for s in ("json", "safetensors")
    }


def test_a_checkpoint_is_due_after_so_many_seconds(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("fedsim.results.writer.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 1_000_000)
    config = SERIAL.override({"rounds": 9, "checkpoint.every_s": 10, "checkpoint.keep": "all"})
    saved = []

    def tensors():
        rows = read(tmp_path / "a")["round"]  # the rows come first: no checkpoint is ahead of them
        saved.append(int(rows.max()))
        return {"weight": torch.tensor([float(len(saved))])}

    with begin(tmp_path / "a", config, {}) as writer:
        for r in range(10):
            clock.now += 4
            writer.write(record_of(r, 0.0), tensors, {})
    assert saved == [2, 5, 8, 9]
    assert checkpoint.rounds(tmp_path / "a" / "checkpoint") == [2, 5, 8, 9]
    assert [checkpoint.load(tmp_path / "a" / "checkpoint", r)[0]["weight"].item() for r in saved] == [1, 2, 3, 4]


def test_the_weights_of_a_run_that_goes_on_are_those_of_the_newest_checkpoint(tmp_path, every_round):
    with Recording.of(SERIAL.override({"checkpoint.every_s": 0}), results=tmp_path) as recording:
        for record in recording:
            model = load_run(recording.folder).model()
            assert Layout.of(model).flatten(model).sha256() == record.weights_sha256


def test_a_run_without_a_checkpoint_has_no_weights_yet(tmp_path):
    with Recording.of(SERIAL, results=tmp_path) as recording:
        with pytest.raises(RunFolderError, match="no checkpoint yet"):
            load_run(recording.folder).weights()
        list(recording)
    assert load_run(recording.folder).weights().keys() == {"1.weight", "1.bias"}


def test_the_state_of_a_strategy_is_saved(tmp_path):
    folder = run(tmp_path, {"strategy.name": "fedadam"}).path / "checkpoint"
    state = checkpoint.load(folder, 3)[1]
    assert {name: (tensor.dtype, len(tensor)) for name, tensor in state.items()} == {
        "first_moment": (torch.float64, 7850),
        "second_moment": (torch.float64, 7850),
    }
    assert all(tensor.abs().max() > 0 for tensor in state.values())


def test_a_damaged_checkpoint_is_named(tmp_path):
    finished = run(tmp_path)
    file = finished.path / "checkpoint" / "000003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=r"000003\.safetensors.*damaged"):
        finished.weights()
    file.unlink()
    with pytest.raises(RunFolderError, match=r"000003\.json"):
        finished.weights()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    finished = run(tmp_path, {"checkpoint.every_s": 0})
    before = checkpoint.load(finished.path / "checkpoint", 2)[0]
    file = finished.path / "checkpoint" / "000003.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.warns(FedsimWarning, match=r"000003\.safetensors is damaged.*weights of round 2"):
        weights = finished.weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


# --- Reading a run back ----------------------------------------------------------------------------------------------


def accuracy_of(model, dataset):
    model.eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(dataset.test_images).float() / 255)
    return float(np.mean(logits.argmax(1).numpy() == dataset.test_labels))


def test_weights_and_model_are_those_in_memory_bit_for_bit(tmp_path):
    finished, in_memory = run(tmp_path), run(None)
    loaded = load_run(finished.path)
    for other in (finished, in_memory):
        assert loaded.weights().keys() == other.weights().keys()
        assert all(torch.equal(loaded.weights()[name], tensor) for name, tensor in other.weights().items())
        assert all(torch.equal(loaded.weights()[name], t) for name, t in other.model().state_dict().items())
    for model in (loaded.model(), finished.model(), in_memory.model()):
        assert accuracy_of(model, datasets.load("synthetic")) == loaded.rounds["test_accuracy"].iloc[-1]
        assert Layout.of(model).flatten(model).sha256() == loaded.rounds["weights_sha256"].iloc[-1]


def test_weights_in_memory_are_copies():
    finished = run(None)
    finished.weights()["1.bias"].fill_(7)
    finished.model().get_parameter("1.bias").data.fill_(7)
    assert (finished.weights()["1.bias"] != 7).all()


def test_an_own_model_must_be_given_again(tmp_path):
    def own(input_shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, num_classes))

    finished = run(tmp_path, model=own)
    loaded = load_run(finished.path)
    assert loaded.weights()["1.num_batches_tracked"] > 0
    with pytest.raises(RunFolderError, match="model=make_model"):
        loaded.model()
    for model in (load_run(finished.path, model=own).model(), finished.model()):
        assert Layout.of(model).flatten(model).sha256() == loaded.rounds["weights_sha256"].iloc[-1]
        assert accuracy_of(model, datasets.load("synthetic")) == loaded.rounds["test_accuracy"].iloc[-1]


def test_a_loaded_run_is_the_run(tmp_path):
    finished = run(tmp_path)
    for path in (finished.path, str(finished.path)):
        loaded = load_run(path)
        assert (loaded.name, loaded.path, loaded.config) == (finished.name, finished.path, finished.config)
        assert loaded.status == "finished"
        pd.testing.assert_frame_equal(loaded.rounds, finished.rounds)
        pd.testing.assert_frame_equal(loaded.clients, finished.clients)


def test_config_toml_is_the_whole_configuration_and_gives_the_same_run_again(tmp_path):
    changes = {
        "data.partition.name": "dirichlet",
        "data.partition.alpha": 0.3,
        "strategy.name": "fedadam",
        "strategy.beta1": 0.5,
        "training.momentum": 0.9,
        "training.weight_decay": 1e-4,
        "clients.per_round": 0.5,
        "checkpoint.keep": "all",
        "seed": 2**63 - 1,
    }
    finished = run(tmp_path, changes)
    config = Config.from_toml(finished.path / "config.toml")
    assert config == finished.config == load_run(finished.path).config
    written = tomllib.loads((finished.path / "config.toml").read_text())
    assert written["data"]["partition"] == {"name": "dirichlet", "alpha": 0.3, "min_examples": 1}  # defaults filled in
    assert written["strategy"]["beta2"] == 0.99
    assert written["training"]["lr"] == 0.1
    again = fedsim.run(config, results=tmp_path)
    assert again.config == config
    assert again.rounds["weights_sha256"].equals(finished.rounds["weights_sha256"])
    assert again.clients["update_sha256"].equals(finished.clients["update_sha256"])


def test_what_is_no_run_cannot_be_loaded(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("missing", "foreign", "file"):
        with pytest.raises(RunFolderError, match=f"{name} is not a run"):
            load_run(tmp_path / name)


@pytest.mark.parametrize("text", [b"[]", b"null", b"{}", b'{"status": "finished"}'], ids=repr)
def test_a_foreign_run_json_is_none(tmp_path, text):
    folder = run(tmp_path, {"rounds": 0}).path
    (folder / "run.json").write_bytes(text)
    with pytest.raises(RunFolderError, match="not a run"):
        load_run(folder)
    assert find_runs(tmp_path) == []


@pytest.mark.parametrize("text", [b"", b"{", b'{"fedsim_run": 1,', b"\xff\xfe"], ids=repr)
def test_a_run_with_a_damaged_run_json_is_one_that_cannot_be_read(tmp_path, text):
    folder = run(tmp_path, {"rounds": 0}).path
    (folder / "run.json").write_bytes(text)
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        load_run(folder)
    assert find_runs(tmp_path) == [folder]


def test_a_run_that_loses_its_run_json_says_so(tmp_path):
    finished = run(tmp_path, {"rounds": 0})
    (finished.path / "run.json").unlink()
    with pytest.raises(RunFolderError, match="not a run"):
        finished.info  # noqa: B018 - the property raises


def test_a_run_of_a_newer_fedsim_is_refused(tmp_path):
    folder = run(tmp_path, {"rounds": 0}).path
    (folder / "run.json").write_text(json.dumps(info(folder) | {"fedsim_run": 999, "versions": {"fedsim": "9.9"}}))
    with pytest.raises(RunFolderError, match=r"version 999.*update fedsim"):
        load_run(folder)


@pytest.mark.parametrize("text", [None, "name = ", "[nothing]\nknown = 1\n"], ids=["missing", "cut", "unknown key"])
def test_a_run_with_a_damaged_configuration_is_an_input_error(tmp_path, text):
    folder = run(tmp_path, {"rounds": 0}).path
    (folder / "config.toml").unlink()
    if text is not None:
        (folder / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_run(folder)


def test_a_run_is_a_line_in_a_notebook(tmp_path, every_round):
    for made in (run(None), run(tmp_path)):
        last = made.rounds["test_accuracy"].iloc[-1]
        assert repr(made) == f"<Run mnist: finished, 3/3 rounds, test accuracy {last:.4f}>"
    part = tmp_path / "mnist/rounds.parquet/part-000003-000003.parquet"
    part.write_bytes(b"no Parquet")
    last = pq.read_table(part.with_name("part-000002-000002.parquet"))["test_accuracy"][0].as_py()
    assert repr(made) == f"<Run mnist: finished, 2/3 rounds, test accuracy {last:.4f}>", "and no warning"
    (tmp_path / "mnist").rename(tmp_path / "elsewhere")
    assert repr(made) == f"<Run mnist: {tmp_path}/mnist/rounds.parquet is missing, or has lost all of its parts>"


def test_runs_are_a_line_in_a_notebook(tmp_path):
    first = run(tmp_path, {"rounds": 0})
    assert repr(Runs()) == "<0 runs>"
    assert repr(Runs([first])) == "<1 run: mnist>"
    assert repr(Runs([first] * 5)) == "<5 runs: mnist, mnist, mnist, mnist, mnist>"
    assert repr(Runs([first] * 6)) == "<6 runs: mnist, mnist, mnist, mnist, mnist, ...>"


def test_many_runs_are_one_frame(tmp_path, monkeypatch):
    for seed in (0, 1):
        run(tmp_path, {"seed": seed, "name": f"seed-{seed}"})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    monkeypatch.chdir(tmp_path.parent)
    folders = [tmp_path / "seed-0", str(tmp_path / "seed-1")]
    for paths in (f"{tmp_path}/*", f"{tmp_path.name}/*", tmp_path / "seed-?", folders, iter(folders)):
        runs = load_runs(paths)
        assert [found.name for found in runs] == ["seed-0", "seed-1"]
        assert runs.rounds.groupby("run")["round"].max().to_dict() == {"seed-0": 3, "seed-1": 3}
        assert runs.clients.groupby("run").size().to_dict() == {"seed-0": 9, "seed-1": 9}
        assert runs.rounds.index.is_unique
    one = load_runs(tmp_path / "seed-1").rounds
    pd.testing.assert_frame_equal(one, load_run(tmp_path / "seed-1").rounds)


def test_runs_that_have_only_begun_are_among_many(tmp_path):
    run(tmp_path, name="done")
    with Recording.of(SERIAL, results=tmp_path, name="begun") as recording:
        runs = load_runs(f"{tmp_path}/*")
        assert [(found.name, found.status) for found in runs] == [("begun", "running"), ("done", "finished")]
        pd.testing.assert_frame_equal(runs.rounds, load_run(tmp_path / "done").rounds)
        list(recording)
    assert set(load_runs(f"{tmp_path}/*").rounds["run"]) == {"begun", "done"}


@pytest.mark.parametrize("paths", ["nothing/*", [], ["foreign"], "foreign"], ids=str)
def test_no_run_among_the_paths_is_an_error(tmp_path, monkeypatch, paths):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(RunFolderError, match="no run among"):
        load_runs(paths)


def test_a_pattern_stands_for_what_its_matches_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("results/a", "results/swept/seed-0", "results/swept/seed-1"):
        run(Path(name).parent, {"rounds": 0}, name=Path(name).name)
    (tmp_path / "results" / "foreign").mkdir()
    assert [found.name for found in load_runs("results/*")] == ["a", "seed-0", "seed-1"]
    assert [found.name for found in load_runs("results/s*")] == ["seed-0", "seed-1"]
    assert [found.name for found in load_runs("results")] == ["a"]
    for name in ("a", "swept"):
        with pytest.raises(RunFolderError, match=f"^{name} is not there; did you mean results/{name}\\?$"):
            load_runs(name)


def test_the_runs_of_a_folder_are_found_by_name(tmp_path):
    for name in ("b", "a", "c"):
        run(tmp_path, {"rounds": 0}, name=name)
    (tmp_path / "foreign").mkdir()
    assert [found.name for found in find_runs(tmp_path)] == ["a", "b", "c"]
    assert find_runs(tmp_path / "missing") == []


def test_a_name_taken_in_the_last_moment_gives_the_next_one_or_is_refused_if_asked_for(tmp_path):
    unnamed, named = Recording.of(SERIAL, results=tmp_path), Recording.of(SERIAL, results=tmp_path, name="mnist")
    answers = [tmp_path / "mnist", tmp_path / "mnist-2"]  # the first is free when asked for, and taken when made
    unnamed._home.make = lambda: answers.pop(0)
    named._home.make = lambda: tmp_path / "mnist"
    (tmp_path / "mnist").mkdir()
    with unnamed:
        assert unnamed.name == "mnist-2"
    with pytest.raises(RunFolderError, match="exists already"):
        named.__enter__()
    assert list((tmp_path / "mnist").iterdir()) == []
