"""The house as DESIGN draws it: what imports what, how large a file is, what a process has to load."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import fedsim

PACKAGE = Path(fedsim.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# From the ground up. A module imports what stands above it in this list, also within its own layer: never below.
LAYERS = (
    ("errors", "seeding", "files", "palette"),
    ("config.messages", "config.tables", "config", "config.changes"),
    ("presets", "run_folder"),
    (
        "datasets.dataset",
        "datasets.idx",
        "datasets.wheel",
        "datasets.mnist",
        "datasets.synthetic",
        "datasets",
        "partition",
        "sampling",
        "metrics",
        "targets",
        "statistics",
        "groups",
        "summaries",
        "fairness",
        "environment",
    ),
    ("numerics", "weights", "strategies", "own", "server_state", "models", "training"),
    (
        "stacked.parameter",
        "stacked.products",
        "stacked.activations",
        "stacked.patches",
        "stacked.layers",
        "stacked.stack",
        "stacked.recorded",
        "stacked.lookahead",
        "stacked.steps",
        "stacked.engine",
        "stacked",
        "fingerprint",
    ),
    (
        "client",
        "placement.system",
        "placement.machine",
        "placement.costs",
        "placement.limits",
        "placement.shares",
        "placement.plan",
        "placement",
        "resolution",
        "grid",
        "failures",
    ),
    (
        "forkserver",
        "forkserver.launcher",
        "forkserver.rehearsal",
        "forkserver.worker",
        "forkserver.server",
        "forkserver.registered",
    ),
    (
        "checkpoint",
        "results.parts",
        "results.writer",
        "results.folder",
        "results.run",
        "results.runs",
        "results",
        "actors",
        "actors.serial",
        "actors.private",
        "actors.handshake",
        "actors.cluster",
        "actors.connection",
        "actors.bell",
        "actors.slab",
        "actors.host",
        "actors.calls",
        "actors.losses",
        "actors.crew",
        "actors.ray_pool",
    ),
    ("experiment",),
    ("launch",),
    ("simulation",),
    ("homes", "recording"),
    ("starts", "compatibility", "resumption", "comparison", "rerun", "verification", "sweeps"),
    (
        "views",
        "plot",
        "reporting.html",
        "reporting.charts",
        "reporting.shown",
        "reporting.header",
        "reporting.learning",
        "reporting.clients",
        "reporting.costs",
        "reporting.settings",
        "reporting",
    ),
    ("cli.options", "cli.terminal", "cli.verification", "cli.resume", "cli.report", "cli.sweep", "cli.compare", "cli"),
)
DOORS = ("", "__main__")  # the package's own names, looked up when first used, and `python -m fedsim`
ORDER = {name: place for place, name in enumerate(name for layer in LAYERS for name in layer)}


def module_name(path: Path) -> str:
    """The dotted name below `fedsim`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in FILES}
