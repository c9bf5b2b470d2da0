"""Runs in pandas: recipes to copy from, each a few lines over the two tables of the README.

    python scripts/analyse_runs.py results/*

`rounds` has one row a round and `clients` one row a client a round, of all runs together; the column `run` tells them
apart. What is drawn of them is in `fedsim.plot`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pandas as pd

import fedsim


def accuracy_by_round(rounds: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy, a column a run; the last ten rounds that were evaluated."""
    return rounds.pivot_table(index="round", columns="run", values="test_accuracy").tail(10)


def best_rounds(rounds: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """The round with the highest test accuracy of each run, and the seconds until its end."""
    timed = rounds.assign(seconds=rounds.groupby("run")["round_s"].cumsum())
    best = timed.dropna(subset="test_accuracy").groupby("run")["test_accuracy"].idxmax()
    return timed.loc[best].set_index("run")[["round", "test_accuracy", "test_loss", "seconds"]]


def time_shares(rounds: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """Where the time of the rounds went: shares of each run's seconds."""
    totals = rounds.groupby("run")[["fit_s", "aggregate_s", "evaluate_s", "round_s"]].sum()
    return totals.div(totals["round_s"], axis=0).assign(round_s=totals["round_s"])


def participation(rounds: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """In how many rounds a client took part, of those that took part in any."""
    times = clients.groupby(["run", "client_id"]).size()
    return times.groupby("run").describe()[["count", "min", "50%", "max"]]


def hardest_clients(rounds: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """The five clients with the highest training loss, in the mean of the later half of the rounds."""
    late = clients[clients["round"] > clients.groupby("run")["round"].transform("max") / 2]
    loss = late.groupby(["run", "client_id"])[["train_loss", "num_examples", "cosine_to_mean"]].mean()
    return (
        loss.sort_values("train_loss", ascending=False)
        .groupby("run")
        .head(5)
        .sort_index(level="run", sort_remaining=False)
    )


def drift(rounds: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """How far the clients agree, in the last round: their updates' lengths, and their cosines to the mean update."""
    last = clients[clients["round"] == clients.groupby("run")["round"].transform("max")]
    return last.groupby("run")[["update_l2_norm", "cosine_to_mean"]].quantile([0.05, 0.5, 0.95]).unstack()


def mishaps(rounds: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    """How the clients' work ended, and how often it had to be started again."""
    ended = clients.groupby(["run", "status"]).size().unstack(fill_value=0)
    return ended.assign(retries=rounds.groupby("run")["num_retries"].sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the arguments, and prints every recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders, such as results/*, or one that holds them")
    try:
        _print(parser.parse_args(arguments).runs)
    except fedsim.FedsimError as error:
        parser.exit(error.exit_code, f"{parser.prog}: error: {error}\n")


def _print(folders: Sequence[str]) -> None:
    runs = fedsim.load_runs(folders)
    rounds, clients = runs.rounds, runs.clients
    tables = {recipe.__doc__: recipe(rounds, clients) for recipe in RECIPES}
    tables["Means over seeds, with their confidence intervals."] = runs.over_seeds()
    for title, table in tables.items():
        print(f"\n# {title}\n{table.to_string(float_format='{:.4g}'.format)}")


RECIPES = (accuracy_by_round, best_rounds, time_shares, participation, hardest_clients, drift, mishaps)

if __name__ == "__main__":
    main()
