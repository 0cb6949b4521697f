"""Packages that only some options need."""

from __future__ import annotations

import importlib.util

from kdflow.contracts import KdflowError


def require(package: str, extra: str, key: str) -> None:
    """Check that the package behind a key of the run file is installed.

    Raises:
        KdflowError: it is not; names the key, and the command that installs it by kdflow's extra.
    """
    if importlib.util.find_spec(package) is None:
        raise KdflowError(f"{key} needs the package {package}, which is not installed: pip install 'kdflow[{extra}]'")
