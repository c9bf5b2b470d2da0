"""Whatever dies, and whatever it leaves: the run goes on with equal bits, or a line names what is damaged."""

import contextlib
import errno
import fcntl
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import SERIAL, assert_same_results, content, is_gone, wait_until

import fedsim
from fedsim import checkpoint
from fedsim.errors import FedsimError, FedsimWarning, InputError, RunFailedError, RunFolderError
from fedsim.recording import Recording
from fedsim.results import RunWriter, begin, find_whole, load_run, writer

pytestmark = pytest.mark.long

CONFIG = SERIAL.override({"strategy.name": "fedadam", "evaluation.every": 2, "checkpoint.every_s": 0.0})
LONGER = {"rounds": 5}


@pytest.fixture(autouse=True)
def every_round(monkeypatch):
    """A part for each round, as if each took a second: more files, more moments to die in."""
    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    return fedsim.run(CONFIG, results=tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """The longer run that nothing happened to."""
    return fedsim.run(CONFIG.override(LONGER), results=tmp_path_factory.mktemp("longer"))


class Snapshots:
    """Copies of a folder as a kill would leave it, before each file operation and in the middle of each write."""

    def __init__(self, monkeypatch, folder, to):
        self.folders, self._folder, self._to = [], folder, to
        self._seen = set()
        write_bytes = Path.write_bytes

        def half(path, data):
            self.take()
            write_bytes(path, data[: len(data) // 2])
            self.take()
            return write_bytes(path, data)

        monkeypatch.setattr(Path, "write_bytes", half)
        for name in ("replace", "unlink", "mkdir"):
            monkeypatch.setattr(Path, name, self._after(getattr(Path, name)))

    def _after(self, operation):
        def taken(path, *arguments, **named):
            self.take()
            return operation(path, *arguments, **named)

        return taken

    def take(self):
        if not self._folder.exists():
            return
        now = hash(tuple(content(self._folder).items()))
        if now not in self._seen:
            self._seen.add(now)
            self.folders.append(shutil.copytree(self._folder, self._to / f"{len(self.folders):04d}" / "mnist"))


def resume_quietly(folder, **arguments):
    """A kill is nothing to warn of: what it leaves is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fedsim.resume(folder, **arguments)


def test_a_run_killed_at_any_moment_goes_on_with_the_same_bits(tmp_path, whole):
    with pytest.MonkeyPatch.context() as patch:
        snapshots = Snapshots(patch, tmp_path / "run" / "mnist", tmp_path / "killed")
        fedsim.run(CONFIG, results=tmp_path / "run")
    assert len(snapshots.folders) > 60
    for folder in snapshots.folders:  # a folder that is there is a run: it is made under a hidden name
        assert load_run(folder).rounds["round"].tolist() == list(range(len(load_run(folder).rounds)))
        assert_same_results(resume_quietly(folder), whole)


def test_a_run_interrupted_in_any_line_of_its_writer_has_whole_records(tmp_path, monkeypatch, whole):
    """Here at the last rounds of a run that wrote none of its rows before."""
    monkeypatch.setattr(writer, "FLUSH_S", 3600)
    config = CONFIG.override({"checkpoint.every_s": 3600.0})
    lines, write = [], RunWriter.write

    def interrupting(frame, event, argument):
        if frame.f_code.co_filename != writer.__file__:
            return None
        if event == "line" and frame.f_lineno not in lines[-20:]:  # once where a line goes through a list
            lines.append(frame.f_lineno)
            if len(lines) == at:
                raise KeyboardInterrupt
        return interrupting

    def traced(self, record, *rest, **named):
        sys.settrace(interrupting if record.round >= 2 else None)
        try:
            write(self, record, *rest, **named)
        finally:
            sys.settrace(None)

    monkeypatch.setattr(RunWriter, "write", traced)
    for at in itertools.count(1):
        lines.clear()
        try:
            fedsim.run(config, results=tmp_path, name=f"{at}")
        except KeyboardInterrupt:
            found = find_whole(tmp_path / f"{at}")
            assert (found.damage, found.last in (1, 2, 3)) == (None, True), f"line {lines[-1]}"
            saved = checkpoint.rounds(tmp_path / f"{at}" / "checkpoint")
            assert set(saved) <= {found.last}, f"line {lines[-1]}"
            assert load_run(tmp_path / f"{at}").status == "interrupted"
            if at % 8 == 0:
                assert_same_results(resume_quietly(tmp_path / f"{at}"), whole)
        else:
            break
    assert at > 30


def test_a_run_killed_while_it_replaces_another_can_be_overwritten_again(tmp_path, whole):
    shutil.copytree(whole.path, tmp_path / "run" / "mnist")
    (tmp_path / "run" / "mnist" / "notes.txt").write_text("the user's own")
    with pytest.MonkeyPatch.context() as patch:
        snapshots = Snapshots(patch, tmp_path / "run" / "mnist", tmp_path / "killed")
        run = fedsim.run(CONFIG, results=tmp_path / "run", name="mnist", overwrite=True)
    assert_same_results(run, whole)
    assert len(snapshots.folders) > 60
    for folder in snapshots.folders:
        assert (folder / "notes.txt").exists()
        with warnings.catch_warnings(), contextlib.suppress(InputError):  # or refused: then nothing is done to it
            warnings.simplefilter("ignore", FedsimWarning)
            before = content(folder)
            assert_same_results(fedsim.resume(folder), whole)
            continue
        assert content(folder) == before
        assert_same_results(fedsim.run(CONFIG, results=folder.parent, name="mnist", overwrite=True), whole)


def test_what_a_run_killed_in_its_first_moment_has_left_is_swept(tmp_path):
    left = tmp_path / ".mnist.123.new"
    begin(left, CONFIG, {}).__exit__(None, None, None)
    (left / "rounds.parquet" / ".part-empty.parquet.123.tmp").touch()
    fedsim.run(CONFIG, results=tmp_path)
    assert left.exists(), "it may be another process's, and a moment old"
    os.utime(left, (0, 0))
    with (left / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fedsim.run(CONFIG, results=tmp_path)
        assert left.exists(), "it is being written"
    fedsim.run(CONFIG, results=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mnist", "mnist-2", "mnist-3"]


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        (".photos.new", ".lock"),
        (".mnist.2024b.new", ".lock"),
        ("..5.new", ".lock"),
        (".mnist.5.new", "precious.txt"),
        (".mnist.5.new", "rounds.parquet/part-000000-000003.parquet"),
        (".mnist.5.new", ".hidden"),
    ],
)
def test_what_need_not_be_fedsims_is_not_swept(tmp_path, folder, file):
    (tmp_path / folder / file).parent.mkdir(parents=True)
    (tmp_path / folder / file).touch()
    os.utime(tmp_path / folder, (0, 0))
    fedsim.run(CONFIG, results=tmp_path)
    assert (tmp_path / folder / file).exists()


def test_a_resume_killed_at_any_moment_can_be_resumed(tmp_path, whole, longer):
    """Here one that makes the run longer, and forgets an evaluation."""
    folder = shutil.copytree(whole.path, tmp_path / "run" / "mnist")
    with pytest.MonkeyPatch.context() as patch:
        snapshots = Snapshots(patch, folder, tmp_path / "killed")
        fedsim.resume(folder, changes=LONGER)
    assert len(snapshots.folders) > 30
    for snapshot in snapshots.folders:
        assert_same_results(resume_quietly(snapshot, changes=LONGER), longer)


def test_a_resume_that_takes_rounds_back_can_be_killed_too(tmp_path, whole):
    folder = shutil.copytree(whole.path, tmp_path / "run" / "mnist")
    for name in ("000003.json", "000002.json"):
        (folder / "checkpoint" / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        snapshots = Snapshots(patch, folder, tmp_path / "killed")
        fedsim.resume(folder)
    assert len(snapshots.folders) > 60
    assert not (snapshots.folders[40] / "rounds.parquet" / "part-000002-000002.parquet").exists()
    for snapshot in snapshots.folders[:40]:
        rounds, clients = load_run(snapshot).rounds["round"], load_run(snapshot).clients["round"]
        assert rounds.tolist() == list(range(len(rounds))), "readers see a whole run at every moment"
        assert set(rounds) - {0} <= set(clients)
        assert_same_results(resume_quietly(snapshot), whole)


# --- Damage ----------------------------------------------------------------------------------------------------------


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize("damage", ["flip", "cut", "zero", "remove"])
@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_any_damage_to_any_file_is_mended_or_named(tmp_path, whole, state, damage, times):
    """At positions drawn from a seed: equal results, or an error that names the file and changes nothing."""
    rng = np.random.Generator(np.random.PCG64([times, len(damage), len(state)]))
    if state == "finished":
        original = whole.path
    else:
        with Recording.of(CONFIG, results=tmp_path) as recording:
            for record in recording:
                if record.round == 2:
                    break
        original = recording.folder
    mended, refused, problems = 0, 0, []
    for number, file in enumerate(
        name for name in files_of(original) for _ in range(1 if damage == "remove" else times)
    ):
        folder = shutil.copytree(original, tmp_path / f"{number}" / "mnist")
        path = folder / file
        data = bytearray(path.read_bytes())
        place = int(rng.integers(len(data)))
        if damage == "flip":
            data[place] ^= 1 << int(rng.integers(8))
        elif damage == "zero":  # as a power loss leaves a block
            data[place : place + 4096] = bytes(len(data[place : place + 4096]))
        path.unlink()
        if damage != "remove":
            path.write_bytes(data[:place] if damage == "cut" else data)
        before = content(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resumed = fedsim.resume(folder)
        except FedsimError as error:
            refused += 1
            said = str(error)
            if file.name not in said and not (file.name == "run.json" and "in the run" in said):
                problems.append(f"{file} at {place} is not named: {said}")
            if file.name not in ("run.json", "config.toml"):
                problems.append(f"{file} at {place} could be computed again: {said}")
            if content(folder) != before:
                problems.append(f"{file} at {place}: the folder was touched")
        else:
            mended += 1
            assert_same_results(resumed, whole)
            assert_same_results(load_run(folder), whole)
    assert problems == []
    assert mended > 5
    assert refused >= 1


# --- A disk that is full, or gone ------------------------------------------------------------------------------------


def failing_at(monkeypatch, number, code=errno.ENOSPC, lasting=False):
    """Lets the write of that number fail when half is written; all later ones too, if it is to last."""
    write_bytes, count = Path.write_bytes, [0]

    def write(path, data):
        count[0] += 1
        if count[0] == number or (lasting and count[0] > number):
            write_bytes(path, data[: len(data) // 2])
            raise OSError(code, os.strerror(code), str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    return count


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_any_write_may_fail(tmp_path, whole, lasting):
    with pytest.MonkeyPatch.context() as patch:
        count = failing_at(patch, 0)
        fedsim.run(CONFIG, results=tmp_path / "counted")
    assert count[0] > 20
    not_begun = 0
    for number in range(1, count[0] + 1):
        results = tmp_path / f"{number}"
        with pytest.MonkeyPatch.context() as patch:
            failing_at(patch, number, lasting=lasting)
            with pytest.raises((RunFailedError, RunFolderError), match="No space left on device") as failed:
                fedsim.run(CONFIG, results=results)
        assert len(str(failed.value).splitlines()) == 1
        assert ".tmp" not in str(failed.value)
        folder = results / "mnist"
        assert not list(folder.rglob(".*.tmp"))
        if failed.type is RunFolderError:  # nothing had begun, and nothing is left
            not_begun += 1
            assert failed.value.exit_code == 2
            assert content(results) == {}
            continue
        assert failed.value.exit_code == 1
        assert failed.value.__notes__ == [f"fedsim resume {folder} goes on with the run"]
        if number < count[0]:  # the last is the one that says how it ended
            assert load_run(folder).status == ("interrupted" if lasting else "failed")
        rounds = load_run(folder).rounds["round"].tolist()
        assert rounds == list(range(len(rounds)))
        assert_same_results(resume_quietly(folder), whole)
    assert not_begun == 4


def test_any_write_of_a_resume_may_fail(tmp_path, longer, whole):
    with pytest.MonkeyPatch.context() as patch:
        count = failing_at(patch, 0)
        fedsim.resume(shutil.copytree(whole.path, tmp_path / "counted" / "mnist"), changes=LONGER)
    assert count[0] > 10
    for number in range(1, count[0] + 1):
        folder = shutil.copytree(whole.path, tmp_path / f"{number}" / "mnist")
        with pytest.MonkeyPatch.context() as patch:
            failing_at(patch, number)
            with pytest.raises((RunFailedError, RunFolderError), match=r"cannot write .*No space left on device"):
                fedsim.resume(folder, changes=LONGER)
        assert_same_results(resume_quietly(folder, changes=LONGER), longer)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_folder_that_cannot_be_written_any_more_is_said_in_a_line(tmp_path, whole, code):
    with pytest.MonkeyPatch.context() as patch:
        failing_at(patch, 10, code, lasting=True)
        with pytest.raises(RunFailedError, match=rf"^cannot write {tmp_path}/mnist/\S+: {os.strerror(code)}\n"):
            fedsim.run(CONFIG, results=tmp_path)
    assert_same_results(resume_quietly(tmp_path / "mnist"), whole)


def test_an_interrupt_is_not_hidden_by_a_full_disk(tmp_path, whole):
    def interrupt(patch):
        with Recording.of(CONFIG, results=tmp_path) as recording:
            for record in recording:
                if record.round == 1:
                    failing_at(patch, 1, lasting=True)
                    raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch)
    assert_same_results(resume_quietly(tmp_path / "mnist"), whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with little room, where this can be had."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_costs_no_round(small_disk, tmp_path, whole):
    (small_disk / "others").write_bytes(bytes(80_000))
    with pytest.raises(RunFailedError, match=r"^cannot write .*: No space left on device; free some space\n"):
        fedsim.run(CONFIG, results=small_disk)
    folder = small_disk / "mnist"
    assert not list(folder.rglob(".*.tmp"))
    rounds = load_run(folder).rounds["round"].tolist()
    assert rounds == list(range(len(rounds)))
    (small_disk / "others").unlink()
    shutil.copytree(folder, tmp_path / "mnist")  # a run needs the room that it needs
    assert_same_results(resume_quietly(tmp_path / "mnist"), whole)


def test_a_read_only_disk_is_refused_before_anything_starts(small_disk, monkeypatch):
    fedsim.run(CONFIG.override({"rounds": 0}), results=small_disk, name="done")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    monkeypatch.setattr("fedsim.launch.connect", None)
    with pytest.raises(RunFolderError, match="is read-only; name another with --results"):
        fedsim.run(CONFIG, results=small_disk)
    with pytest.raises(RunFolderError, match=r"cannot write to the run's folder .*Read-only file system"):
        fedsim.resume(small_disk / "done", changes={"rounds": 1})


# --- kill -9 ---------------------------------------------------------------------------------------------------------

DRIVER = """
import sys
from pathlib import Path
import fedsim
from fedsim.results import writer
writer.FLUSH_S = 0
folder = Path("results/mnist")
print("up", flush=True)
if folder.exists():
    fedsim.resume(folder)
else:
    fedsim.run(fedsim.Config.from_toml(Path("config.toml")), results="results", name="mnist")
"""


def start_driver(folder, config):
    (folder / "config.toml").write_text(config.to_toml())
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=folder, stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "up\n"
    return driver


def test_kill_9_of_a_driver(tmp_path):
    config = CONFIG.override({"rounds": 60})
    driver = start_driver(tmp_path, config)
    wait_until(lambda: len(list(tmp_path.glob("results/mnist/rounds.parquet/part-0*"))) > 8)
    driver.kill()
    driver.communicate()
    folder = tmp_path / "results" / "mnist"
    killed = load_run(folder)
    assert killed.status == "interrupted"
    assert 8 < len(killed.rounds) < 61, "it was killed in the middle"
    assert_same_results(resume_quietly(folder), fedsim.run(config, results=None))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_20_times_kill_9_of_a_driver_with_actors(tmp_path):
    """At moments drawn from a seed, from the start of Ray to the last round; no process of a killed one is left."""
    config = CONFIG.override({"placement.mode": "packed", "placement.actors": 2, "rounds": 2500})
    rng = np.random.Generator(np.random.PCG64(20))
    folder, left, kills = tmp_path / "results" / "mnist", set(), []
    while len(kills) < 20:
        before = {path.name for path in folder.glob("rounds.parquet/part-0*")}
        driver, started = start_driver(tmp_path, config), time.monotonic()
        is_early = len(kills) % 4 == 0  # while Ray starts; the others when rounds are done, however slow the machine is
        wait_s, end = float(rng.uniform(0.0, 3.0)), math.inf
        while time.monotonic() < end and driver.poll() is None:
            assert time.monotonic() < started + 120, "no round is done"
            if end == math.inf and (is_early or {path.name for path in folder.glob("rounds.parquet/part-0*")} - before):
                end = time.monotonic() + wait_s
            with contextlib.suppress(psutil.NoSuchProcess):
                left |= set(psutil.Process(driver.pid).children(recursive=True))
            time.sleep(0.05)
        assert driver.poll() is None, "it was killed, and did not end"
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        if folder.exists() and not (folder / "run.json").exists():  # killed in the moment that the folder was made
            shutil.rmtree(folder)
        kills.append(len(load_run(folder).rounds) if folder.exists() else 0)
    assert len(set(kills)) > 5, kills
    resumed = resume_quietly(folder)
    assert_same_results(resumed, fedsim.run(config.override({"placement.mode": "serial"}), results=None))
    wait_until(lambda: all(is_gone(process.pid) for process in left), timeout_s=150)
