"""Weights and server state on disk: safetensors and JSON, never pickle.

checkpoint/000012.safetensors          the model's tensors under its own names
checkpoint/000012.server.safetensors   the strategy's state, where it has one
checkpoint/000012.json                 written last: a checkpoint exists when this file does
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from fedsim.errors import RunFolderError
from fedsim.files import publish
from fedsim.server_state import copied

VERSION = 2
"""1 has no names in its manifests."""


def save(folder: Path, round: int, tensors: dict[str, Tensor], state: dict[str, Tensor], weights_sha256: str) -> None:
    """Writes a checkpoint so that it is either complete or absent.

    Args:
        folder: the run's checkpoint folder; made if missing.
        round: the round after which these are the weights.
        tensors: the model's tensors by name.
        state: the strategy's state.
        weights_sha256: as in the round's record.
    """
    folder.mkdir(exist_ok=True)
    held = {f"{round:06d}.safetensors": tensors}
    if state:  # copied: safetensors takes no tensors that share memory or are not contiguous
        held[f"{round:06d}.server.safetensors"] = copied(state)
    files = {name: safetensors.torch.save(held[name], {"format": "pt"}) for name in held}
    for name, content in files.items():
        publish(folder / name, content, durable=True)
    manifest = {
        "fedsim_checkpoint": VERSION,
        "round": round,
        "weights_sha256": weights_sha256,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "names": {name: list(held[name]) for name in held},  # in their order, which safetensors does not keep
    }
    publish(folder / f"{round:06d}.json", json.dumps(manifest, indent=2).encode(), durable=True)


def rounds(folder: Path) -> list[int]:
    """The rounds that have a checkpoint, ascending."""
    return sorted(int(path.stem) for path in folder.glob("[0-9]*.json") if path.stem.isdigit())


def prune(folder: Path, keep: int | Literal["all"]) -> None:
    """Removes all but the newest checkpoints: each one's manifest first, so that none is left half."""
    if keep == "all":
        return
    kept = {f"{round:06d}" for round in rounds(folder)[-keep:]}
    _remove(path for path in folder.glob("[0-9]*") if path.name.partition(".")[0] not in kept)


def remove_after(folder: Path, round: int) -> None:
    """Removes the checkpoints of later rounds."""
    numbers = {path: path.name.partition(".")[0] for path in folder.glob("[0-9]*")}
    _remove(path for path, number in numbers.items() if number.isdigit() and int(number) > round)


def _remove(paths: Iterable[Path]) -> None:
    for path in sorted(paths, key=lambda path: path.suffix != ".json"):
        path.unlink(missing_ok=True)


def load(folder: Path, round: int, weights_sha256: str | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reads the model's tensors and the strategy's state back.

    Args:
        folder: the run's checkpoint folder.
        round: one of `rounds`.
        weights_sha256: what the round's record says, to be compared with what was saved; None for no comparison.

    Raises:
        RunFolderError: a file is missing, not the one that was written, or of other weights; it is named.
    """
    manifest_path = folder / f"{round:06d}.json"
    model, server = f"{round:06d}.safetensors", f"{round:06d}.server.safetensors"
    try:
        manifest: dict[str, Any] = json.loads(manifest_path.read_text())
        version, checksums = manifest["fedsim_checkpoint"], dict(manifest["files"])
        contents = {name: (folder / Path(name).name).read_bytes() for name in checksums}
        names = {name: [*map(str, manifest["names"][name])] if version == VERSION else None for name in checksums}
        if model not in checksums:
            raise KeyError(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"the checkpoint {manifest_path} cannot be read: {type(error).__name__}: {error}"
        ) from None
    if version not in (1, VERSION):
        raise RunFolderError(f"the checkpoint {manifest_path} is of version {version}, not {VERSION}; update fedsim")
    if weights_sha256 is not None and manifest.get("weights_sha256") != weights_sha256:
        raise RunFolderError(f"the checkpoint {manifest_path} does not hold the weights of that round's row")
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != checksums[name]:
            raise RunFolderError(
                f"the checkpoint file {folder / name} is damaged: its checksum is not the recorded one"
            )
    loaded = {name: _tensors(folder / name, content, names[name]) for name, content in contents.items()}
    return loaded[model], loaded.get(server, {})


def _tensors(path: Path, content: bytes, names: list[str] | None) -> dict[str, Tensor]:
    """The tensors of a file in the order that they were saved in; in any, where none is given.

    Raises:
        RunFolderError: it has others, or is no file of tensors.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise RunFolderError(f"the checkpoint file {path} cannot be read: {error}") from None
    if names is None:
        return tensors
    if sorted(names) != sorted(tensors):
        raise RunFolderError(f"the checkpoint file {path} does not hold the tensors that its manifest names")
    return {name: tensors[name] for name in names}
