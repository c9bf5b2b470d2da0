"""The plain sum that fedsim's start-up is measured against: import ray and torch, start Ray, two actors with torch.

Prints when the actors have answered, in seconds since the epoch. Ray starts as fedsim starts it: without a dashboard.
"""

import argparse
import time

import ray
import torch


class Actor:
    """Has torch."""

    def ready(self) -> int:
        """Answers once torch is there."""
        import torch

        return int(torch.ones(2).sum())


def main() -> None:
    """Starts everything, and stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=2)
    args = parser.parse_args()
    ray.init(num_cpus=args.actors, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    actors = [ray.remote(num_cpus=1)(Actor).remote() for _ in range(args.actors)]
    assert ray.get([actor.ready.remote() for actor in actors]) == [int(torch.ones(2).sum())] * args.actors
    print(time.time(), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
