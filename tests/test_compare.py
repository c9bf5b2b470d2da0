"""`fedsim compare` and what it rests on: runs named in every way, tables, and where two runs part."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import fedsim
from fedsim import cli
from fedsim.cli.terminal import console
from fedsim.comparison import parting
from fedsim.errors import InputError, RunFolderError
from fedsim.metrics import CLIENT_SCHEMA
from fedsim.results import Runs, parts
from fedsim.run_folder import paths_of
from tests.helpers import SERIAL


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run, a longer one, one with another rate from which it parts, and a sweep."""
    folder = tmp_path_factory.mktemp("results")
    fedsim.run(SERIAL, results=folder, name="short")
    fedsim.run(SERIAL.override({"rounds": 5}), results=folder, name="long")
    fedsim.run(SERIAL.override({"training.lr": 0.3}), results=folder, name="other-rate")
    fedsim.sweep(SERIAL, {"training.lr": [0.1, 0.3]}, [0, 1, 2], results=folder, name="swept")
    return folder


def compare(results, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "--results", str(results), *words])
    return ended.value.code


@pytest.mark.long
def test_one_run(results, capsys):
    assert compare(results, "short") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "status", "rounds", "seconds", "final", "best"]
    accuracy = fedsim.load_run(results / "short").rounds["test_accuracy"]
    assert row.split()[:3] == ["short", "finished", "3"]
    assert row.split()[4:] == [f"{accuracy.iloc[-1]:.4f}", f"{accuracy.max():.4f}"]


def test_equal_runs(results, capsys):
    assert compare(results, "short", "long") == 0
    said = capsys.readouterr().out
    assert "all results are equal, to the bit in the 4 rounds that both have" in said
    assert "rounds        3      5" in said
    assert "they part" not in said


def test_two_runs_part_in_the_first_client_that_trained_otherwise(results, capsys):
    assert compare(results, "short", str(results / "other-rate")) == 0
    said = capsys.readouterr().out
    first = fedsim.load_run(results / "short").clients["client_id"].iloc[0]
    assert f"they part in round 1, client {first}: train_loss is" in said
    assert "training.lr   0.1    0.3" in said
    assert "difference to training.lr=0.1, by seed" in said


def test_runs_of_other_seeds_part_in_the_initial_weights(results):
    one, other = (fedsim.load_run(results / "swept" / f"lr-0.1_seed-{seed}") for seed in (0, 1))
    difference = parting(one, other)
    assert (difference.round, difference.client_id) == (0, None)


@pytest.mark.parametrize("key", ["evaluation.clients", "evaluation.every"])
def test_what_one_run_only_recorded_is_no_parting(results, tmp_path, key):
    short = fedsim.load_run(results / "short")
    value = True if key == "evaluation.clients" else 2
    same = fedsim.run(SERIAL.override({key: value}), results=tmp_path, name="same")
    assert parting(short, same) is None
    other = fedsim.run(SERIAL.override({key: value, "training.lr": 0.3}), results=tmp_path, name="other")
    difference = parting(short, other)
    assert (difference.round, difference.column) == (1, "train_loss")


def test_what_parts_is_what_was_changed(results, tmp_path):
    """A row that is changed by hand is found, whatever the column and place."""
    one = fedsim.run(SERIAL, results=tmp_path, name="one")
    assert parting(one, fedsim.load_run(results / "short")) is None
    part = max((one.path / "clients.parquet").glob("part-0*"))
    frame = pd.read_parquet(part)
    place = frame.index[frame["round"] == 2][1]
    frame.loc[place, "cosine_to_mean"] += 1e-15
    parts.write(one.path, "clients", part.name, pa.Table.from_pandas(frame, CLIENT_SCHEMA))
    difference = parting(one, fedsim.load_run(results / "short"))
    assert (difference.round, difference.column) == (2, "cosine_to_mean")
    assert difference.client_id == frame.loc[place, "client_id"]


def test_runs_with_rounds_missing_are_compared_by_what_they_have(results, tmp_path, capsys):
    shutil.copytree(results / "long", tmp_path / "gap")
    for kind in ("rounds", "clients"):
        rows, _ = fedsim.results.read(results / "long", kind)
        for part in (tmp_path / "gap" / f"{kind}.parquet").glob("part-0*"):
            part.unlink()
        some = rows.filter(pc.not_equal(rows["round"], 1))
        parts.write(tmp_path / "gap", kind, "part-000000-000005.parquet", some)
    assert compare(results, "long", str(tmp_path / "gap")) == 0
    assert "all results are equal, to the bit in the 5 rounds that both have" in capsys.readouterr().out


