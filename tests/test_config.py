import copy
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from fedsim.config import Config, keys
from fedsim.config.tables import arguments, lookup
from fedsim.errors import ConfigError
from fedsim.presets import PRESETS, preset

# The contract's file with its defaults: the names that users, notebooks and checks are written against.
CONTRACT = """
name = "mnist"
seed = 0
rounds = 5

[data]
dataset = "mnist"
[data.partition]
name = "iid"

[model]
name = "mlp"

[clients]
count = 10
per_round = "all"
sampler = "uniform"

[training]
local_epochs = 2
batch_size = 32
lr = 0.1
momentum = 0.0
weight_decay = 0.0
engine = "auto"

[strategy]
name = "fedavg"
weighting = "examples"

[placement]
mode = "auto"
actors = "auto"
num_cpus = "auto"
num_gpus = "auto"
stack_size = "auto"
threads = 1
start = "auto"
address = "local"

[evaluation]
every = 1
clients = false

[failures]
max_retries = 3
on_exhausted = "stop"
timeout_s = 0

[checkpoint]
every_s = 10
keep = 2
"""


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted key -> value."""
    result = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


DEFAULTS = flat(tomllib.loads(CONTRACT))


def reread(config: Config) -> Config:
    return Config.from_dict(tomllib.loads(config.to_toml()))


def refused(changes: dict[str, Any], config: Config | None = None) -> str:
    """The message that a change is refused with: a line or two for a person."""
    with pytest.raises(ConfigError) as caught:
        (config or Config()).override(changes)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2
    return message


# ---------------------------------------------------------------- keys and defaults


@pytest.mark.parametrize("key", DEFAULTS)
def test_each_key_of_the_contract_exists_with_its_default(key):
    assert flat(Config().to_dict())[key] == DEFAULTS[key]


def test_the_documented_keys_are_those_of_the_contract_in_its_order():
    documented = list(keys())
    assert [key.name for key in documented] == list(DEFAULTS)
    assert {key.name: key.default for key in documented} == DEFAULTS
    assert all(key.description for key in documented)


def test_the_contracts_own_file_gives_the_default_configuration(tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text(CONTRACT)
    assert Config.from_toml(path) == Config() == Config.from_dict({})


def test_defaults_survive_toml():
    assert reread(Config()) == Config()
    assert flat(tomllib.loads(Config().to_toml())) == DEFAULTS


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Config().rounds = 7
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Config().training.lr = 7.0


# ---------------------------------------------------------------- override


def test_override_changes_the_named_keys_and_nothing_else():
    before = Config()
    after = before.override({"clients.count": 100, "training.lr": 0.5, "data.dataset": "synthetic", "rounds": 3})
    changed = {"clients.count": 100, "training.lr": 0.5, "data.dataset": "synthetic", "rounds": 3}
    assert flat(after.to_dict()) == DEFAULTS | changed
    assert before == Config()


def test_overrides_add_up_and_the_last_one_counts():
    config = Config().override({"training.lr": 0.5}).override({"training.momentum": 0.9}).override({"training.lr": 0.2})
    assert (config.training.lr, config.training.momentum) == (0.2, 0.9)


def test_keys_that_belong_together_can_be_changed_together_in_any_order():
    raised = Config().override({"clients.per_round": 50, "clients.count": 100})
    assert raised == Config().override({"clients.count": 100, "clients.per_round": 50})
    assert raised.override({"clients.count": 5, "clients.per_round": 5}).clients.per_round == 5


@pytest.mark.parametrize(
    ("section", "before", "after"),
    [
        ("strategy", {"name": "fedavgm", "server_lr": 0.5, "server_momentum": 0.3}, "fedadam"),
        ("data.partition", {"name": "dirichlet", "alpha": 0.1}, "shards"),
    ],
)
def test_another_entry_drops_the_old_ones_arguments(section, before, after):
    given_before = {f"{section}.{name}": value for name, value in before.items()}
    config = Config().override(given_before)
    assert given_before.items() <= flat(config.to_dict()).items()

    other = config.override({f"{section}.name": after})
    assert flat(other.to_dict()) == DEFAULTS | {f"{section}.name": after}
    same = config.override({f"{section}.name": before["name"]})
    assert same == config, "naming the same entry again keeps its arguments"


def test_another_entry_keeps_what_is_not_its_own_and_takes_new_arguments():
    config = Config().override({"strategy.name": "fedavgm", "strategy.server_lr": 0.5, "strategy.weighting": "uniform"})
    other = config.override({"strategy.server_lr": 0.25, "strategy.name": "fedadam"})
    assert other.strategy.weighting == "uniform"
    assert other.strategy.arguments == {"server_lr": 0.25}


def test_the_address_stays_unset_unless_it_is_given(tmp_path):
    """RAY_ADDRESS may fill in an address that nobody set, so being set and having the default's value differ."""
    unset = [Config(), Config().override({"placement.mode": "serial"}), preset("mnist"), preset("2nn-iid")]
    unset.append(preset("mnist").override({"clients.count": 3}))
    path = tmp_path / "a.toml"
    path.write_text("[placement]\nthreads = 2\n")
    unset.append(Config.from_toml(path))
    assert not [config for config in unset if "address" in config.placement.model_fields_set]

    given_ = Config().override({"placement.address": "local"})
    assert "address" in given_.placement.model_fields_set
    assert "address" in given_.override({"rounds": 1}).placement.model_fields_set


