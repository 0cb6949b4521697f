"""Ranks end with the process that launched them, however that ends. Nothing large is imported here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

# Names the process that has launched a rank.
LAUNCHER = "KDFLOW_LAUNCHER"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_launcher() -> None:
    """In a rank: be killed when its launcher is gone. A launcher that is killed itself cannot see to it."""
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None:
        return
    with contextlib.suppress(AttributeError, OSError):  # elsewhere than on Linux ranks go on
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it was gone before
        os.kill(os.getpid(), signal.SIGKILL)