@pytest.fixture
def warned(monkeypatch):
    """The command line's own way with warnings, which a test run would take for errors."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def in_parts(results, folder, kind, *gone):
    """A copy of a run of five rounds with a part a round, without some of them."""
    shutil.copytree(results / "long", folder)
    for each in ("rounds", "clients"):
        rows, _ = fedsim.results.read(results / "long", each)
        for part in (folder / f"{each}.parquet").glob("part-0*"):
            part.unlink()
        for round in range(each == "clients", 6):
            if (each, round) not in [(kind, number) for number in gone]:
                some = rows.filter(pc.equal(rows["round"], round))
                parts.write(folder, each, f"part-{round:06d}-{round:06d}.parquet", some)
    return str(folder)


@pytest.mark.usefixtures("warned")
@pytest.mark.parametrize(
    ("kind", "gone"), [("rounds", 0), ("rounds", 3), ("rounds", 5), ("clients", 3), ("clients", 5)]
)
def test_a_part_that_is_missing_is_named_and_nothing_is_made_of_its_absence(results, tmp_path, capsys, kind, gone):
    whole, holey = in_parts(results, tmp_path / "whole", kind), in_parts(results, tmp_path / "holey", kind, gone)
    assert compare(results, holey, whole, "--target", "test_accuracy=0.9999") == 0
    said = "".join(capsys.readouterr())
    assert "whether they part cannot be said" in said
    assert ("holey is left out for whole" in said) == (kind == "rounds")
    if kind == "rounds":
        named = f"lacks the part with round {gone}"
        assert "whether test_accuracy=0.9999 was reached is not known of holey, as rows are missing" in said
    else:
        named = f"clients.parquet/part-00000{gone}-00000{gone}.parquet is missing"
        assert "no run has reached test_accuracy=0.9999" in said
    assert named in said
    with pytest.warns(fedsim.errors.FedsimWarning, match=named):
        assert len(getattr(fedsim.load_run(holey), kind)) == len(getattr(fedsim.load_run(whole), kind)) - (
            1 if kind == "rounds" else 3
        )


@pytest.mark.usefixtures("warned")
def test_a_run_that_lost_all_of_its_rounds_is_not_taken_for_one_that_has_none(results, tmp_path, capsys):
    gone = in_parts(results, tmp_path / "gone", "rounds", *range(6))
    assert compare(results, "long", gone) == 0
    said = "".join(capsys.readouterr())
    assert "lacks the part with rounds 0 to 5" in said
    assert "whether they part cannot be said" in said


def test_lists_that_differ_are_shown(results, tmp_path, capsys):
    fedsim.run(SERIAL, results=tmp_path, name="stopped", stop_at={"test_accuracy": 0.2})
    assert compare(results, "short", str(tmp_path / "stopped")) == 0
    assert re.search(r"stop_at +test_accuracy=0\.2", capsys.readouterr().out)


def test_the_first_that_is_named_is_the_base_of_the_differences(results, capsys):
    names = [str(results / name) for name in ("other-rate", "long", "other-rate", "short")]
    assert compare(results, *names) == 0
    assert "difference to rounds=3, training.lr=0.3, by seed" in capsys.readouterr().out


def test_where_a_part_is_damaged_the_rest_of_the_comparison_is_there(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command line replaces
    bad = shutil.copytree(results / "long", tmp_path / "bad")
    (bad / "rounds.parquet" / parts.EMPTY).write_bytes(b"torn")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert compare(results, "long", str(bad)) == 0
    said = capsys.readouterr().out
    assert "whether they part cannot be said: the records of" in said
    assert f"{parts.EMPTY} is damaged" in said


def test_a_target_that_nobody_recorded_is_not_one_that_nobody_reached(results, capsys):
    assert compare(results, "short", "long", "--target", "accuracy_before_mean=0.5") == 0
    said = capsys.readouterr().out
    assert "accuracy_before_mean was not recorded by short, long" in said
    assert "no run has reached" not in said


def test_no_name_is_cut_off_on_a_narrow_terminal(results, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 60)
    assert compare(results, "swept", "--target", "test_accuracy=0.5") == 0
    said = capsys.readouterr().out
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 60


def test_folders_with_odd_names_are_found(results, tmp_path, capsys):
    for name in ("x[1]", "y*"):
        shutil.copytree(results / "short", tmp_path / name / "a")
    assert compare(results, str(tmp_path / "x[1]" / "a"), str(tmp_path / "y*")) == 0
    assert "all results are equal" in capsys.readouterr().out
    shutil.copytree(results / "short", tmp_path / "y*" / ".a.1.new")
    assert len(fedsim.load_runs(tmp_path / "y*")) == 1
    assert len(fedsim.load_runs([tmp_path / "y*", tmp_path / "y*" / "a"])) == 1


def test_what_was_configured_and_planned_is_named_once(results, tmp_path, capsys):
    run = fedsim.run(
        SERIAL.override({"placement.threads": 2, "evaluation.clients": True}), results=tmp_path, name="two"
    )
    assert compare(results, "short", str(run.path)) == 0
    said = capsys.readouterr().out.partition("different in")[2]
    assert said.count("placement.threads") == 1
    assert re.search("evaluation.clients +false +true", said)


def test_environments_that_differ_are_named(results, tmp_path, capsys):
    run = fedsim.run(SERIAL, results=tmp_path, name="elsewhere")
    info = json.loads((run.path / "run.json").read_text())
    info["versions"]["torch"], info["numerics_fingerprint"] = "1.0", "f" * 16
    (run.path / "run.json").write_text(json.dumps(info))
    assert compare(results, "short", str(run.path)) == 0
    said = capsys.readouterr().out
    assert "versions.torch" in said
    assert "numerics_fingerprint" in said
    assert "started_at" not in said


def test_runs_of_one_seed_count_once(results, tmp_path, capsys):
    fedsim.run(SERIAL, results=tmp_path, name="again")
    assert compare(results, "short", str(tmp_path / "again"), "other-rate") == 0
    assert "one counts in means: again is left out for short." in capsys.readouterr().out


def test_a_sweep_is_compared_by_groups(results, capsys):
    assert compare(results, "swept", "--target", "test_accuracy=0.5") == 0
    said = capsys.readouterr().out
    assert said.count("lr-0.1_seed-") == 3
    assert "mean over seeds [95 % confidence]" in said
    assert "training.lr=0.3" in said
    assert "difference to training.lr=0.1, by seed" in said
    assert "rounds to target" in said
    assert "they part" not in said


def test_a_target_that_nobody_reached_is_said(results, capsys):
    assert compare(results, "short", "--target", "test_accuracy=0.9999") == 0
    said = capsys.readouterr().out
    assert "no run has reached test_accuracy=0.9999" in said
    assert said.splitlines()[1].split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing"], "'nothing' is not a run"),
        (["short", "--target", "accuracy=1"], "'accuracy' cannot be a target"),
        (["short", "--target", "0.97"], "write it as test_accuracy=0.97"),
        (["short", "--target", "test_accuracy=0.5", "--target", "test_loss=1"], "give one --target, not 2"),
        (["."], "'.' is not a run"),
    ],
)
def test_bad_input(results, capsys, words, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert compare(tmp_path if "." in words else results, *words) == 2
    assert said in capsys.readouterr().err


def test_runs_are_named_by_path_name_or_their_folder(results, monkeypatch):
    inside = sorted((results / "swept").iterdir())
    assert paths_of(["swept"], results) == inside
    assert paths_of([str(results / "swept"), "short", "short"], results) == [*inside, results / "short"]
    monkeypatch.chdir(results)
    assert [path.name for path in paths_of(["."], results)] == ["long", "other-rate", "short"]
    with pytest.raises(RunFolderError, match="neither a run's folder nor a name"):
        paths_of(["short", "elsewhere"], results)


def test_many_runs_from_python(results):
    runs = fedsim.load_runs(results / "swept")
    assert runs.configs["training.lr"].to_dict() == {run.name: run.config.training.lr for run in runs}
    frame = runs.summary(target={"test_accuracy": 0.5})
    assert frame["run"].tolist() == [run.name for run in runs]
    assert set(runs.over_seeds()["group"]) == {"training.lr=0.1", "training.lr=0.3"}
    assert runs.paired({"test_accuracy": 0.5})["than"].unique().tolist() == ["training.lr=0.1"]
    assert set(runs.rounds.merge(runs.configs, on="run")["seed"]) == {0, 1, 2}
    with pytest.raises(InputError, match="give one target, not 2"):
        runs.summary({"test_accuracy": 0.5, "test_loss": 1.0})


@pytest.mark.parametrize("of", ["rounds", "clients", "configs", "summary", "over_seeds", "paired"])
def test_no_runs_are_a_clear_error(of):
    with pytest.raises(InputError, match="these Runs are empty"):
        getattr(Runs(), of)()


def test_runs_of_one_name_are_told_apart(results, tmp_path):
    other = fedsim.run(SERIAL.override({"seed": 5}), results=tmp_path, name="short")
    runs = fedsim.load_runs([results / "short", other.path])
    assert set(runs.rounds["run"]) == {str(results / "short"), str(other.path)} == set(runs.summary()["run"])
    (tmp_path / "short").rename(tmp_path / "renamed")
    assert set(fedsim.load_runs([results / "short", tmp_path / "renamed"]).clients["run"]) == {"short", "renamed"}


def test_a_pattern_finds_runs_and_sweeps_and_a_folder_of_none_is_an_error(results, tmp_path):
    alone, swept = ["long", "other-rate", "short"], [path.name for path in sorted((results / "swept").glob("*"))]
    assert [run.name for run in fedsim.load_runs(f"{results}/*")] == alone + swept
    assert [run.name for run in fedsim.load_runs(results)] == alone
    with pytest.raises(RunFolderError, match="no run among"):
        fedsim.load_runs(tmp_path)
