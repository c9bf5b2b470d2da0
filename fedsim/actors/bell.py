"""What wakes a resting actor.

Ray lets the main thread of an idle actor look for signals a hundred times a second: of 300, this takes more than a
core. An actor that is inside a call does not look. So actors of which there are many rest inside a call, asleep until
the driver rings, which it does whenever it has called them.
"""

from __future__ import annotations

import os


class Bell:
    """A pipe from the driver to an actor of the same machine. It has no name: it is gone with the processes.

    Attributes:
        address: how the actor finds it, for `listen`.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.address = f"/proc/{os.getpid()}/fd/{self._read}"

    def ring(self) -> None:
        """Wakes the actor, or keeps it from falling asleep the next time."""
        os.write(self._write, b"!")

    def close(self) -> None:
        """Frees the descriptors, when the actor has been ended."""
        os.close(self._read)
        os.close(self._write)


def listen(address: str) -> int:
    """The actor's end of a bell, to be slept on with `rest`.

    Raises:
        OSError: the driver is not on this machine.
    """
    return os.open(address, os.O_RDONLY)


def rest(end: int) -> None:
    """Sleeps until the driver rings, or ends."""
    os.read(end, 1)
