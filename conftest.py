"""For the tests of kdflow and of its plugins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdflow.cache import cache_directory


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenized data goes where it is forgotten; models that were fetched stay."""
    root = tmp_path_factory.mktemp("cache")
    models = cache_directory() / "models"
    models.mkdir(parents=True, exist_ok=True)
    (root / "models").symlink_to(models, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDFLOW_CACHE", str(root))
        yield
