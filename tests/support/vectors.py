"""Golden vectors: what the original authors' code gave. ``tests/vectors/README.md`` says where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DIRECTORY = Path(__file__).parents[1] / "vectors"


@dataclass(frozen=True)
class Case:
    """One case. Floats are fp64 throughout: inputs were fp32, so that nothing is lost either way."""

    id: str
    impl: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    formula: Tensor | None
    tolerance: Mapping[str, float]

    def __str__(self) -> str:
        return self.id


@cache
def cases(method: str) -> tuple[Case, ...]:
    """All cases of ``method``, in the order of the file."""
    directory = DIRECTORY / method
    tensors = load_file(directory / "tensors.safetensors")

    def value(raw: Any) -> Tensor:
        if isinstance(raw, str) and raw.startswith("@"):
            found = tensors[raw[1:]]
            return found.double() if found.is_floating_point() else found
        return torch.tensor(_numbers(raw), dtype=torch.float64)

    return tuple(
        Case(
            case["id"],
            case["impl"],
            case["params"],
            {name: value(raw) for name, raw in case.get("inputs", {}).items()},
            {name: value(raw) for name, raw in case.get("expected", {}).items()},
            value(case["formula"]["per_token"]) if "formula" in case else None,
            case.get("tol", {}),
        )
        for case in json.loads((directory / "cases.json").read_text(encoding="utf-8"))["cases"]
    )


def _numbers(raw: Any) -> Any:
    """JSON numbers, in which "nan", "inf" and "-inf" stand for themselves."""
    return [_numbers(item) for item in raw] if isinstance(raw, list) else float(raw)