# ---------------------------------------------------------------- what is accepted


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2**63 - 1},
        {"rounds": 0},
        {"name": "A" * 100},
        {"name": "0.1_b-c"},
        {"clients.per_round": 1},
        {"clients.per_round": 10},
        {"clients.per_round": 0.0},
        {"clients.per_round": 0.999},
        {"training.batch_size": 0},
        {"training.lr": 1},  # a whole number is a number
        {"training.momentum": 0.999},
        {"placement.num_cpus": 0.0001},
        {"placement.num_cpus": 2},
        {"placement.num_gpus": 0},
        {"placement.num_gpus": 0.3},
        {"placement.num_gpus": 2.0},
        {"placement.actors": 1},
        {"placement.mode": "serial"},
        {"placement.start": "plain"},
        {"training.engine": "loop"},
        {"strategy.weighting": "uniform"},
        {"checkpoint.keep": "all"},
        {"checkpoint.keep": 1},
        {"checkpoint.every_s": 0},
        {"failures.max_retries": 0},
        {"evaluation.every": 7},
    ],
    ids=str,
)
def test_values_at_the_edge_of_what_is_allowed(changes):
    config = Config().override(changes)
    assert changes.items() <= flat(config.to_dict()).items()
    assert reread(config) == config


def test_a_whole_number_given_for_a_float_becomes_one():
    lr = Config().override({"training.lr": 1}).training.lr
    assert type(lr) is float


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.learning_rate", "training.lr"),
        ("training.batchsize", "training.batch_size"),
        ("trainin.lr", "training"),
        ("training.l", "training.lr"),
        ("lr", "training.lr"),
        ("round", "rounds"),
        ("client.count", "clients"),
        ("clients.perround", "clients.per_round"),
        ("placement.num_cpu", "placement.num_cpus"),
        ("local_epochs", "training.local_epochs"),
    ],
)
def test_an_unknown_key_names_the_closest_known_one(key, meant):
    message = refused({key: 1})
    assert f"did you mean {meant}?" in message
    first = key if key.partition(".")[0] in Config.model_fields else key.partition(".")[0]
    assert f"unknown key {first}" in message


def test_an_unknown_key_lists_its_section():
    message = refused({"evaluation.qqq": 1})
    assert "unknown key evaluation.qqq" in message
    assert "[evaluation] has every, clients" in message
    top = refused({"qqq": 1})
    assert all(name in top for name in Config.model_fields)


def test_an_unknown_key_below_a_value_or_in_an_unknown_section():
    assert "unknown key nothing" in refused({"nothing.at.all": 1})
    assert "training.lr" in refused({"training.lr.of.mine": 1})
    assert "model.depth" in refused({"model.depth": 3})


