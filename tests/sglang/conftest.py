"""These tests start the real SGLang: `make test-sglang` installs it for a CPU and runs them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("sglang") is None
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.sglang)
            if missing:
                item.add_marker(pytest.mark.skip(reason="sglang is not installed: make test-sglang"))
