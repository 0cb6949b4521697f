"""Pretrained models that are too large to fetch for a test."""

from __future__ import annotations

import pytest

from kdflow.hub import cached


def pretrained(model: str) -> str:
    """The directory of a model in kdflow's cache; the test is skipped where it is not."""
    folder = cached(model)
    if not (folder / "config.json").is_file():
        fetch = f"""python -c "from kdflow.models.fetch import resolve; resolve('{model}')" """
        pytest.skip(f"{model} is not in kdflow's cache; to have it there, run: {fetch.strip()}")
    return str(folder)