CLI = {name for name in MODULES if name.partition(".")[0] == "cli"}
INSIDE = [name for name in MODULES if name not in DOORS]


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The modules that statements import: `from a import b` counts as a.b where that is a module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                is_module = below.startswith("fedsim.") and below.removeprefix("fedsim.") in MODULES
                yield below if is_module else str(node.module)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever it does."""
    yield from imported(ast.walk(TREES[path]))


def own_imports(name: str) -> set[str]:
    """The modules of fedsim that one of them imports, by their names below it."""
    found = {i for i in imports(MODULES[name]) if i == "fedsim" or i.startswith("fedsim.")}
    return {i.removeprefix("fedsim").removeprefix(".") for i in found}


def foreign_imports(name: str) -> set[str]:
    return {i.partition(".")[0] for i in imports(MODULES[name])} - {"fedsim"}


def mentions(name: str, dotted: str) -> bool:
    """Whether a file has an expression such as `torch.optim`, or imports it."""
    spelled = {ast.unparse(node) for node in ast.walk(TREES[MODULES[name]]) if isinstance(node, ast.Attribute)}
    return dotted in spelled or any(f"{i}.".startswith(f"{dotted}.") for i in imports(MODULES[name]))


# ---------------------------------------------------------------- layers


def test_every_module_has_its_place():
    assert set(ORDER) == set(MODULES) - set(DOORS), "a new module gets a place in LAYERS"


def test_lower_never_imports_higher():
    pairs = [(name, other) for name in INSIDE for other in own_imports(name) - {""}]
    assert [f"{name} imports {other}" for name, other in pairs if ORDER[other] >= ORDER[name]] == []
    assert len(pairs) > 50, "they were found"


def test_the_door_is_for_users_only():
    """Of `fedsim` itself only the version is taken: all else would import everything."""
    taken = {
        alias.name
        for name in INSIDE
        for node in ast.walk(TREES[MODULES[name]])
        if isinstance(node, ast.ImportFrom) and node.module == "fedsim"
        for alias in node.names
        if alias.name not in MODULES
    }
    assert taken == {"__version__"}


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (
            "ray",
            {
                f"actors.{n}"
                for n in ("private", "handshake", "cluster", "connection", "host", "losses", "crew", "ray_pool")
            },
        ),
        ("torchvision", {name for name in MODULES if name.startswith("datasets")}),
        ("pyarrow", {name for name in MODULES if name.startswith("results")} | {"metrics"}),
        (
            "pandas",
            {name for name in MODULES if name.startswith(("results", "reporting"))}
            | {"metrics", "groups", "summaries", "views", "plot", "cli.compare"},
        ),
        ("matplotlib", {"plot"}),
        ("plotly", {"reporting.html"}),
        ("safetensors", {"checkpoint"}),
        ("pickle", {"datasets.wheel"}),  # of a file with a known SHA-256, by an unpickler that knows arrays only
        ("typer", CLI),
        ("rich", CLI),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_package_stays_behind_its_fence(package, allowed):
    importers = {name for name in MODULES if package in foreign_imports(name)}
    assert importers <= allowed
    assert importers, "a fence round empty ground is none"


@pytest.mark.parametrize("package", ["random", "marshal", "shelve", "cloudpickle", "pytest"])
def test_a_package_is_used_nowhere(package):
    assert not [name for name in MODULES if package in foreign_imports(name)]


def test_the_ground_and_the_data_need_no_torch():
    """Nor do the records: a mistake in a configuration is answered before torch is loaded."""
    with_torch = {name for name in MODULES if "torch" in foreign_imports(name)}
    ground = {name for layer in LAYERS[:4] for name in layer}
    assert not with_torch & ground
    assert {"weights", "strategies", "models", "training", "client"} <= with_torch


def test_strategies_know_neither_models_nor_clients():
    assert own_imports("strategies") <= {"weights", "errors"}


@pytest.mark.parametrize(
    "dotted",
    [
        "torch.optim",  # the first of its objects costs a process 1 to 2 s
        "torch.load",
        "torch.save",
        "torch.manual_seed",
        "np.random.default_rng",  # streams are made in seeding, of a named bit generator
    ],
)
def test_an_expression_is_used_nowhere(dotted):
    assert not [name for name in MODULES if mentions(name, dotted)]


def test_numpys_own_generator_is_only_made_to_differ():
    """Forked workers would all draw the same; nothing of fedsim draws from it."""
    assert [name for name in MODULES if mentions(name, "np.random.seed")] == ["forkserver.worker"]


def test_only_training_differentiates():
    def differentiates(name: str) -> bool:
        calls = [node for node in ast.walk(TREES[MODULES[name]]) if isinstance(node, ast.Call) and not node.args]
        has_call = any(isinstance(call.func, ast.Attribute) and call.func.attr == "backward" for call in calls)
        return has_call or mentions(name, "torch.autograd")

    assert [name for name in MODULES if differentiates(name)] == ["training"]


def test_only_seeding_makes_generators():
    makers = [name for name in MODULES if mentions(name, "np.random.PCG64")]
    assert set(makers) == {"seeding", "fingerprint"}, "in the fingerprint no seed plays a part"


# ---------------------------------------------------------------- files


def test_a_file_has_at_most_300_lines():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_what_is_public_has_a_docstring():
    def without(node: ast.AST, prefix: str) -> Iterator[str]:
        if not ast.get_docstring(node):
            yield prefix
        for child in getattr(node, "body", []) if not isinstance(node, ast.FunctionDef) else []:
            is_named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_named and not child.name.startswith("_"):
                yield from without(child, f"{prefix}.{child.name}")

    assert [name for module, path in MODULES.items() for name in without(TREES[path], f"fedsim.{module}")] == []


def test_the_loop_stays_under_40_lines():
    (loop,) = [
        node
        for node in ast.walk(TREES[MODULES["simulation"]])
        if isinstance(node, ast.FunctionDef) and node.name == "federated_averaging"
    ]
    assert loop.end_lineno - loop.lineno + 1 < 40
    verbs = ["sample", "fit", "_aggregate", "evaluate"]
    calls = [node.func for node in ast.walk(loop) if isinstance(node, ast.Call)]
    called = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    assert called >= set(verbs)


def test_the_public_names_are_there():
    for name in fedsim.__all__:
        assert getattr(fedsim, name) is not None
    assert set(fedsim.__all__) <= set(dir(fedsim))
    promised = {"run", "rounds", "verify", "replay", "load_run", "load_runs", "preset"}
    assert promised <= set(fedsim.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedsim.nothing


# ---------------------------------------------------------------- what a process loads


def loaded_by(*statements: str, of: tuple[str, ...]) -> list[set[str]]:
    """Which of some modules a fresh interpreter has loaded after each of the statements."""
    shown = f"print(*[name for name in {of!r} if name in sys.modules])"
    code = "\n".join(["import sys", *(f"{statement}\n{shown}" for statement in statements)])
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in answer.stdout.splitlines()]


@pytest.mark.long
def test_an_actor_loads_only_what_it_needs():
    """Every actor pays for its imports; a training step must not bring in torch's compiler either."""
    heavy = "torchvision", "pandas", "pyarrow", "torch._dynamo", "torch._inductor", "sympy", "typer", "rich", "psutil"
    client, step, ray_pool = loaded_by(
        "import fedsim.client, fedsim.actors.serial",
        "import torch; from fedsim.fingerprint import fingerprint; fingerprint(torch.device('cpu'))",
        "import fedsim.actors.ray_pool",
        of=("fedsim.client", "torch", "ray", *heavy),
    )
    assert client == step == {"fedsim.client", "torch"}
    assert ray_pool - {"psutil"} == {"fedsim.client", "torch", "ray"}, "psutil: ray's own, and the plan's"


