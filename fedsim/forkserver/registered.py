"""Imported by a forked worker when it is known to Ray: its launcher may end.

Ray imports it at this moment by its setting RAY_preload_python_modules.
"""

from __future__ import annotations

import os

_launcher = os.environ.pop("FEDSIM_LAUNCHER", None)
if _launcher is not None:
    os.write(int(_launcher), b"r")
    os.close(int(_launcher))
