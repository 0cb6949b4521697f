import importlib.util
from typing import Any

import pytest

from tests.support.commands import command, one_thread, site, write_run

__all__ = ["command", "no_sglang", "one_thread", "site", "write_run"]


@pytest.fixture
def no_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where sglang is not installed."""
    find = importlib.util.find_spec

    def found(name: str, *package: Any) -> Any:
        return None if name == "sglang" else find(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