@pytest.mark.parametrize("statement", ["import fedsim", "import fedsim.cli", "import fedsim; fedsim.preset('mnist')"])
def test_the_door_and_the_command_line_open_at_once(statement):
    assert loaded_by(statement, of=("fedsim", "torch", "ray", "torchvision", "pandas", "pyarrow")) == [{"fedsim"}]


@pytest.mark.long
def test_what_is_checked_before_ray_starts_needs_no_torch():
    """A wrong name is answered at once, and torch is imported while Ray starts."""
    statement = (
        "import fedsim.cli, fedsim.launch, fedsim.grid, fedsim.resolution, fedsim.run_folder, fedsim.actors.connection"
    )
    assert loaded_by(statement, of=("ray", "torch", "torchvision", "pandas", "pyarrow")) == [{"ray"}]
    assert loaded_by(statement.rpartition(",")[0], of=("ray", "torch")) == [set()]


@pytest.mark.long
def test_a_run_loads_pandas_only_for_who_reads_it():
    assert loaded_by("import fedsim.recording", of=("torch", "pandas")) == [{"torch"}]


def loaded_with(name: str) -> set[str]:
    """The modules of fedsim that importing one of them loads: its own imports outside of functions, and theirs."""
    loaded, waiting = set(), {name}
    while waiting:
        module = waiting.pop()
        loaded.add(module)
        body = [node for node in TREES[MODULES[module]].body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {i.removeprefix("fedsim.") for i in imported(body) if i.startswith("fedsim.")}
        waiting |= (found | {module.rpartition(".")[0]} - {""}) - loaded
    return loaded


def test_a_serial_run_needs_no_ray():
    serial = {i for name in loaded_with("recording") for i in foreign_imports(name)}
    assert {"torch", "pandas"} <= serial
    assert "ray" not in serial
    assert "ray" in {i for name in loaded_with("actors.ray_pool") for i in foreign_imports(name)}
