"""The plan: which cells, what was published, which rates, which seeds, and what counts as agreement."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.config import Config
from fedsim.presets import preset

PLAN = Path(__file__).with_name("plan.toml")

# Seconds of one core, for the order only: of a client's epoch, by model and batch, and of an evaluation.
_EPOCH_S = {("2nn", 0): 0.012, ("2nn", 10): 0.008, ("cnn", 0): 0.6, ("cnn", 50): 0.5, ("cnn", 10): 0.55}
_EVALUATE_S = {"2nn": 0.04, "cnn": 2.0}


@dataclass(frozen=True)
class Cell:
    """One number of the paper's tables."""

    table: int
    model: str
    partition: str
    local_epochs: int
    batch_size: int
    """0 is the paper's B = infinity."""
    per_round: float
    """The paper's C."""
    target: float
    published: int
    """Rounds; 0 where the paper has none."""
    rate: float
    """In the middle of the first three."""

    @property
    def name(self) -> str:
        """A name for folders and tables, such as table1-2nn-iid-E1-B10-C0.1."""
        batch = self.batch_size or "inf"
        return f"table{self.table}-{self.model}-{self.partition}-E{self.local_epochs}-B{batch}-C{self.per_round}"

    def config(self, rate: float, seed: int, rounds: int) -> Config:
        """The run's configuration; in one process, as the bits are the same wherever it runs."""
        return preset("2nn-iid" if self.partition == "iid" else "2nn-shards").override(
            {
                "seed": seed,
                "rounds": rounds,
                "model.name": self.model,
                "clients.per_round": "all" if self.per_round == 1 else self.per_round,
                "training.local_epochs": self.local_epochs,
                "training.batch_size": self.batch_size,
                "training.lr": rate,
                "placement.mode": "serial",
            }
        )


@dataclass(frozen=True)
class Plan:
    """See plan.toml, where each entry is explained."""

    cells: tuple[Cell, ...]
    """By what they are expected to cost, the cheapest first."""
    search_seed: int
    verdict_seeds: tuple[int, ...]
    cap: float
    cap_without_published: int
    max_rates: int
    bands: dict[str, tuple[float, float]]

    def max_rounds(self, cell: Cell) -> int:
        """After how many rounds a run has not reached the target."""
        return math.ceil(self.cap * cell.published) or self.cap_without_published

    def band(self, cell: Cell) -> tuple[float, float]:
        """Ratios of our rounds to the published ones that count as agreement."""
        return self.bands["small_batches" if cell.batch_size else "whole_shard"]

    def cost_s(self, cell: Cell) -> float:
        """A guess at the seconds of one core for a run as long as the published one."""
        clients = max(1, round(100 * cell.per_round))
        epoch_s = _EPOCH_S[cell.model, cell.batch_size]
        round_s = clients * cell.local_epochs * epoch_s + _EVALUATE_S[cell.model]
        return round_s * (cell.published or self.cap_without_published)


def read(path: Path = PLAN) -> Plan:
    """Reads the plan."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    plan = Plan(
        cells=tuple(_cells(values)),
        search_seed=values["search_seed"],
        verdict_seeds=tuple(values["verdict_seeds"]),
        cap=values["cap"],
        cap_without_published=values["cap_without_published"],
        max_rates=values["max_rates"],
        bands={name: (low, high) for name, (low, high) in values["bands"].items()},
    )
    cells = sorted(plan.cells, key=plan.cost_s)
    return Plan(**{**vars(plan), "cells": tuple(cells)})


def rate_at(step: int) -> float:
    """The rate that is `step` times 10^(1/3) away from 0.1, to three digits as the paper's grids are quoted."""
    return float(f"{0.1 * 10 ** (step / 3):.3g}")


def step_of(rate: float) -> int:
    """The inverse of `rate_at`."""
    return round(3 * math.log10(rate / 0.1))


def _cells(values: dict[str, Any]) -> Iterator[Cell]:
    for grid in values["grid"]:
        for column in grid["columns"]:
            for per_round, published in zip(grid["per_round"], column["rounds"], strict=True):
                yield Cell(
                    grid["table"],
                    grid["model"],
                    column["partition"],
                    grid["local_epochs"],
                    column["batch_size"],
                    per_round,
                    grid["target"],
                    published,
                    column["rate"],
                )
    for table in values["rows"]:
        for local_epochs, batch_size, *published in table["rows"]:
            for partition, rounds in zip(("iid", "shards"), published, strict=True):
                yield Cell(
                    table["table"],
                    table["model"],
                    partition,
                    local_epochs,
                    batch_size,
                    table["per_round"],
                    table["target"],
                    rounds,
                    table["rate"][partition],
                )
