"""The configuration: every knob of a run, its default, its range and what it means.

A `Config` is a frozen tree that mirrors the TOML file. It names entries of tables (`data.partition.name`,
`strategy.name`, ...) and never imports code; `tables` checks what a section gives to such an entry.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import tomli_w
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fedsim.config import messages
from fedsim.config.tables import STRICT
from fedsim.errors import ConfigError

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Auto = Literal["auto"]


class _Section(BaseModel):
    model_config = STRICT


class _Choice(BaseModel):
    """A section that names a table's entry and carries that entry's own keyword arguments."""

    model_config = {**STRICT, "extra": "allow"}

    @property
    def arguments(self) -> dict[str, Any]:
        """The entry's own arguments, as given: not checked yet, see `tables.arguments`."""
        return dict(self.model_extra or {})


class PartitionConfig(_Choice):
    """How the training set is dealt out to the clients."""

    name: str = Field("iid", description="iid, shards, dirichlet, quantity, sampled; plus that partitioner's arguments")


class DataConfig(_Section):
    """What the clients learn from."""

    dataset: str = Field("mnist", description="mnist, fashion_mnist, synthetic (offline, for tests)")
    partition: PartitionConfig = PartitionConfig()


class ModelConfig(_Section):
    """What the clients train."""

    name: str = Field("mlp", description="mlp (784-64-10), 2nn (784-200-200-10), cnn (McMahan's), logistic")


class ClientsConfig(_Section):
    """How many clients there are, and how many of them take part in a round (the paper's K and C)."""

    count: int = Field(10, ge=1, le=10_000_000, description="clients in all (the paper's K)")
    per_round: str | int | float = Field(
        "all", description='clients in a round: "all", a count, or a fraction C below 1: max(1, round(C * count))'
    )
    sampler: str = Field("uniform", description="how a round's cohort is drawn: uniform, without replacement")

    @field_validator("per_round", mode="before")
    @classmethod
    def _check_per_round(cls, value: object) -> object:
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        is_fraction = isinstance(value, float) and 0 <= value < 1
        if value == "all" or is_count or is_fraction:
            return value
        raise ValueError('must be "all", a whole number from 1, or a fraction below 1 such as 0.1')

    @model_validator(mode="after")
    def _check_cohort_fits(self) -> Self:
        if isinstance(self.per_round, int) and self.per_round > self.count:
            raise ValueError(f"per_round = {self.per_round} is more than count = {self.count}; lower it or raise count")
        return self


class TrainingConfig(_Section):
    """What a client does in a round: SGD on its own shard (the paper's E, B and eta)."""

    local_epochs: int = Field(2, ge=1, description="passes over the shard in a round (E)")
    batch_size: int = Field(32, ge=0, description="examples of a step (B); 0 = the whole shard as one batch")
    lr: float = Field(0.1, gt=0, description="learning rate of local SGD (eta)")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of local SGD; starts at zero in each round")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty of local SGD, as torch.optim.SGD has it")
    engine: Literal["auto", "loop", "stacked"] = Field(
        "auto", description="auto, loop (autograd, any nn.Module), stacked (many clients in one computation)"
    )


class StrategyConfig(_Choice):
    """What the server does with the clients' updates."""

    name: str = Field("fedavg", description="fedavg, fedavgm, fedadam; plus that strategy's arguments")
    weighting: Literal["examples", "uniform"] = Field(
        "examples", description="weight of a client in the mean: examples (its num_examples), uniform"
    )


Fraction = Annotated[float, Field(ge=0.0001)]  # Ray counts resources in 1/10,000


class PlacementConfig(_Section):
    """Where the clients run. Nothing here changes a result."""

    mode: Literal["auto", "actor-per-client", "packed", "serial"] = Field(
        "auto", description="auto, actor-per-client, packed (actors host many clients), serial (this process, no Ray)"
    )
    actors: Auto | Annotated[int, Field(ge=1)] = Field("auto", description="packed: how many actors host the clients")
    num_cpus: Auto | Fraction = Field("auto", description="CPUs each actor is pinned to; a fraction is allowed")
    num_gpus: Auto | Annotated[float, Field(ge=0)] = Field(
        "auto", description="GPUs each actor is pinned to, 1 or a fraction; serial: those of this process; auto = 0"
    )
    stack_size: Auto | Annotated[int, Field(ge=1)] = Field(
        "auto", description="packed, serial: at most so many clients of an actor train in one computation"
    )
    threads: int = Field(1, ge=1, le=1024, description="torch threads of each actor; part of the promise of equal bits")
    start: Literal["auto", "fork", "plain"] = Field(
        "auto", description="how actors start: auto, fork (from a process that has torch loaded), plain (Ray's own way)"
    )
    address: str = Field("local", min_length=1, description="local (a private Ray), auto, or a Ray address HOST:PORT")

    @field_validator("num_cpus", "num_gpus")
    @classmethod
    def _check_fraction(cls, value: float | str) -> float | str:
        if isinstance(value, str):
            return value
        if 0 < value < 0.0001:
            raise ValueError("must be 0 or at least 0.0001, the smallest share that Ray knows")
        if value > 1 and value != int(value):
            raise ValueError("must be a fraction up to 1 or a whole number")
        return value


