import hashlib
import json
import pickle
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor

from fedsim import checkpoint, files
from fedsim.errors import RunFolderError

TENSORS = {  # values that text would lose, a shape without dimensions, and every kind of buffer
    "layer.weight": torch.tensor([[0.1, -0.0, 1e-40], [float("inf"), -1e38, 1 / 3]]),
    "layer.bias": torch.zeros(0),
    "double": torch.tensor([0.1, 1 / 3], dtype=torch.float64),
    "norm.num_batches_tracked": torch.tensor(2**62),
    "mask": torch.tensor([True, False]),
    "seen": torch.tensor([-1, 7], dtype=torch.int32),
}
STATE = {"velocity": torch.tensor([1e-300, 0.1], dtype=torch.float64), "count": torch.tensor(3)}


def save(folder: Path, round: int = 12, state: dict[str, Tensor] = STATE) -> None:
    """Weights that tell their round."""
    checkpoint.save(folder, round, {**TENSORS, "round": torch.tensor(round)}, state, f"{round:064x}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: (t.dtype, tuple(t.shape), t.numpy().tobytes()) for name, t in tensors.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoint"


# ---------------------------------------------------------------- save and load


@pytest.mark.parametrize("state", [STATE, {}], ids=["with state", "without"])
def test_what_is_loaded_is_what_was_saved_to_the_bit(folder, state):
    save(folder, 12, state)
    tensors, loaded_state = checkpoint.load(folder, 12)
    assert bits(tensors) == bits({**TENSORS, "round": torch.tensor(12)})
    assert bits(loaded_state) == bits(state)


def test_names_come_back_in_their_order(folder):
    state = {"z": torch.ones(2), "a": torch.ones(3, dtype=torch.float64), "m": torch.ones(1)}
    save(folder, 12, state)
    tensors, loaded_state = checkpoint.load(folder, 12)
    assert list(tensors) == [*TENSORS, "round"]
    assert list(loaded_state) == ["z", "a", "m"]


def test_a_checkpoint_of_the_first_version_has_no_order_and_can_be_read(folder):
    save(folder)
    path = folder / "000012.json"
    manifest = json.loads(path.read_text())
    del manifest["names"]
    path.write_text(json.dumps(manifest | {"fedsim_checkpoint": 1}))
    tensors, state = checkpoint.load(folder, 12)
    assert bits(tensors) == bits({**TENSORS, "round": torch.tensor(12)})
    assert bits(state) == bits(STATE)


@pytest.mark.parametrize("names", [None, {}, 3, ["count", 7], ["count", "velocity", "more"], ["count"]], ids=repr)
def test_a_manifest_with_other_names_is_refused(folder, names):
    save(folder)
    path = folder / "000012.json"
    manifest = json.loads(path.read_text())
    manifest["names"]["000012.server.safetensors"] = names
    path.write_text(json.dumps(manifest))
    refused(folder, "000012.")


def test_a_file_that_safetensors_cannot_read_is_named(folder):
    """Its checksum is right: it was written like that."""
    save(folder, 12, {"__metadata__": torch.ones(2)})
    refused(folder, "000012.server.safetensors")


def test_the_files_of_a_checkpoint(folder):
    save(folder, 12)
    assert names(folder) == ["000012.json", "000012.safetensors", "000012.server.safetensors"]
    save(folder, 13, {})
    assert names(folder)[3:] == ["000013.json", "000013.safetensors"]
    manifest = json.loads((folder / "000012.json").read_text())
    assert manifest["round"] == 12
    assert manifest["weights_sha256"] == f"{12:064x}"
    assert manifest["files"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names(folder)[1:3]
    }


def test_there_is_no_pickle_and_anyone_can_read_the_weights(folder):
    save(folder)
    with safetensors.safe_open(folder / "000012.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {*TENSORS, "round"}
        assert file.get_tensor("layer.weight").tobytes() == TENSORS["layer.weight"].numpy().tobytes()
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError)):
            pickle.loads(path.read_bytes())  # noqa: S301 - our own


def test_the_tensors_saved_are_not_changed(folder):
    before = bits(TENSORS), bits(STATE)
    save(folder)
    checkpoint.load(folder, 12)[0]["layer.weight"].zero_()
    assert (bits(TENSORS), bits(STATE)) == before
    assert bits(checkpoint.load(folder, 12)[0])["layer.weight"] == before[0]["layer.weight"]


