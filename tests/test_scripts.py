"""scripts/quickstart, scripts/test and .ci/run on a made-up machine, whose Pythons and uv are fakes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = [
    "awk",
    "bash",
    "cat",
    "cksum",
    "df",
    "dirname",
    "env",
    "find",
    "head",
    "readlink",
    "rm",
    "sed",
    "tail",
    "touch",
    "uname",
]

# What every fake runs. Asked with -c, it answers like a Python of the given version; everything else it writes down.
FAKE = """
import json, os, pathlib, shlex, stat, sys
calls, wrapper, version, *arguments = sys.argv[1:]
if arguments[:1] == ["-c"]:
    if version == "broken":
        sys.exit("no such version is installed")
    if version.endswith("-without-venv"):
        sys.modules["ensurepip"] = None
    sys.version_info = (*map(int, version.split("-")[0].split(".")), "final", 0)
    sys.argv = ["-c", *arguments[2:]]
    exec(arguments[1])
    sys.exit()
name = pathlib.Path(wrapper).name
leaked = [key for key in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET") if key in os.environ]
call = {"name": name, "arguments": arguments, "folder": os.getcwd(), "leaked": leaked}
with open(calls, "a") as file:
    file.write(json.dumps(call) + "\\n")
if "venv" in arguments[:2]:
    created = pathlib.Path(arguments[-1])
    (created / "bin").mkdir(parents=True)
    (created / "pyvenv.cfg").touch()
    if name == "uv":  # like the Python it was asked for
        version = pathlib.Path(arguments[arguments.index("--python") + 1]).read_text().split()[-2]
    for command in ("python", "fedsim"):
        path = created / "bin" / command
        path.write_text(f'''#!/bin/sh
exec {shlex.join(sys.orig_argv[:sys.orig_argv.index(calls)])} {calls} "$0" {version} "$@"
''')
        path.chmod(0o755)
if os.environ.get("FAIL", "nothing") in arguments:
    print("the disk is full")
    sys.exit(int(os.environ.get("FAIL_CODE", "1")))
"""


class Machine:
    """A clone of the repository in a folder with a space, and a PATH with nothing but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "some where" / "fedsim"
        self.elsewhere = folder / "else where"
        self.bin = folder / "bin"
        self.venv = self.root / ".venv"
        self._calls = folder / "calls"
        self._fake = folder / "fake.py"
        for made in (self.root, self.elsewhere, self.bin):
            made.mkdir(parents=True)
        for part in ("scripts", ".ci"):
            shutil.copytree(REPOSITORY / part, self.root / part)
        shutil.copy(REPOSITORY / "pyproject.toml", self.root)
        self._fake.write_text(FAKE)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"{tool} is not on the PATH"))

    def add(self, name: str, version: str = "none") -> Path:
        """Put a fake on the PATH."""
        path = self.bin / name
        command = [sys.executable, "-I", "-S", str(self._fake), str(self._calls)]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$0" {version} "$@"\n')
        path.chmod(0o755)
        return path

    def run(self, script: str | Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script from another folder, with no stdin; what it printed is in `stdout`."""
        return subprocess.run(
            [self.root / script, *arguments],
            cwd=self.elsewhere,
            env={"PATH": str(self.bin), "HOME": str(self.elsewhere), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def calls(self) -> list[dict[str, Any]]:
        """The calls since the last time this was asked."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def installed(self) -> list[str]:
        """What the calls since the last time installed."""
        return [call["arguments"][-1] for call in self.calls() if "install" in call["arguments"]]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_suitable_python_it_names_what_it_found(machine: Machine) -> None:
    machine.add("python3", "3.10.13")
    machine.add("python", "2.7.18")
    machine.add("python3.12", "broken")
    machine.add("python3.13", "3.13.1-without-venv")
    done = machine.run("scripts/quickstart")
    assert done.returncode == 2
    assert f"{machine.bin}/python3: Python 3.10.13, not 3.11 to 3.14" in done.stdout
    assert f"{machine.bin}/python: Python 2.7.18, not 3.11 to 3.14" in done.stdout
    assert f"{machine.bin}/python3.12: does not run" in done.stdout
    assert "sudo apt install python3.13-venv" in done.stdout
    assert "no such version is installed" not in done.stdout
    assert not machine.venv.exists()
    assert machine.calls() == []


def test_without_any_python(machine: Machine) -> None:
    done = machine.run("scripts/test")
    assert done.returncode == 2
    assert "no Python" in done.stdout


def test_pythons_are_those_of_the_package() -> None:
    required = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    assert required == ">=3.11,<3.15"
    script = (REPOSITORY / "scripts" / "_environment.sh").read_text()
    assert "(3, 11) <= tuple(sys.version_info[:2]) <= (3, 14)" in script
    assert f"'{required}'" in script


def test_the_python_with_the_best_chance_of_wheels_is_taken(machine: Machine) -> None:
    machine.add("python3", "3.14.0")
    machine.add("python3.13", "broken")
    machine.add("python3.12", "3.12.4")
    done = machine.run("scripts/quickstart")
    assert done.returncode == 0
    assert f"Python 3.12.4 ({machine.bin}/python3.12)" in done.stdout
    assert "GB" in done.stdout
    create, install, run = machine.calls()
    assert create["arguments"] == ["-m", "venv", str(machine.venv)]
    assert install["arguments"][:3] == ["-m", "pip", "install"]
    assert install["arguments"][-2:] == ["--editable", "."]
    assert (run["name"], run["arguments"]) == ("fedsim", ["run"])


def test_the_named_python_is_taken(machine: Machine, tmp_path: Path) -> None:
    machine.add("python3.13", "3.13.1")
    machine.add("my-python", "3.11.2")
    assert "Python 3.11.2" in machine.run("scripts/quickstart", FEDSIM_PYTHON="my-python").stdout
    machine.calls()
    assert machine.run("scripts/quickstart").returncode == 0
    assert machine.installed() == [], "without the variable, the environment stays as it is"
    done = machine.run("scripts/quickstart", FEDSIM_PYTHON="../bin/python3.13")
    assert "made anew, its Python is 3.11.2, FEDSIM_PYTHON asks for another" in done.stdout
    assert machine.installed() == ["."]

    machine.add("old-python", "3.9.1")
    done = machine.run("scripts/quickstart", FEDSIM_PYTHON="old-python")
    assert done.returncode == 2
    assert "Python 3.9.1, not 3.11 to 3.14" in done.stdout
    done = machine.run("scripts/quickstart", FEDSIM_PYTHON="nowhere/python")
    assert done.returncode == 2
    assert "nowhere/python cannot be used: does not run" in done.stdout
    assert (machine.venv / "pyvenv.cfg").exists(), "an environment goes only when there is a Python for the next"


def test_uv_is_used_where_there_is_one(machine: Machine) -> None:
    python = machine.add("python3.12", "3.12.4-without-venv")
    machine.add("uv")
    done = machine.run("scripts/quickstart", FEDSIM_PIP_ARGS="--torch-backend  cpu")
    assert done.returncode == 0
    find, create, install, _ = machine.calls()
    assert find["arguments"][:2] == ["python", "find"]
    assert create["arguments"] == ["venv", "--seed", "--python", str(python), str(machine.venv)]
    into = ["pip", "install", "--python", f"{machine.venv}/bin/python"]
    assert install["arguments"] == [*into, "--torch-backend", "cpu", "--editable", "."]
    machine.run("scripts/test", FEDSIM_INSTALLER="pip")
    assert machine.calls()[1]["arguments"][:3] == ["-m", "pip", "install"]


@pytest.mark.long
def test_the_installer_runs_only_when_something_has_changed(machine: Machine) -> None:
    machine.add("python3", "3.13.1")
    machine.run("scripts/quickstart")
    assert machine.installed() == ["."]
    done = machine.run("scripts/quickstart")
    assert done.stdout == ""
    assert machine.installed() == []
    assert "adding the test extra" in machine.run("scripts/test").stdout
    assert machine.installed() == [".[test]"]
    machine.run("scripts/test")
    machine.run("scripts/quickstart")
    assert machine.installed() == []

    with (machine.root / "pyproject.toml").open("a") as file:
        file.write("\n")
    done = machine.run("scripts/quickstart")
    assert "pyproject.toml has changed" in done.stdout
    assert "GB" not in done.stdout
    assert machine.installed() == [".[test]"], "a quickstart keeps what the tests need"

    machine.run("scripts/quickstart", FEDSIM_PIP_ARGS="--pre")
    assert machine.installed() == [".[test]"]
    machine.run("scripts/quickstart", FEDSIM_PIP_ARGS="--pre")
    machine.run("scripts/quickstart")
    assert machine.installed() == []


def test_a_moved_clone_is_installed_again(machine: Machine) -> None:
    machine.add("python3", "3.13.1")
    machine.run("scripts/quickstart")
    machine.calls()
    machine.root = machine.root.rename(machine.root.with_name("moved"))
    done = machine.run("scripts/quickstart")
    assert "its folder was" in done.stdout
    assert machine.installed() == ["."]


def test_arguments_arrive_as_they_are_from_anywhere(machine: Machine) -> None:
    machine.add("python3", "3.13.1")
    links = [machine.elsewhere / "a link", machine.elsewhere / "a second"]
    links[0].symlink_to(Path(os.path.relpath(machine.root / "scripts" / "quickstart", machine.elsewhere)))
    links[1].symlink_to("a link")
    arguments = ["my experiment.toml", "--set", "name=a  b", "", "*"]
    assert machine.run(links[1], *arguments).returncode == 0
    run = machine.calls()[-1]
    assert run["arguments"] == ["run", *arguments]
    assert run["folder"] == str(machine.elsewhere), "paths mean what they mean to the caller"


def test_another_environment_does_not_leak_in(machine: Machine) -> None:
    machine.add("python3", "3.13.1")
    machine.run("scripts/test", PYTHONPATH="/x", PYTHONHOME="/x", VIRTUAL_ENV="/x", PIP_TARGET="/x", CDPATH="/:.")
    calls = machine.calls()
    assert calls[-1]["arguments"][:2] == ["-m", "pytest"]
    assert [call["leaked"] for call in calls] == [[]] * len(calls)


def test_a_failed_installation_says_why_and_is_begun_anew(machine: Machine) -> None:
    machine.add("python3", "3.13.1")
    done = machine.run("scripts/quickstart", FAIL="install")
    assert done.returncode == 1
    assert "the disk is full" in done.stdout
    assert "https://download.pytorch.org/whl/cpu" in done.stdout
    assert [call["name"] for call in machine.calls()] == ["python3", "python"], "nothing runs after it"

    done = machine.run("scripts/quickstart")
    assert done.returncode == 0
    assert "an earlier installation did not finish" in done.stdout
    assert [call["name"] for call in machine.calls()] == ["python3", "python", "fedsim"]


def test_what_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.add("python3", "3.13.1")
    precious = machine.venv / "bin" / "precious"
    precious.parent.mkdir(parents=True)
    precious.touch()
    done = machine.run("scripts/quickstart")
    assert done.returncode == 2
    assert "no pyvenv.cfg" in done.stdout
    assert precious.exists()
    assert machine.calls() == []
    precious.unlink()  # folders without files are what a creation cut short leaves
    assert machine.run("scripts/quickstart").returncode == 0


def test_an_environment_made_by_hand_is_kept(machine: Machine) -> None:
    python = machine.add("python3", "3.13.1")
    subprocess.run([python, "-m", "venv", machine.venv], check=True)
    own = machine.venv / "own"
    own.touch()
    assert machine.run("scripts/quickstart").returncode == 0
    assert machine.installed() == ["."]
    assert own.exists()


@pytest.mark.parametrize("version", ["broken", "3.10.1"])
def test_an_environment_that_cannot_serve_is_made_anew(machine: Machine, version: str) -> None:
    machine.add("python3", "3.13.1")
    machine.run("scripts/quickstart")
    machine.calls()
    shutil.copy(machine.add("worn", version), machine.venv / "bin" / "python")
    done = machine.run("scripts/quickstart")
    assert done.returncode == 0
    assert "made anew, its Python" in done.stdout
    assert [call["name"] for call in machine.calls()] == ["python3", "python", "fedsim"]


def test_the_checks_run_in_order_and_pytest_comes_last(machine: Machine) -> None:
    machine.add("python3", "3.13.1")
    done = machine.run(".ci/run", "-k", "one or two", CI="true")
    assert done.returncode == 0
    checks = machine.calls()[2:]
    assert [call["arguments"] for call in checks] == [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        ["-m", "pytest", "-m", "not slow", "-k", "one or two"],
    ]
    assert {call["folder"] for call in checks} == {str(machine.root)}
    machine.run("scripts/test", "--all", "-x")
    assert machine.calls()[-1]["arguments"] == ["-m", "pytest", "-m", "", "-x"]
    machine.run("scripts/test", "-x", "--quick")
    assert machine.calls()[-1]["arguments"] == ["-m", "pytest", "-m", "not slow and not ray and not long", "-x"]


def test_the_quick_part_starts_no_ray_and_nothing_long(machine: Machine) -> None:
    machine.add("python3", "3.13.1")
    assert machine.run("scripts/test", "--quick").returncode == 0
    before, last = (call["arguments"] for call in machine.calls()[-2:])
    assert before == ["-m", "mypy"]
    assert last[:4] == ["-m", "pytest", "-n", "auto"]
    assert last[-2:] == ["-m", "not slow and not ray and not long"]


@pytest.mark.parametrize(("asked", "second"), [((), "ray and not slow"), (("--all",), "slow or ray")])
def test_the_whole_suite_runs_what_starts_no_ray_side_by_side(
    machine: Machine, asked: tuple[str, ...], second: str
) -> None:
    machine.add("python3", "3.13.1")
    assert machine.run("scripts/test", *asked).returncode == 0
    one, other = (call["arguments"] for call in machine.calls()[-2:])
    assert one[:4] == ["-m", "pytest", "-n", "auto"]
    assert one[-2:] == ["-m", "not slow and not ray"]
    assert other == ["-m", "pytest", "-m", second]


@pytest.mark.parametrize(("check", "code"), [("check", 1), ("--check", 1), ("mypy", 2), ("pytest", 5)])
def test_the_first_check_that_fails_ends_it(machine: Machine, check: str, code: int) -> None:
    machine.add("python3", "3.13.1")
    machine.run("scripts/quickstart")
    done = machine.run("scripts/test", FAIL=check, FAIL_CODE=str(code))
    assert done.returncode == code
    assert check in machine.calls()[-1]["arguments"]
