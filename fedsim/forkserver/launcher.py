"""What Ray starts as a worker: asks the fork server for a child in its place, and turns into a plain worker otherwise.

It runs by itself, not as a part of the package, hundreds of times at once: so it imports next to nothing.
"""

import _socket
import array
import os
import sys

_OWN = ("FEDSIM_FORK_SERVER", "FEDSIM_WORKER", "FEDSIM_OR_PLAIN")
_ATTEMPTS = 3
_PATIENCE_S = 8.0  # with a server that does not answer, if there is another way


def main() -> None:
    """Ends when a forked child is known to Ray; else becomes Ray's own worker."""
    address = os.environ["FEDSIM_FORK_SERVER"]
    if any(_is_replaced(address) for _ in range(_ATTEMPTS)):
        return
    if "FEDSIM_OR_PLAIN" not in os.environ and not os.path.exists(os.path.dirname(address) + "/plain"):  # noqa: PTH110, PTH120
        _remove(address)  # which the driver will see
        sys.exit("fedsim: the fork server gave no worker, and plain ones do not fit this machine")
    os.kill(int(os.environ["RAY_RAYLET_PID"]), 0)  # there is nobody left to work for, if this fails
    environment = {name: value for name, value in os.environ.items() if name not in _OWN}
    flags = ["-s"] if sys.flags.no_user_site else []  # as Ray would; the -S is this script's
    os.execve(sys.executable, [sys.executable, *flags, os.environ["FEDSIM_WORKER"], *sys.argv[1:]], environment)


def _is_replaced(address: str) -> bool:
    """Whether a child of the server has taken the place of this process."""
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    server.settimeout(_PATIENCE_S if "FEDSIM_OR_PLAIN" in os.environ else 10 * _PATIENCE_S)
    try:
        server.connect(address)
        standard = array.array("i", [0, 1, 2])  # the rest of this process is for the server to see in /proc
        server.sendmsg([b"?"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, standard)])
        if server.recv(1) != b"f":  # forked
            return False
        server.settimeout(None)
        if server.recv(1) != b"r":  # registered; from the child itself
            return False
    except TimeoutError:
        _remove(address)  # so that others need not wait as long
        return False
    except OSError:
        return False
    try:  # noqa: SIM105 - imports next to nothing
        server.send(b"d")  # done: from here on, the child lives without this process
    except OSError:
        pass  # it has ended since: Ray knew it, and starts another where one is needed
    return True


def _remove(address: str) -> None:
    try:  # noqa: SIM105 - imports next to nothing
        os.unlink(address)  # noqa: PTH108 - see above
    except OSError:
        pass


if __name__ == "__main__":
    main()