class EvaluationConfig(_Section):
    """What is tested, and when."""

    every: int = Field(1, ge=1, description="rounds between evaluations on the test set; the last round always is")
    clients: bool = Field(
        False, description="in every round, each client's loss and accuracy on its own shard, before and after training"
    )


class FailuresConfig(_Section):
    """What happens when an actor, a worker or a node dies. A bug in a client's code always stops the run."""

    max_retries: int = Field(
        3, ge=0, description="of a client's work; losses of its actor, its node, memory and patience count apart"
    )
    on_exhausted: Literal["stop", "drop"] = Field(
        "stop", description="stop (exit code 1, can be resumed), drop (the round goes on without the client)"
    )
    timeout_s: float = Field(
        0.0, ge=0, description="seconds of a client's work until another actor gets it; 0 = no limit"
    )


class CheckpointConfig(_Section):
    """How often the weights and the server's state are saved."""

    every_s: float = Field(10.0, ge=0, description="seconds between checkpoints; the last round always has one")
    keep: Literal["all"] | Annotated[int, Field(ge=1)] = Field(2, description='checkpoints kept: a count, or "all"')


class Config(_Section):
    """The whole configuration of a run; `Config()` is the default run.

    Example:
        >>> config = Config().override({"clients.count": 100, "clients.per_round": 0.1})
        >>> config.clients.count, config.training.lr
        (100, 0.1)
    """

    name: str = Field("mnist", description="the run is called after it: letters, digits, '.', '_' and '-'")
    seed: int = Field(0, ge=0, lt=2**63, description="of every random draw")
    rounds: int = Field(5, ge=0, le=999_999, description="communication rounds")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    clients: ClientsConfig = ClientsConfig()
    training: TrainingConfig = TrainingConfig()
    strategy: StrategyConfig = StrategyConfig()
    placement: PlacementConfig = PlacementConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    failures: FailuresConfig = FailuresConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not RUN_NAME.fullmatch(value):
            raise ValueError("up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit")
        return value

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Builds a configuration from nested dictionaries, as a TOML file parses to.

        Raises:
            ConfigError: an unknown key (the closest known one is named), a wrong type or a value out of range.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(messages.explain(error, [key.name for key in keys()])) from None

    @classmethod
    def from_toml(cls, path: Path) -> Config:
        """Reads a TOML file; a file without a `name` gives the run the file's own name.

        Raises:
            ConfigError: the file cannot be read, is not TOML, or does not fit (see `from_dict`).
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            advice = "; `fedsim presets` lists what needs no file" if isinstance(error, FileNotFoundError) else ""
            raise ConfigError(f"cannot read the configuration {path}: {reason}{advice}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from None
        try:
            return cls.from_dict({"name": path.stem, **values})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def override(self, changes: Mapping[str, Any]) -> Config:
        """A copy with some keys changed; keys are dotted, as in `{"clients.count": 100}`.

        Changing `data.partition.name` or `strategy.name` drops the arguments of the entry named before.

        Raises:
            ConfigError: as `from_dict`.
        """
        values = self.model_dump(exclude_unset=True)  # what was not set stays so: RAY_ADDRESS may fill in the address
        choices: dict[str, PartitionConfig | StrategyConfig] = {
            "data.partition": self.data.partition,
            "strategy": self.strategy,
        }
        for name, choice in choices.items():
            if changes.get(f"{name}.name", choice.name) != choice.name:
                section = _descend(values, name)
                for argument in choice.arguments:
                    del section[argument]
        for key, value in copy.deepcopy(dict(changes)).items():
            if not isinstance(key, str) or not key.isprintable():
                raise ConfigError(f"{key!r} is not a key; `fedsim run --help` lists them")
            parents, _, last = key.rpartition(".")
            section = _descend(values, parents)
            if not isinstance(section, dict):
                raise ConfigError(messages.unknown_key(key, [key.name for key in keys()]))
            section[last] = value
        return Config.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested dictionaries of plain values."""
        values: dict[str, Any] = self.model_dump(mode="json")
        return values

    def to_toml(self) -> str:
        """The configuration as TOML: reading it gives an equal configuration."""
        return tomli_w.dumps(self.to_dict())


def _descend(values: dict[str, Any], section: str) -> Any:
    for part in section.split(".") if section else []:
        values = values.setdefault(part, {}) if isinstance(values, dict) else values
    return values


class Key(NamedTuple):
    """One documented key of the configuration."""

    name: str
    default: Any
    description: str


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key of the configuration, in the order of the file: the source of `--help` and of the README's table."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", field.default, field.description or "")
