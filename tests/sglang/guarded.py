"""The exporter, in a scheduler where rows may not become Python numbers or leave by a waiting copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

from torch import Tensor

from kdflow.engines.sglang.exporter import Hook
from kdflow.engines.sglang.exporter import exporter as plain


def exporter(config: Mapping[str, Any]) -> Hook:
    hook = plain(config)

    def guarded(*arguments: Any) -> None:
        refuse = mock.Mock(side_effect=AssertionError("rows took a detour through Python"))
        with mock.patch.object(Tensor, "tolist", refuse), mock.patch.object(Tensor, "cpu", refuse):
            hook(*arguments)

    return guarded
