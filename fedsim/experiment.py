"""From a configuration to checked parts: everything that can be wrong is found here, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fedsim import datasets, models, sampling, stacked
from fedsim.client import ClientSpec
from fedsim.config import Config
from fedsim.datasets import Dataset
from fedsim.errors import ConfigError
from fedsim.numerics import numerics
from fedsim.own import called
from fedsim.partition import PARTITIONERS, Partition
from fedsim.resolution import address, resolve
from fedsim.sampling import SAMPLERS, Sampler
from fedsim.seeding import generator
from fedsim.strategies import STRATEGIES, Strategy
from fedsim.weights import Layout, Weights


@dataclass(frozen=True, eq=False)
class Experiment:
    """All parts of a run, checked: what the loop works with."""

    config: Config
    """With every default filled in."""
    dataset: Dataset
    partition: Partition
    sampler: Sampler
    cohort_size: int
    strategy: Strategy
    spec: ClientSpec
    layout: Layout
    initial_weights: Weights
    obstacle: str | None
    """What keeps the stacked engine from running the model; None where nothing does."""
    own: dict[str, str]
    """The parts that came from Python instead of the configuration: which -> what it is called."""

    @property
    def model_bytes(self) -> int:
        """Size of the encoded weights."""
        return self.initial_weights.num_bytes

    def sample(self, round: int) -> list[int]:
        """The cohort of a round, in ascending order: a function of the configuration and the round alone."""
        rng = generator("cohort", self.config.seed, round=round)
        cohort: list[int] = self.sampler(self.config.clients.count, self.cohort_size, rng).tolist()
        return cohort

    @property
    def address(self) -> str:
        """Where Ray is: the configuration's address where it was set, else RAY_ADDRESS, else a private Ray."""
        return address(self.config)


def prepare(
    config: Config,
    *,
    model: Callable[..., nn.Module] | None = None,
    strategy: Strategy | None = None,
    dataset: Dataset | None = None,
    after: Experiment | None = None,
) -> Experiment:
    """Looks up, checks and builds the parts of a run; fetches the data set where it is not cached.

    Args:
        config: the configuration; its names are looked up in the tables, except for parts given here.
        model: own model factory, see `models.build`.
        strategy: own server algorithm.
        dataset: own data set.
        after: another experiment, whose data set is taken if it is the same: it need not be read again.

    Raises:
        ConfigError: an unknown entry, or an argument that does not fit.
        DataError: the data set is missing or damaged and cannot be fetched.
    """
    own = {"model": model, "strategy": strategy, "dataset": dataset}
    config = resolve(config, own_strategy=strategy is not None)
    cohort_size = sampling.cohort_size(config.clients.per_round, config.clients.count)
    if strategy is None:
        strategy = STRATEGIES[config.strategy.name](**config.strategy.arguments)
    elif not isinstance(strategy, Strategy):
        raise ConfigError(f"strategy must be a fedsim.Strategy(init, aggregate), not {type(strategy).__name__}")
    factory = model or models.MODELS[config.model.name]
    data = dataset or _same_data(config, after) or datasets.load(config.data.dataset)
    if not isinstance(data, Dataset):
        raise ConfigError(f"dataset must be a fedsim.Dataset, not {type(data).__name__}")
    partition = split(config, data)
    with numerics(config.placement.threads):
        module = models.build(factory, data.input_shape, data.num_classes, config.seed)
        layout = Layout.of(module)
        initial_weights = layout.flatten(module)
        obstacle = stacked.obstacle(module, data.input_shape, data.num_classes)
    if obstacle and config.training.engine == "stacked":
        raise ConfigError(
            f"training.engine = 'stacked' cannot run this model: {obstacle}; the loop engine can, auto takes it"
        )
    engine = "loop" if obstacle else config.training.engine.replace("auto", "stacked")
    return Experiment(
        config=config,
        dataset=data,
        partition=partition,
        sampler=SAMPLERS[config.clients.sampler],
        cohort_size=cohort_size,
        strategy=strategy,
        spec=ClientSpec(
            config.training,
            config.seed,
            factory,
            data.input_shape,
            data.num_classes,
            config.placement.threads,
            engine,
            evaluates=config.evaluation.clients,
        ),
        layout=layout,
        initial_weights=initial_weights,
        obstacle=obstacle,
        own={name: called(part) for name, part in own.items() if part is not None},
    )


def split(config: Config, data: Dataset) -> Partition:
    """Who has which training examples, by a configuration that `resolve` has checked.

    Raises:
        ConfigError: the data cannot be split so.
    """
    partitioner = PARTITIONERS[config.data.partition.name]
    rng = generator("partition", config.seed)
    return Partition.of(partitioner(data.train_labels, config.clients.count, rng, **config.data.partition.arguments))


def _same_data(config: Config, after: Experiment | None) -> Dataset | None:
    is_same = after and "dataset" not in after.own and after.config.data.dataset == config.data.dataset
    return after.dataset if after and is_same else None