def test_saving_a_round_again_replaces_it(folder):
    save(folder, 12, {})
    checkpoint.save(folder, 12, {"other": torch.ones(1)}, {}, "0" * 64)
    assert checkpoint.rounds(folder) == [12]
    assert checkpoint.load(folder, 12)[0].keys() == {"other"}


def test_rounds_are_ascending_numbers(folder):
    for round in (100, 9, 0, 1_234_567):
        save(folder, round, {})
    assert checkpoint.rounds(folder) == [0, 9, 100, 1_234_567]
    assert [checkpoint.load(folder, round)[0]["round"].item() for round in (0, 9, 100, 1_234_567)] == [
        0,
        9,
        100,
        1_234_567,
    ]
    assert checkpoint.rounds(folder / "absent") == []


def test_other_files_are_no_checkpoints(folder):
    save(folder, 3)
    for name in ("notes.json", ".000004.json.99.tmp", "5x.json", "000006.safetensors"):
        (folder / name).write_text("{}")
    assert checkpoint.rounds(folder) == [3]


# ---------------------------------------------------------------- prune


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (3, [3, 20, 30]), (99, [1, 3, 20, 30])])
def test_prune_keeps_the_newest(folder, keep, left):
    for round in (20, 1, 30, 3):
        save(folder, round)
    checkpoint.prune(folder, keep)
    assert checkpoint.rounds(folder) == left
    assert len(names(folder)) == 3 * len(left), "nothing is left of the others"
    for round in left:
        assert checkpoint.load(folder, round)[0]["round"].item() == round


def test_prune_can_keep_all(folder):
    for round in range(5):
        save(folder, round)
    checkpoint.prune(folder, "all")
    assert checkpoint.rounds(folder) == [0, 1, 2, 3, 4]
    assert len(names(folder)) == 15


def test_prune_goes_on_after_it_was_interrupted(folder, monkeypatch):
    """The manifest goes first, so that no checkpoint without its weights is left."""
    for round in (1, 2):
        save(folder, round)
    unlink, removed = Path.unlink, []

    def once(path: Path, missing_ok: bool = False) -> None:
        if removed:
            raise KeyboardInterrupt
        removed.append(path.name)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", once)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.prune(folder, 1)
    assert removed == ["000001.json"]
    assert checkpoint.rounds(folder) == [2]
    assert checkpoint.load(folder, 2)[0]["round"].item() == 2


# ---------------------------------------------------------------- damage

DATA_FILES = ["000012.safetensors", "000012.server.safetensors"]


def refused(folder: Path, name: str) -> str:
    with pytest.raises(RunFolderError) as caught:
        checkpoint.load(folder, 12)
    message = str(caught.value)
    assert name in message
    assert len(message.splitlines()) <= 2
    return message


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize("where", [0, 8, 0.5, -1], ids=["first byte", "header", "middle", "last byte"])
def test_a_flipped_bit_is_refused(folder, name, where):
    save(folder)
    content = bytearray((folder / name).read_bytes())
    content[int(where * len(content)) if isinstance(where, float) else where] ^= 1
    (folder / name).write_bytes(content)
    assert "is damaged" in refused(folder, str(folder / name))


@pytest.mark.parametrize("name", DATA_FILES)
@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: b"", lambda c: c + b"\0"], ids=["cut", "empty", "longer"]
)
def test_another_length_is_refused(folder, name, change):
    save(folder)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    assert "is damaged" in refused(folder, str(folder / name))


@pytest.mark.parametrize("name", [*DATA_FILES, "000012.json"])
def test_a_missing_file_is_refused(folder, name):
    save(folder)
    (folder / name).unlink()
    assert "cannot be read" in refused(folder, name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"files": 3}', b"\xff\xfe", b"3"], ids=repr)
def test_a_manifest_that_is_none_is_refused(folder, content):
    save(folder)
    (folder / "000012.json").write_bytes(content)
    refused(folder, "000012.json")


def test_a_truncated_manifest_is_refused(folder):
    save(folder)
    path = folder / "000012.json"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(folder, "000012.json")


