"""Runs that are older, newer or damaged: what can be read is read, and what cannot is named."""

import json
import shutil
import warnings

import pandas as pd
import pyarrow as pa
import pytest
from helpers import COLUMNS, SERIAL, as_version, assert_same_results, content, make_old, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from fedsim.errors import FedsimWarning, NewerVersionError, RunFolderError
from fedsim.metrics import SCHEMA_VERSION
from fedsim.recording import Recording
from fedsim.results import Runs, load_run, load_runs, read
from fedsim.results.parts import SCHEMAS
from fedsim.verification import verify

KINDS = list(COLUMNS)
CONFIG = SERIAL.override({"checkpoint.every_s": 0, "checkpoint.keep": "all"})
PART = "part-000002-000002.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with a part and a checkpoint for each round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedsim.results.writer.FLUSH_S", 0)
        return fedsim.run(CONFIG, results=tmp_path_factory.mktemp("made")).path


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it, to be tampered with."""
    return shutil.copytree(made, tmp_path / "results" / "mnist")


def frame(run, kind):
    return getattr(run, kind)


# --- Older -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_an_old_run_lacks_are_null(made, folder, kind):
    make_old(folder)
    old, new = frame(load_run(folder), kind), frame(load_run(made), kind)
    pd.testing.assert_frame_equal(old, new, check_exact=True)  # evaluation.clients is off: there they are null too
    assert read(folder, kind)[0].schema.equals(SCHEMAS[kind], check_metadata=True)
    added = [column.name for column in COLUMNS[kind] if column.since > 1]
    assert old[added].isna().all(axis=None)
    assert not set(added) & set(pd.read_parquet(folder / f"{kind}.parquet"))


def test_an_old_run_is_verified_and_left_as_it_is_when_it_is_done(folder):
    make_old(folder)
    before = content(folder)
    assert verify(folder, rounds="all", placement={"mode": "serial"}).is_equal
    assert fedsim.resume(folder).status == "finished"
    assert content(folder) == before


def test_an_old_run_goes_on_after_its_old_parts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 0)
    make_old(folder)
    old = content(folder)
    resumed = fedsim.resume(folder, changes={"rounds": 5})
    assert_same_results(resumed, fedsim.run(CONFIG.override({"rounds": 5}), results=tmp_path, name="never-stopped"))
    parts = {path: data for path, data in old.items() if path.name.startswith("part-0")}
    assert parts.items() <= content(folder).items(), "old parts are kept as they are"
    for kind in KINDS:
        in_pandas, whole = pd.read_parquet(folder / f"{kind}.parquet"), frame(load_run(folder), kind)
        assert list(in_pandas) == [column.name for column in COLUMNS[kind] if column.since == 1]
        pd.testing.assert_frame_equal(in_pandas, whole[list(in_pandas)], check_exact=True)
        assert set(whole["round"]) == {*range(kind == "clients", 6)}
    assert verify(folder, rounds="all", placement={"mode": "serial"}).is_equal


def test_an_interrupted_old_run_whose_last_evaluation_is_taken_back_can_be_read(tmp_path, monkeypatch):
    """Then one of its old parts is written again."""
    monkeypatch.setattr("fedsim.results.writer.FLUSH_S", 0)
    config = CONFIG.override({"evaluation.every": 2})
    folder = fedsim.run(config, results=tmp_path).path
    make_old(folder)
    resumed = fedsim.resume(folder, changes={"rounds": 4})
    assert resumed.rounds["test_accuracy"].notna().tolist() == [True, False, True, False, True]
    assert pd.read_parquet(folder / "rounds.parquet")["round"].tolist() == [0, 1, 2, 3, 4]


def test_an_old_part_with_a_column_too_few_is_damaged(folder):
    make_old(folder)
    rewrite(folder / "rounds.parquet" / PART, lambda rows: rows.drop_columns(["train_loss"]))
    with pytest.warns(FedsimWarning, match=rf"{PART} is damaged: its columns"):
        assert load_run(folder).rounds["round"].tolist() == [0, 1, 3]


# --- Newer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", [PART, "part-empty.parquet"])
def test_a_part_of_a_newer_fedsim_is_refused_by_name(folder, kind, part):
    def newer(rows):
        return as_version(rows.append_column("of_tomorrow", pa.nulls(len(rows), pa.int64())), SCHEMA_VERSION + 1)

    rewrite(folder / f"{kind}.parquet" / part, newer)
    before = content(folder)
    said = rf"{part} is of schema version {SCHEMA_VERSION + 1}, this fedsim reads {SCHEMA_VERSION}; update fedsim"
    for reading in (
        lambda: frame(load_run(folder), kind),
        lambda: frame(load_runs(folder), kind),
        lambda: verify(folder, placement={"mode": "serial"}),
        lambda: fedsim.resume(folder),
        lambda: fedsim.resume(folder, changes={"rounds": 5}),
    ):
        with pytest.raises(NewerVersionError, match=said):
            reading()
    assert content(folder) == before
    assert len(pd.read_parquet(folder / f"{kind}.parquet")) > 0


# --- Damaged ---------------------------------------------------------------------------------------------------------


def retype(rows):
    place = rows.schema.get_field_index("round")
    return rows.set_column(place, "round", rows["round"].cast(pa.int64()))


DAMAGE = {
    "cut": lambda part: part.write_bytes(part.read_bytes()[:-100]),
    "empty": lambda part: part.write_bytes(b""),
    "flipped": lambda part: part.write_bytes(part.read_bytes()[:200] + b"?" + part.read_bytes()[201:]),
    "no Parquet": lambda part: part.write_bytes(b"PAR1, or so it says"),
    "a column too few": lambda part: rewrite(part, lambda rows: rows.drop_columns(["num_examples"])),
    "a column too many": lambda part: rewrite(part, lambda rows: rows.append_column("mine", rows["round"])),
    "another type": lambda part: rewrite(part, retype),
    "another order": lambda part: rewrite(part, lambda rows: rows.select(rows.column_names[::-1])),
    "not a version": lambda part: rewrite(part, lambda rows: as_version(rows.select(["round"]), "two")),
    "a folder": lambda part: (part.unlink(), part.mkdir()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_part_is_named_and_the_rest_is_read(made, folder, kind, damage):
    DAMAGE[damage](folder / f"{kind}.parquet" / PART)
    with pytest.warns(FedsimWarning, match=rf"mnist/{kind}\.parquet/{PART} is damaged: .*left out") as said:
        found = frame(load_run(folder), kind)
    assert len(said) == 1
    whole = frame(load_run(made), kind)
    pd.testing.assert_frame_equal(found, whole[whole["round"] != 2].reset_index(drop=True), check_exact=True)
    other = next(name for name in KINDS if name != kind)
    pd.testing.assert_frame_equal(frame(load_run(folder), other), frame(load_run(made), other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["cut", "flipped", "a column too few"])
def test_a_damaged_part_is_not_compared_with(folder, kind, damage):
    DAMAGE[damage](folder / f"{kind}.parquet" / PART)
    with pytest.raises(RunFolderError, match=rf"cannot be compared: .*{kind}\.parquet/{PART} is damaged") as caught:
        verify(folder, rounds=1, placement={"mode": "serial"})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_damage_gives_other_rows(made, tmp_path_factory, kind, data):
    """A byte of a part may be any other, and a part may end anywhere: its rows are right, or it is left out."""
    folder = tmp_path_factory.mktemp("copy") / "mnist"
    shutil.copytree(made / f"{kind}.parquet", folder / f"{kind}.parquet")
    part = folder / f"{kind}.parquet" / PART
    whole, bytes_ = read(folder, kind)[0], bytearray(part.read_bytes())
    place = data.draw(st.integers(0, len(bytes_) - 1))
    if data.draw(st.booleans()):
        del bytes_[place:]
    else:
        bytes_[place] ^= data.draw(st.integers(1, 255))
    part.write_bytes(bytes_)
    try:
        found, damage = read(folder, kind)
    except NewerVersionError:  # the byte was the version itself
        return
    if damage:
        assert PART in damage[0]
        assert set(found["round"].to_pylist()) == set(whole["round"].to_pylist()) - {2}
    else:
        assert found.equals(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_part_is_named(folder, kind):
    names = [f"part-00000{round}-00000{round}.parquet" for round in (1, 3)]
    for name in names:
        (folder / f"{kind}.parquet" / name).write_bytes(b"torn")
    with pytest.warns(FedsimWarning, match="is damaged") as said:
        assert set(frame(load_run(folder), kind)["round"]) - {0} == {2}
    assert [name in str(warning.message) for name, warning in zip(names, said, strict=True)] == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_fedsims_is_named_and_left_out(made, folder, kind):
    shutil.copyfile(folder / f"{kind}.parquet" / PART, folder / f"{kind}.parquet" / "copy.parquet")
    (folder / f"{kind}.parquet" / ".part-000009.123.tmp").write_bytes(b"half")
    with pytest.warns(FedsimWarning, match=rf"{kind}\.parquet/copy\.parquet is not fedsim's.*left out") as said:
        found = frame(load_run(folder), kind)
    assert len(said) == 1
    pd.testing.assert_frame_equal(found, frame(load_run(made), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing", "emptied", "a file"])
def test_a_run_without_any_part_cannot_be_read(folder, kind, damage):
    path = folder / f"{kind}.parquet"
    shutil.rmtree(path)
    if damage == "emptied":
        path.mkdir()
    elif damage == "a file":
        path.write_bytes(b"")
    said = "is not a folder" if damage == "a file" else "is missing, or has lost all of its parts"
    for reading in (lambda: frame(load_run(folder), kind), lambda: verify(folder, placement={"mode": "serial"})):
        with pytest.raises(RunFolderError, match=rf"{kind}\.parquet {said}"):
            reading()
    assert load_run(folder).weights().keys() == {"1.weight", "1.bias"}


def test_reading_a_run_that_is_whole_says_nothing(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for runs in (load_run(folder), load_runs(folder)):
            assert runs.rounds["round"].tolist() == [0, 1, 2, 3]
            assert len(runs.clients) == 9


def test_a_run_that_only_began_has_typed_columns(tmp_path):
    with Recording.of(SERIAL, results=tmp_path) as recording:
        for kind in KINDS:
            found = frame(load_run(recording.folder), kind)
            assert (len(found), list(found)) == (0, SCHEMAS[kind].names)
        list(recording)


# --- Several runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two(folder):
    """A pattern of two runs, and the folder of the one to be damaged."""
    return f"{folder.parent}/*", shutil.copytree(folder, folder.with_name("bad"))


def edit_info(folder, **changes):
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_run_among_several_is_an_error_that_names_it(two):
    pattern, bad = two
    edit_info(bad, fedsim_run=999)
    with pytest.raises(NewerVersionError, match=r"results/bad is of run version 999.*update fedsim"):
        load_runs(pattern)


@pytest.mark.parametrize(
    "damage", ["no config.toml", "cut config.toml", "unknown key", "unknown model", "run.json without data"]
)
def test_a_damaged_run_among_several_is_named_and_the_others_are_there(two, damage):
    pattern, bad = two
    if damage == "no config.toml":
        (bad / "config.toml").unlink()
    elif damage == "cut config.toml":
        (bad / "config.toml").write_text("rounds =")
    elif damage == "unknown key":
        (bad / "config.toml").write_text("of_tomorrow = 1\n")
    elif damage == "unknown model":
        edit_info(bad, config_sha256=None)
        (bad / "config.toml").write_text(CONFIG.override({"model.name": "of-tomorrow"}).to_toml())
    else:
        edit_info(bad, data=None)
    with pytest.warns(FedsimWarning, match=r"results/bad.*left out") as said:
        runs = load_runs(pattern)
    assert len(said) == 1
    assert [run.name for run in runs] == ["mnist"]
    assert len(runs.rounds) == 4
    with pytest.raises(RunFolderError, match="results/bad cannot be read"):
        load_runs(bad)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff"])
def test_a_run_json_that_cannot_be_read_among_several_is_named(two, content):
    pattern, bad = two
    (bad / "run.json").write_bytes(content)
    with pytest.warns(FedsimWarning, match=r"results/bad/run\.json is damaged.*left out") as said:
        assert [run.name for run in load_runs(pattern)] == ["mnist"]
    assert len(said) == 1
    with pytest.raises(RunFolderError, match=r"results/bad/run\.json is damaged"):
        load_runs(bad)


def test_a_run_json_of_something_else_is_no_run(two):
    pattern, bad = two
    (bad / "run.json").write_text('{"name": "sprint"}')
    assert [run.name for run in load_runs(pattern)] == ["mnist"]
    with pytest.raises(RunFolderError, match="no run among"):
        load_runs(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_without_parts_among_several_is_named_and_the_others_are_there(two, kind):
    pattern, bad = two
    runs = load_runs(pattern)  # before it loses them
    shutil.rmtree(bad / f"{kind}.parquet")
    with pytest.warns(FedsimWarning, match=rf"bad/{kind}\.parquet is missing.*left out") as said:
        found = frame(runs, kind)
    assert len(said) == 1
    pd.testing.assert_frame_equal(found, frame(load_run(bad.with_name("mnist")), kind))
    with pytest.raises(RunFolderError, match=rf"bad/{kind}\.parquet is missing"):
        frame(load_runs(bad), kind)


def test_a_run_without_rounds_costs_no_summary_of_the_others(two):
    pattern, bad = two
    shutil.rmtree(bad / "rounds.parquet")
    with pytest.warns(FedsimWarning, match=r"bad/rounds\.parquet is missing.*left out"):
        runs = load_runs(pattern)
    assert runs.summary()["run"].tolist() == ["mnist"]


def test_runs_that_are_loaded_are_taken_with_others(two):
    pattern, bad = two
    chosen = [run for run in load_runs(pattern) if run.name == "bad"]
    assert load_runs(chosen)[0] is chosen[0]
    assert [run.name for run in load_runs([*chosen, pattern])] == ["bad", "mnist"]
    with pytest.raises(RunFolderError, match="nowhere is not there"):
        load_runs([*chosen, bad.with_name("nowhere")])


def test_a_run_is_called_after_its_folder_wherever_one_stands(two, monkeypatch):
    monkeypatch.chdir(two[1])
    assert [load_run(path).name for path in (".", "../bad", "../mnist/../bad/", "rounds.parquet/..")] == ["bad"] * 4
    odd = two[1].rename(two[1].with_name(b"b\xffd".decode(errors="surrogateescape")))
    assert load_run(odd).name == "b\ufffdd"
    assert load_runs(two[0]).summary()["run"].tolist() == ["b\ufffdd", "mnist"]


def test_a_loaded_run_that_has_become_another_is_whole(tmp_path):
    longer = fedsim.run(SERIAL, results=tmp_path, name="a")
    fedsim.run(SERIAL.override({"rounds": 1}), results=tmp_path, name="a", overwrite=True)
    assert longer.rounds["round"].tolist() == [0, 1]


def test_some_of_several_runs_are_runs(two):
    runs = load_runs(two[0])
    assert (runs[-1].name, runs[:1].rounds["run"].unique().tolist()) == ("mnist", ["bad"])


def test_runs_in_memory_of_one_name_are_told_apart():
    runs = Runs(fedsim.run(SERIAL.override({"seed": seed}), results=None) for seed in range(3))
    assert runs.rounds["run"].unique().tolist() == ["mnist", "mnist (2)", "mnist (3)"]
    assert runs.summary()["seed"].tolist() == [0, 1, 2]


def test_a_damaged_part_of_one_of_several_runs_costs_its_rows_only(two):
    pattern, bad = two
    (bad / "rounds.parquet" / PART).write_bytes(b"torn")
    with pytest.warns(FedsimWarning, match=rf"bad/rounds\.parquet/{PART} is damaged"):
        assert load_runs(pattern).rounds["round"].tolist() == [0, 1, 3, 0, 1, 2, 3]
