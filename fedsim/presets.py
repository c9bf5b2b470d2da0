"""Ready-made experiments. Each is the default configuration with a few keys changed: add one by adding an entry."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from fedsim.config import Config
from fedsim.errors import ConfigError

# McMahan et al. 2017, section 3: K = 100 clients of 600 examples, a tenth of them a round, SGD.
_MCMAHAN_2NN: dict[str, Any] = {
    "model.name": "2nn",
    "rounds": 100,
    "clients.count": 100,
    "clients.per_round": 10,
    "training.local_epochs": 1,
    "training.batch_size": 10,
    "training.lr": 0.1,
    "placement.mode": "packed",
}

# More clients than processes would fit: `auto` packs them.
_HUNDREDS: dict[str, Any] = {**_MCMAHAN_2NN, "training.local_epochs": 5, "placement.mode": "auto", "rounds": 50}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mnist": (
        "10 clients, each its own Ray actor, all in each of 5 rounds; the default",
        {"placement.mode": "actor-per-client"},
    ),
    "seed": (
        "the program fedsim began as: 2 clients, 2 rounds",
        {"clients.count": 2, "rounds": 2, "placement.mode": "actor-per-client"},
    ),
    "2nn-iid": ("McMahan et al. 2017: 2NN, 100 clients, 10 a round, IID", _MCMAHAN_2NN),
    "2nn-shards": (
        "McMahan et al. 2017: 2NN, 100 clients of two digits each, 10 a round",
        {**_MCMAHAN_2NN, "data.partition.name": "shards", "data.partition.shards_per_client": 2},
    ),
    "cnn-iid": (
        "McMahan et al. 2017: CNN, 100 clients, 10 a round, IID, 5 local epochs",
        {**_MCMAHAN_2NN, "model.name": "cnn", "training.local_epochs": 5, "rounds": 20},
    ),
    "hundreds": (
        "300 clients of 200 examples on one workstation, 30 a round",
        {**_HUNDREDS, "clients.count": 300, "clients.per_round": 30},
    ),
    "hundreds-actors": (
        "hundreds by the letter: each of the 300 clients its own Ray actor",
        {**_HUNDREDS, "clients.count": 300, "clients.per_round": 30, "placement.mode": "actor-per-client"},
    ),
    "thousand": (
        "1,000 clients of 60 examples on one workstation, 100 a round",
        {**_HUNDREDS, "clients.count": 1000, "clients.per_round": 100},
    ),
}


def preset(name: str) -> Config:
    """The configuration of a preset; change it with `Config.override`.

    Raises:
        ConfigError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        match = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" (did you mean {match[0]}?)" if match else ""
        raise ConfigError(f"no preset {name!r}; there are {', '.join(PRESETS)}{hint}")
    return Config().override({"name": name, **PRESETS[name][1]})


def experiment(name_or_path: str) -> Config:
    """The configuration of a preset or of a TOML file, as the command line takes it.

    Raises:
        ConfigError: neither a preset nor a readable, valid TOML file.
    """
    if name_or_path in PRESETS:
        return preset(name_or_path)
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return Config.from_toml(path)
    try:
        return preset(name_or_path)
    except ConfigError as error:
        raise ConfigError(f"{error}, and no file of that name") from None
