"""Where kdflow keeps what it fetched or computed once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$KDFLOW_CACHE``, or ``~/.cache/kdflow``."""
    return Path(os.environ.get("KDFLOW_CACHE") or "~/.cache/kdflow").expanduser()
