"""What several test files share."""

from __future__ import annotations

import functools
import os

import pytest
import torch

from fedsim import client
from fedsim.fingerprint import fingerprint

# Ray's own default for new clusters; said here so that a test process that starts several agrees with itself.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ["MPLBACKEND"] = "agg"  # draws without a screen


@pytest.fixture(scope="session", autouse=True)
def one_fingerprint():
    """Runs in a test's own process take its fingerprint once: it takes longer than most of them."""
    taken = functools.cache(lambda device, threads: fingerprint(device))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "fingerprint", lambda device: taken(device, torch.get_num_threads()))
        yield


@pytest.fixture(scope="module")
def shared_ray():
    """One Ray for the tests of a module: fedsim uses it and leaves it running. Every test gives its CPUs back."""
    import ray

    from fedsim.actors.private import _on_loopback

    with _on_loopback():
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=500_000_000,
            logging_level="ERROR",
        )
    yield ray
    ray.shutdown()
