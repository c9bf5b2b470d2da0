"""Joins the Ray cluster at an address, or says in a few seconds why not."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray.exceptions import AuthenticationError, RayError

from fedsim.actors.handshake import handshake
from fedsim.actors.private import replaced, signals_held
from fedsim.errors import PlanError, first_line

_PACKAGE = str(Path(__file__).parents[1])

_SETTINGS = b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"
"""How a client of gRPC, which Ray speaks, begins (RFC 9113, 3.4), and how its server answers: with their settings."""


def join(address: str, *, debug: bool) -> None:
    """Joins a cluster, with this fedsim on every node that works for it.

    Args:
        address: HOST:PORT, or "auto" for the cluster of this machine.
        debug: shows what the actors print.

    Raises:
        PlanError: there is no cluster, this process is not let in, or a node does not fit.
    """
    _connect(address, debug)
    if handshake(hosts()):
        ray.shutdown()  # code is given to all that a driver starts, when it joins; not to an actor alone
        _connect(address, debug, runtime_env={"py_modules": [_PACKAGE]})
        _refuse(handshake(hosts()), "another fedsim than this one, in a folder that is searched first: remove that one")


def check() -> None:
    """Checks the nodes of a Ray that the caller joined, which can be given nothing any more.

    Raises:
        PlanError: a node does not fit.
    """
    ways = f'install this one there, or join with ray.init(runtime_env={{"py_modules": ["{_PACKAGE}"]}})'
    _refuse(handshake(hosts()), f"no fedsim, or another one: {ways}")


def alive() -> list[dict[str, Any]]:
    """The nodes that there are now."""
    return [node for node in ray.nodes() if node["Alive"]]


def hosts() -> list[dict[str, Any]]:
    """Those of them that can host actors: a head often offers nothing."""
    return [node for node in alive() if node["Resources"].get("CPU") or node["Resources"].get("GPU")]


def _refuse(lacking: Sequence[str], what: str) -> None:
    if lacking:
        raise PlanError(f"node {lacking[0]} has {what}")


def _connect(address: str, debug: bool, **options: Any) -> None:
    if "://" in address:
        raise PlanError(
            f"{address!r} cannot be joined: use HOST:PORT on a machine of the cluster, the address that `ray start` "
            "says, or `ray job submit` from elsewhere; ray:// clients are not supported"
        )
    find_node = partial(services.get_node_to_connect_for_driver, timeout_seconds=5)
    try:
        _knock(address)
        with (
            signals_held(),
            replaced(ray_constants, "NUM_REDIS_GET_RETRIES", 1),  # else it tries for 20 s with a wrong token
            replaced(services, "get_node_to_connect_for_driver", find_node),  # 60 s on a machine that is no node
        ):
            ray.init(address=address, log_to_driver=debug, logging_level="ERROR", **options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise PlanError(_explained(address, error)) from None


def _knock(address: str) -> None:
    """Fails at once where nobody listens, and soon where it is no Ray: `ray.init` would try for many minutes.

    Raises:
        OSError, ValueError: no Ray answers.
    """
    found = services.canonicalize_bootstrap_address(address)  # resolves auto as `ray.init` does
    host, _, port = found.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
            connection.sendall(_HELLO)
            with contextlib.suppress(TimeoutError):
                if connection.recv(4)[3:] == _SETTINGS:
                    return
            raise OSError("something else listens there")


def _explained(address: str, error: Exception) -> str:
    """Why a cluster could not be joined, in a line."""
    text = f"{error}\n{error.__cause__ or ''}"
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", text)
    if len(versions) == 2:
        (their_ray, their_python), (own_ray, own_python) = versions
        return (
            f"the Ray at {address!r} is Ray {their_ray} on Python {their_python}, this process has Ray {own_ray} on "
            f"Python {own_python}: run fedsim with what the cluster has, or start the cluster with what is here"
        )
    if isinstance(error, AuthenticationError) or AuthenticationError.__name__ in text:
        return (
            f"the Ray at {address!r} wants a token, and this process has none or a wrong one: set RAY_AUTH_MODE=token "
            "and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH (a file), to what the cluster was started with"
        )
    if "No node info found" in text:
        return (
            f"this machine is no node of the cluster at {address!r}: run fedsim on one that is, "
            f"let this one join (`ray start --address={address}`), or use `ray job submit`"
        )
    return (
        f"no Ray answers at {address!r} ({first_line(error)}); start one with `ray start --head`, "
        "or leave placement.address at local"
    )