@pytest.mark.long
def test_a_flipped_bit_in_the_manifest_never_gives_other_weights(folder):
    save(folder)
    path, expected = folder / "000012.json", (bits(checkpoint.load(folder, 12)[0]), bits(STATE))
    whole = path.read_bytes()
    num_refused = 0
    for at in range(len(whole)):
        for bit in (1, 8, 32):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                tensors, state = checkpoint.load(folder, 12)
            except RunFolderError:
                num_refused += 1
            else:
                assert (bits(tensors), bits(state)) == expected
    assert num_refused > len(whole), "checksums, names and the grammar are most of it"


def test_a_manifest_cannot_point_outside_its_folder(folder):
    save(folder)
    secret = folder.parent / "secret.safetensors"
    secret.write_bytes((folder / "000012.safetensors").read_bytes())
    manifest = json.loads((folder / "000012.json").read_text())
    manifest["files"] = {"../secret.safetensors": hashlib.sha256(secret.read_bytes()).hexdigest()}
    (folder / "000012.json").write_text(json.dumps(manifest))
    refused(folder, "secret.safetensors")


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("published", [0, 1, 2], ids=["before", "after the weights", "after the state"])
def test_an_interrupted_save_leaves_the_checkpoint_before_it(folder, monkeypatch, published):
    save(folder, 11)
    left = iter(range(published))

    def interrupted(path: Path, content: bytes, *, durable: bool) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        files.publish(path, content, durable=durable)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 12)
    assert checkpoint.rounds(folder) == [11]
    assert checkpoint.load(folder, 11)[0]["round"].item() == 11
    refused(folder, "000012.json")

    save(folder, 12)
    assert checkpoint.rounds(folder) == [11, 12]
    assert len(names(folder)) == 6
    assert checkpoint.load(folder, 12)[0]["round"].item() == 12


@pytest.mark.parametrize("name", [*DATA_FILES, "000012.json"])
def test_a_file_that_cannot_be_finished_leaves_nothing_half(folder, monkeypatch, name):
    """As on a full disk: the content ends in the middle, under a hidden name that goes away."""
    save(folder, 11)
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name.startswith(f".{name}."):
            write_bytes(path, content[: len(content) // 2])
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            save(folder, 12)
    assert not [left for left in names(folder) if left.startswith(".") or left == name]
    assert checkpoint.rounds(folder) == [11]
    assert checkpoint.load(folder, 11)[0]["round"].item() == 11


def test_a_reader_never_sees_half_a_file(folder, monkeypatch):
    """At each rename the file is complete under its hidden name."""
    save(folder, 12, {})
    replace, seen = Path.replace, []

    def look(path: Path, target: Path) -> Path:
        seen.append((path.name.startswith("."), path.parent == target.parent, checkpoint.rounds(folder)))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", look)
    save(folder, 13)
    assert seen == [(True, True, [12])] * 3, "the manifest comes last"
    assert names(folder) == [
        "000012.json",
        "000012.safetensors",
        "000013.json",
        "000013.safetensors",
        "000013.server.safetensors",
    ]


def test_a_state_with_one_tensor_under_two_names(tmp_path):
    same = torch.ones(3)
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, {"velocity": same, "previous": same}, "0" * 64)
    assert checkpoint.load(tmp_path, 1)[1]["previous"].tolist() == [1, 1, 1]


def test_a_state_that_is_not_contiguous(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, {"history": torch.ones(3, 2).T}, "0" * 64)
    assert checkpoint.load(tmp_path, 1)[1]["history"].shape == (2, 3)


def test_what_an_interrupted_save_left_is_pruned(tmp_path):
    (tmp_path / "000005.safetensors").write_bytes(b"left by a crash")
    for round in (6, 7):
        checkpoint.save(tmp_path, round, {"w": torch.ones(2)}, {}, "0" * 64)
    checkpoint.prune(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000007.json", "000007.safetensors"]


@pytest.mark.parametrize("manifest_files", [{}, ["000001.safetensors"]], ids=["none", "list"])
def test_a_manifest_without_the_weights_is_refused(tmp_path, manifest_files):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, {}, "0" * 64)
    path = tmp_path / "000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": manifest_files}))
    with pytest.raises(RunFolderError):
        checkpoint.load(tmp_path, 1)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, {}, "0" * 64)
    path = tmp_path / "000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fedsim_checkpoint": 99}))
    with pytest.raises(RunFolderError):
        checkpoint.load(tmp_path, 1)