PER_ROUND = r'"all", a whole number from 1, or a fraction below 1 such as 0.1'
WRONG = [  # key, value, what the message says is allowed
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than 9223372036854775808"),
    ("seed", 0.0, "integer"),
    ("rounds", -1, "greater than or equal to 0"),
    ("rounds", 5.0, "integer"),
    ("rounds", True, "integer"),
    ("rounds", "5", "integer"),
    ("rounds", None, "integer"),
    ("rounds", [5], "integer"),
    ("rounds", 10**6, "less than or equal to 999999"),
    ("name", 7, "string"),
    *[("name", name, "letters, digits, '.', '_' and '-'") for name in ("", "a/b", "../up", "/abs", ".hidden", "-x")],
    *[("name", name, "letters, digits, '.', '_' and '-'") for name in ("a b", "a\\b", "ü", "a\n", "..", "A" * 101)],
    ("data.dataset", 3, "string"),
    ("data.partition.name", None, "string"),
    ("model.name", ["mlp"], "string"),
    ("clients.count", 0, "greater than or equal to 1"),
    ("clients.count", 10**7 + 1, "less than or equal to 10000000"),
    ("clients.count", 10.0, "integer"),
    ("clients.per_round", 0, PER_ROUND),
    ("clients.per_round", 1.0, PER_ROUND),
    ("clients.per_round", -1, PER_ROUND),
    ("clients.per_round", -0.1, PER_ROUND),
    ("clients.per_round", 3.0, PER_ROUND),
    ("clients.per_round", "some", PER_ROUND),
    ("clients.per_round", "5", PER_ROUND),
    ("clients.per_round", True, PER_ROUND),
    ("clients.per_round", math.nan, PER_ROUND),
    ("clients.per_round", None, PER_ROUND),
    ("clients.per_round", 11, "more than count = 10"),
    ("training.local_epochs", 0, "greater than or equal to 1"),
    ("training.local_epochs", 1.5, "integer"),
    ("training.batch_size", -1, "greater than or equal to 0"),
    ("training.lr", 0, "greater than 0"),
    ("training.lr", -0.1, "greater than 0"),
    ("training.lr", math.nan, "finite"),
    ("training.lr", math.inf, "finite"),
    ("training.lr", True, "number"),
    ("training.lr", "0.1", "number"),
    ("training.momentum", 1.0, "less than 1"),
    ("training.momentum", -0.1, "greater than or equal to 0"),
    ("training.weight_decay", -1e-9, "greater than or equal to 0"),
    ("training.engine", "vmap", "'auto', 'loop' or 'stacked'"),
    ("strategy.name", 1, "string"),
    ("strategy.weighting", "equal", "'examples' or 'uniform'"),
    ("placement.mode", "ray", "'auto', 'actor-per-client', 'packed' or 'serial'"),
    ("placement.actors", 0, "greater than or equal to 1"),
    ("placement.actors", "many", "'auto', or should be a valid integer"),
    ("placement.actors", 2.0, "integer"),
    ("placement.num_cpus", 0, "greater than or equal to 0.0001"),
    ("placement.num_cpus", 0.00005, "greater than or equal to 0.0001"),
    ("placement.num_cpus", 1.5, "a fraction up to 1 or a whole number"),
    ("placement.num_cpus", True, "number"),
    ("placement.num_cpus", math.nan, "finite"),
    ("placement.num_gpus", -1, "greater than or equal to 0"),
    ("placement.num_gpus", 0.00005, "0 or at least 0.0001"),
    ("placement.num_gpus", 2.5, "a fraction up to 1 or a whole number"),
    ("placement.num_gpus", "all", "'auto', or should be a valid number"),
    ("placement.stack_size", 0, "greater than or equal to 1"),
    ("placement.threads", 0, "greater than or equal to 1"),
    ("placement.threads", 1025, "less than or equal to 1024"),
    ("placement.start", "spawn", "'auto', 'fork' or 'plain'"),
    ("placement.address", "", "at least 1 character"),
    ("placement.address", None, "string"),
    ("evaluation.every", 0, "greater than or equal to 1"),
    ("evaluation.clients", "yes", "should be true or false"),
    ("failures.max_retries", -1, "greater than or equal to 0"),
    ("failures.on_exhausted", "skip", "'stop' or 'drop'"),
    ("failures.timeout_s", -1, "greater than or equal to 0"),
    ("checkpoint.every_s", -1, "greater than or equal to 0"),
    ("checkpoint.keep", 0, "greater than or equal to 1"),
    ("checkpoint.keep", "none", "'all'"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG, ids=lambda part: repr(part)[:30])
def test_a_wrong_value_is_refused_with_the_key_the_value_and_what_is_allowed(key, value, allowed):
    message = refused({key: value})
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{key} = {value!r}")
    assert allowed in message


def test_a_count_of_clients_below_the_cohort_is_refused_too():
    message = refused({"clients.count": 5}, Config().override({"clients.per_round": 10}))
    assert "clients.per_round = 10" in message
    assert "count = 5" in message


@pytest.mark.parametrize("section", ["training", "data", "data.partition", "strategy"])
@pytest.mark.parametrize("value", [3, "fedavg", None, [1]], ids=repr)
def test_a_value_in_place_of_a_section(section, value):
    assert refused({section: value}).startswith(f"{section} = {value!r}")


def test_of_many_mistakes_the_first_two_are_told():
    message = refused({"training.lr": "x", "training.momentum": "y", "rounds": "z"})
    assert message.splitlines() == [
        "rounds = 'z': should be a valid integer",
        "training.lr = 'x': should be a valid number",
    ]


# ---------------------------------------------------------------- properties

NAMES = st.text("abcdefghijklmnopqrstuvwxyz_.", max_size=12)
KNOWN = st.sampled_from([*DEFAULTS, "data", "data.partition", "strategy", "training"])
ANY_KEY = KNOWN | NAMES | st.tuples(KNOWN, NAMES).map(".".join)
ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "all", "serial", "shards", "fedadam", 0.5, 3]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)


