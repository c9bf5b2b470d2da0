"""What a configuration means: its names looked up in the tables, their arguments checked, where Ray is.

Needs no torch: a mistake is answered before it is imported.
"""

from __future__ import annotations

import os
from typing import Any

from fedsim import datasets, models
from fedsim.config import Config
from fedsim.config.tables import arguments, lookup
from fedsim.partition import PARTITIONERS
from fedsim.sampling import SAMPLERS
from fedsim.strategies import STRATEGIES


def resolve(config: Config, *, own_strategy: bool = False) -> Config:
    """Checks the names and arguments of a configuration against the tables, and fills in the arguments' defaults.

    Raises:
        ConfigError: see `config.lookup` and `config.arguments`.
    """
    partitioner = lookup(PARTITIONERS, config.data.partition.name, "data.partition.name")
    given = arguments(partitioner, config.data.partition.arguments, "data.partition", PARTITIONERS)
    changes: dict[str, Any] = {f"data.partition.{name}": value for name, value in given.items()}
    if not own_strategy:
        builder = lookup(STRATEGIES, config.strategy.name, "strategy.name")
        given = arguments(builder, config.strategy.arguments, "strategy", STRATEGIES)
        changes |= {f"strategy.{name}": value for name, value in given.items()}
    lookup(models.MODELS, config.model.name, "model.name")
    lookup(datasets.DATASETS, config.data.dataset, "data.dataset")
    lookup(SAMPLERS, config.clients.sampler, "clients.sampler")
    return config.override(changes)


def address(config: Config) -> str:
    """Where Ray is: the configuration's address where it was set, else RAY_ADDRESS, else a private Ray."""
    placement = config.placement
    is_set = "address" in placement.model_fields_set
    return placement.address if is_set else os.environ.get("RAY_ADDRESS") or placement.address
