"""The same federated averaging with Flower: its Message API, its simulation on Ray, one actor a core.

Flower wants other versions of Ray than fedsim may, so this program runs in an environment of its own; it imports
nothing of fedsim, and gets the data as .npy files from scripts/benchmark.py, so nothing is downloaded:

    python -m venv FOLDER
    FOLDER/bin/pip install "flwr[simulation]==1.42.0" torch

The model, a client's training and the evaluation are those of plain_loop.py; a client trains on one thread, the server
evaluates on all cores. It prints a line of JSON a round.
"""

from __future__ import annotations

import os

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's new way, without a warning that it is coming
}

import argparse
import functools
import importlib.metadata
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from plain_loop import MODELS, evaluate, train
from torch import Tensor

client_app = ClientApp()


@functools.cache  # once in each process
def examples(folder: str, part: str) -> tuple[Tensor, Tensor]:
    """The images, scaled to 0..1, and their labels."""
    images, labels = (np.load(Path(folder) / f"{part}_{name}.npy") for name in ("images", "labels"))
    return torch.from_numpy(images).float() / 255, torch.from_numpy(labels)


@client_app.train()
def fit(message: Message, context: Context) -> Message:
    """What a client does in a round."""
    torch.set_num_threads(1)
    config = message.content["config"]
    images, labels = examples(config["data"], "train")
    shards = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config["seed"]))
    shard = shards.tensor_split(config["clients"])[context.node_config["partition-id"]]
    module = MODELS[config["model"]]()
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    orders = (shard[torch.randperm(len(shard))] for _ in range(config["epochs"]))
    train(module, images, labels, orders, batch_size=config["batch-size"], lr=config["lr"])
    content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": len(shard)})}
    return Message(content=RecordDict(content), reply_to=message)


def serve(args: argparse.Namespace, grid: Grid) -> None:
    """What the server does: all rounds, and the evaluation after each."""
    torch.manual_seed(args.seed)
    module = MODELS[args.model]()
    test_images, test_labels = examples(str(args.data), "test")
    ended = time.perf_counter()

    def after_round(round: int, arrays: ArrayRecord) -> MetricRecord:
        nonlocal ended
        evaluation_started = time.perf_counter()
        module.load_state_dict(arrays.to_torch_state_dict())
        accuracy = evaluate(module, test_images, test_labels)
        now = time.perf_counter()
        if round > 0:
            seconds = {"round_s": now - ended, "evaluate_s": now - evaluation_started}
            print(json.dumps({"round": round, "test_accuracy": accuracy, **seconds}), flush=True)
        ended = time.perf_counter()
        return MetricRecord({"accuracy": accuracy})

    strategy = FedAvg(
        fraction_train=args.per_round / args.clients,
        fraction_evaluate=0,  # the server evaluates, on the whole test set
        min_train_nodes=args.per_round,
        min_available_nodes=args.clients,
    )
    settings = {"data": str(args.data), "model": args.model, "clients": args.clients, "seed": args.seed}
    training = {"epochs": args.epochs, "batch-size": args.batch_size, "lr": args.lr}
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(module.state_dict()),
        num_rounds=args.rounds,
        train_config=ConfigRecord({**settings, **training}),
        evaluate_fn=after_round,
    )


def main() -> None:
    """Runs the simulation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with {train,test}_{images,labels}.npy")
    parser.add_argument("--model", choices=MODELS, required=True)
    for name in ("clients", "per-round", "rounds", "epochs", "batch-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="clients at the same time")
    args = parser.parse_args()

    versions = {name: importlib.metadata.version(name) for name in ("flwr", "ray", "torch", "numpy")}
    print(json.dumps({"round": 0, "versions": versions}), flush=True)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(args.cores)
    server_app = ServerApp()

    @server_app.main()
    def _(grid: Grid, context: Context) -> None:
        serve(args, grid)

    # Imported by name, so that the actors import this file as well and keep their data from one message to the next;
    # what __main__ defines would reach them as a copy with each message.
    from flower_fedavg import client_app

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=args.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": args.cores, "include_dashboard": False, "log_to_driver": False},
        },
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