def outcome(make: Callable[[], Config]) -> Config | str:
    """What comes out, or the message of the refusal; another exception fails the test."""
    try:
        return make()
    except ConfigError as error:
        return str(error)


def is_for_a_person(result: Config | str) -> bool:
    return isinstance(result, Config) or (result != "" and result.count("\n") <= 1)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.dictionaries(ANY_KEY, ANY_VALUE, max_size=4))
def test_whatever_is_given_only_a_config_error_comes_out(changes):
    assert is_for_a_person(outcome(lambda: Config().override(copy.deepcopy(changes))))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.dictionaries(NAMES | st.sampled_from(list(Config.model_fields)), ANY_VALUE, max_size=4))
def test_whatever_a_file_parses_to_only_a_config_error_comes_out(values):
    assert is_for_a_person(outcome(lambda: Config.from_dict(values)))


POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
FRACTION = st.floats(0, 1, exclude_max=True)
CPU_SHARES = st.just("auto") | st.floats(0.0001, 1) | st.integers(1, 64)
VALID: dict[str, st.SearchStrategy] = {
    "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True),
    "seed": st.integers(0, 2**63 - 1),
    "rounds": st.integers(0, 999_999),
    "data.dataset": st.sampled_from(["mnist", "synthetic"]),
    "model.name": st.sampled_from(["mlp", "cnn"]),
    "clients.per_round": st.just("all") | st.integers(1, 1000) | FRACTION,
    "training.local_epochs": st.integers(1, 10**9),
    "training.batch_size": st.integers(0, 10**9),
    "training.lr": POSITIVE,
    "training.momentum": FRACTION,
    "training.weight_decay": st.floats(0, allow_infinity=False),
    "strategy.weighting": st.sampled_from(["examples", "uniform"]),
    "placement.mode": st.sampled_from(["auto", "actor-per-client", "packed", "serial"]),
    "placement.actors": st.just("auto") | st.integers(1, 10**6),
    "placement.num_cpus": CPU_SHARES,
    "placement.num_gpus": CPU_SHARES | st.just(0),
    "placement.stack_size": st.just("auto") | st.integers(1, 1000),
    "placement.threads": st.integers(1, 1024),
    "placement.address": st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])),
    "evaluation.every": st.integers(1, 10**9),
    "failures.max_retries": st.integers(0, 10**9),
    "checkpoint.every_s": st.floats(0, allow_infinity=False),
    "checkpoint.keep": st.just("all") | st.integers(1, 10**9),
}
ARGUMENTS = st.sampled_from(
    [
        {},
        {"strategy.name": "fedavgm", "strategy.server_lr": 1, "strategy.server_momentum": 0.1 + 0.2},
        {"data.partition.name": "dirichlet", "data.partition.alpha": 1e-300, "data.partition.min_examples": 1},
    ]
)


