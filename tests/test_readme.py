"""The README says what is so: its tables, links, commands and Python are checked against the code."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import fedsim
from fedsim import cli, partition
from fedsim.config import keys
from fedsim.config.tables import arguments
from fedsim.metrics import CLIENT_COLUMNS, ROUND_COLUMNS
from fedsim.partition import PARTITIONERS
from fedsim.resolution import resolve
from fedsim.strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def columns(table):
    rows = ["| column | unit | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{c.name}`{chr(92) + '*' if c.is_observation else ''} | {c.unit} | {c.description} |" for c in table]
    return "\n".join(rows)


def configuration():
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{key.name}` | `{json.dumps(key.default)}` | {key.description} |" for key in keys()]
    return "\n".join(rows)


@pytest.mark.parametrize(
    "table", [columns(ROUND_COLUMNS), columns(CLIENT_COLUMNS), configuration()], ids=["rounds", "clients", "config"]
)
def test_tables_are_those_of_the_code(table):
    assert table in README, f"the README's table should be:\n{table}"


def test_every_tables_argument_is_named_with_its_default():
    for table in (PARTITIONERS, STRATEGIES):
        for name, function in table.items():
            for argument, default in arguments(function, {}, name).items():
                assert f"`{argument}` ({default})" in README, f"{name} takes {argument} = {default}"


def test_linked_files_exist():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tour_names_every_module():
    helpers = {"__init__", "__main__", "environment", "files", "py"}
    modules = {
        path.stem for path in (ROOT / "fedsim").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    missing = [name for name in modules - helpers if f"(fedsim/{name}" not in README]
    assert missing == []


def commands():
    for language, block in BLOCKS:
        if language == "sh":
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["fedsim"]:
                    yield pytest.param(words[1:], id=" ".join(words))


@pytest.mark.long
@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_understood(words, tmp_path, monkeypatch, capsys):
    """Each command is parsed, and its configuration resolved; what it runs has its own tests."""
    seen = []

    def stop(config, **options):
        seen.append(resolve(config))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    small = fedsim.preset("mnist").override({"data.dataset": "synthetic", "placement.mode": "serial"})
    if words[0] in ("report", "compare"):
        for path in itertools.takewhile(lambda word: not word.startswith("--"), words[1:]):
            fedsim.run(small, results=Path("results", path).parent, name=Path(path).name)
    if words[0] in ("verify", "replay", "resume"):
        path = fedsim.run(small).path
        interrupted = json.loads((path / "run.json").read_text()) | {"status": "interrupted"}
        (path / "run.json").write_text(json.dumps(interrupted))
        monkeypatch.setattr("fedsim.rerun.prepare", stop)
    (tmp_path / "my.toml").write_text(fedsim.preset("mnist").to_toml())
    monkeypatch.setattr("fedsim.launch.early_ray", stop)
    monkeypatch.setattr("fedsim.datasets.fetch", lambda name: seen.append(name))
    monkeypatch.setattr("fedsim.sweeps.prepare", stop)  # before its source: it would be imported with that
    monkeypatch.setattr("fedsim.experiment.prepare", stop)
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    starts = ("run", "plan", "verify", "replay", "resume", "sweep")
    assert ended.value.code == (130 if words[0] in starts else 0), capsys.readouterr().err
    assert seen or words[0] not in (*starts, "data")


@pytest.mark.long
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"data.dataset": "synthetic", "placement.mode": "serial", "clients.count": 20}
    fedsim.run(fedsim.preset("mnist").override(small))
    monkeypatch.setattr(fedsim, "preset", lambda name: fedsim.Config().override(small), raising=False)
    override = fedsim.Config.override  # the blocks ask for Ray and more; the same blocks must run here in a second
    monkeypatch.setattr(
        fedsim.Config, "override", lambda self, changes: override(self, {**changes, "placement.mode": "serial"})
    )
    names = {}
    blocks = [block for language, block in BLOCKS if language == "python"]
    assert len(blocks) == 8
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("accuracy.png", "report.html"))
    plt.close("all")
    assert names["run"].name == "mnist"
    assert names["run"].rounds["test_accuracy"].notna().all()

    monkeypatch.setitem(PARTITIONERS, "by_label", names["by_label"])
    labels = np.arange(1000) % 10
    shards = partition.PARTITIONERS["by_label"](labels, 5, np.random.default_rng(0), noise=0.1)
    assert np.sort(np.concatenate(shards)).tolist() == list(range(1000))
    assert arguments(names["by_label"], {}, "data.partition") == {"noise": 0.0}


@pytest.mark.slow
@pytest.mark.ray
def test_the_recipe_for_ray_tune_runs(tmp_path):
    """In a process of its own, as it starts a Ray of its own; small."""
    (block,) = [block for language, block in BLOCKS if language == "py" and "tune.Tuner" in block]
    small = """import fedsim
override = fedsim.Config.override
few = {"data.dataset": "synthetic", "rounds": 2, "clients.count": 10, "clients.per_round": 2}
fedsim.Config.override = lambda self, changes: override(self, {**changes, **few})
"""
    assert 'fedsim.preset("2nn-iid")' in block
    block = block.replace("def trial(values):\n", "def trial(values):\n" + textwrap.indent(small, "    "))
    (tmp_path / "recipe.py").write_text(block.replace("num_samples=20", "num_samples=2"))
    environment = {**os.environ, "HOME": str(tmp_path)}  # Tune keeps its trials there
    done = subprocess.run(
        [sys.executable, "recipe.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("{'lr': ")