@pytest.mark.long
@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.fixed_dictionaries({"clients.count": st.integers(1000, 10**7)}, optional=VALID),
    ARGUMENTS,
)
def test_a_valid_configuration_survives_toml(changes, arguments_):
    changes = changes | arguments_
    config = Config().override(changes)
    again = reread(config)
    assert again == config == config.override({})
    assert again.to_toml() == config.to_toml()
    assert repr(again.to_dict()) == repr(config.to_dict()), "types too: 1 and 1.0 are not the same"
    assert changes.items() <= flat(config.to_dict()).items()


# ---------------------------------------------------------------- from_toml


def test_a_file_without_a_name_gives_its_own(tmp_path):
    path = tmp_path / "my-study.v2.toml"
    path.write_text("rounds = 3\n")
    assert (Config.from_toml(path).name, Config.from_toml(path).rounds) == ("my-study.v2", 3)
    path.write_text('name = "other"\n')
    assert Config.from_toml(path).name == "other"


def file_refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_toml(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) <= 2
    return message


def test_a_file_that_is_not_there(tmp_path):
    assert "No such file" in file_refused(tmp_path / "absent.toml")


def test_a_folder(tmp_path):
    assert "cannot read" in file_refused(tmp_path)


def test_a_file_that_is_not_toml(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("rounds = 5\nseed == 3\n")
    message = file_refused(path)
    assert "not valid TOML" in message
    assert "line 2" in message


def test_a_key_given_twice(tmp_path):
    path = tmp_path / "twice.toml"
    path.write_text("rounds = 5\nrounds = 6\n")
    assert "not valid TOML" in file_refused(path)


def test_a_file_that_is_not_utf_8(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes('name = "caf\xe9"'.encode("latin-1"))
    assert "utf-8" in file_refused(path)


def test_a_mistake_in_a_file_is_told_with_the_file_and_the_key(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text("[training]\nlr = -1.0\nlearnrate = 2\n")
    message = file_refused(path)
    assert message.splitlines()[0] == f"{path}: training.lr = -1.0: should be greater than 0"
    assert "unknown key training.learnrate; did you mean training.lr?" in message.splitlines()[1]


# ---------------------------------------------------------------- tables of extensions


def build(
    labels: list[int],
    *,
    needed: int,
    alpha: Annotated[float, Field(gt=0)] = 0.5,
    kind: Literal["a", "b"] = "a",
    count: "int" = 1,
) -> None:
    """An entry of a table: its keyword-only parameters are its configuration."""


def nothing(labels: list[int]) -> None:
    """An entry without arguments."""


def test_arguments_are_checked_and_filled_in_by_the_functions_signature():
    assert arguments(build, {"needed": 3}, "s") == {"needed": 3, "alpha": 0.5, "kind": "a", "count": 1}
    given_ = arguments(build, {"count": 2, "alpha": 1, "needed": 3, "kind": "b"}, "s")
    assert given_ == {"needed": 3, "alpha": 1.0, "kind": "b", "count": 2}
    assert list(given_) == ["needed", "alpha", "kind", "count"], "in the signature's order"
    assert type(given_["alpha"]) is float
    assert arguments(nothing, {}, "s") == {}


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({}, r"data\.partition\.needed is missing"),
        ({"needed": "3"}, r"data\.partition\.needed = '3': should be a valid integer"),
        ({"needed": 3.0}, r"data\.partition\.needed = 3\.0: should be a valid integer"),
        ({"needed": True}, r"data\.partition\.needed = True: should be a valid integer"),
        ({"needed": 1, "alpha": 0.0}, r"data\.partition\.alpha = 0\.0: should be greater than 0"),
        ({"needed": 1, "alpha": math.nan}, r"data\.partition\.alpha = nan: should be a finite number"),
        ({"needed": 1, "alpha": False}, r"data\.partition\.alpha = False: should be a valid number"),
        ({"needed": 1, "kind": "c"}, r"data\.partition\.kind = 'c': should be 'a' or 'b'"),
        ({"needed": 1, "count": None}, r"data\.partition\.count = None: should be a valid integer"),
        ({"needed": 1, "labels": []}, r"data\.partition\.labels is not known; build takes: needed = "),
    ],
    ids=str,
)
def test_wrong_arguments(given_, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        arguments(build, given_, "data.partition")
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_argument_lists_the_known_ones_and_the_closest():
    with pytest.raises(ConfigError, match=re.escape("strategy.alfa is not known; build takes: ")) as caught:
        arguments(build, {"needed": 1, "alfa": 1}, "strategy")
    assert "alpha = 0.5, kind = 'a', count = 1" in str(caught.value)
    assert str(caught.value).endswith("(did you mean alpha?)")
    with pytest.raises(ConfigError, match=re.escape("strategy.x is not known; nothing takes: none")):
        arguments(nothing, {"x": 1}, "strategy")


def test_an_argument_of_another_entry_names_that():
    table = {"none": nothing, "first": build, "second": build}
    with pytest.raises(ConfigError, match=r"s\.alpha is not known; nothing takes: none; first, second take alpha$"):
        arguments(nothing, {"alpha": 1.0}, "s", table)
    with pytest.raises(ConfigError, match=r"s\.alfa is not known; nothing takes: none$"):
        arguments(nothing, {"alfa": 1.0}, "s", table)


def test_lookup():
    table = {"iid": 1, "shards": 2, "dirichlet": 3}
    assert lookup(table, "shards", "data.partition.name") == 2
    with pytest.raises(ConfigError) as caught:
        lookup(table, "shard", "data.partition.name")
    assert str(caught.value) == (
        "data.partition.name = 'shard' is not known; choose from iid, shards, dirichlet (did you mean shards?)"
    )
    with pytest.raises(ConfigError, match=r"choose from iid, shards, dirichlet$"):
        lookup(table, "qqq", "data.partition.name")


def test_presets_survive_toml():
    assert len(PRESETS) >= 5
    for name in PRESETS:
        assert reread(preset(name)) == preset(name)


@pytest.mark.parametrize("key", ["clients.k", "evaluation.qqq", "checkpoint.dir"])
def test_an_unknown_key_is_not_answered_with_its_own_section(key):
    with pytest.raises(ConfigError) as caught:
        Config().override({key: 1})
    assert f"did you mean {key.partition('.')[0]}?" not in str(caught.value)


def untyped(*, alpha=1):
    """An extension whose author forgot the types."""


def test_arguments_without_types_are_their_authors_mistake():
    with pytest.raises(TypeError, match="untyped: its keyword-only parameters need type annotations"):
        arguments(untyped, {}, "strategy")


def test_override_leaves_the_callers_dictionary_alone():
    given = {"lr": 0.2}
    Config().override({"training": given, "training.momentum": 0.5})
    assert given == {"lr": 0.2}


def test_a_key_that_is_no_text():
    with pytest.raises(ConfigError):
        Config().override({3: 1})


def test_a_key_with_newlines_makes_a_short_message():
    with pytest.raises(ConfigError) as caught:
        Config().override({"a\nb\nc": 1})
    assert len(str(caught.value).splitlines()) <= 2


def test_a_section_is_explained_in_words_for_a_person():
    with pytest.raises(ConfigError) as caught:
        Config().override({"training": 3})
    assert "instance of" not in str(caught.value)
