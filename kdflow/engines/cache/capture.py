"""A capture: the directory that ``kdflow cache`` writes, and what it says of itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdflow.cache import cache_directory
from kdflow.contracts import Head, KdflowError
from kdflow.engines.cache.shards import open_tensors, save_whole

ABOUT = "capture.json"
HEAD = "head.safetensors"


def identity(model: str) -> dict[str, str | None]:
    """Hashes of a model's weights, None where there are no files of weights, of its config, and of its tokenizer."""
    from kdflow.data.rendering import SideTokenizer
    from kdflow.models.loading import config_digest, load_tokenizer, weights_digest

    tokenizer = SideTokenizer(load_tokenizer(model), "teacher").key
    return {"weights": weights_digest(model), "config": config_digest(model), "tokenizer": tokenizer}


def capture_directory(path: str | None, model: str, found: Mapping[str, str | None], dtype: str) -> Path:
    """Where a capture lies: at ``path``, or in kdflow's cache under hashes of the teacher and dtype.

    Args:
        path: what the user gave.
        model: the teacher.
        found: its :func:`identity`.
        dtype: of the rows.

    Raises:
        KdflowError: no path is given, and the weights are not there to be hashed.
    """
    if path is not None:
        return Path(path).expanduser()
    if found["weights"] is None:
        raise KdflowError(f"{model} has no files of weights to find its capture by: give teacher.engine.path")
    parts = [*(found[part] for part in sorted(found)), dtype]
    key = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:32]
    return cache_directory() / "captures" / key


def read_about(path: Path) -> dict[str, Any]:
    """What a capture says of itself: ``model``, ``weights``, ``config``, ``tokenizer``, ``engine`` and ``dtype``.

    Raises:
        KdflowError: there is no capture, it is damaged, or it does not say of which config it is.
    """
    try:
        about: dict[str, Any] = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KdflowError(
            f"there is no capture of the teacher's rows at {path}: write it with this run file, kdflow cache RUN.YAML"
        ) from None
    except (OSError, ValueError) as error:
        raise KdflowError(f"{path / ABOUT} cannot be read ({error}): delete {path}, and capture again") from None
    if "config" not in about:
        raise KdflowError(
            f"{path} was captured by an earlier kdflow, which kept no hash of the teacher's config: whether its rows "
            "are still this teacher's cannot be told. Delete it, and capture again"
        )
    return about


def find_capture(path: str | None, model: str, dtype: torch.dtype) -> Path:
    """The directory of a model's capture; without files of weights, its config and tokenizer alone are compared.

    Raises:
        KdflowError: there is no capture, or it is of other weights, another config or another tokenizer.
    """
    found = identity(model)
    directory = capture_directory(path, model, found, str(dtype).removeprefix("torch."))
    about = read_about(directory)
    parts = {"weights": "weights", "config": "settings in config.json", "tokenizer": "tokenizer or chat template"}
    if other := [text for key, text in parts.items() if found[key] is not None and found[key] != about.get(key)]:
        raise KdflowError(
            f"{directory} holds rows of another teacher: the {' and the '.join(other)} of {model} are not those of "
            f"{about.get('model')}, which was captured. Give another path, and capture this teacher: kdflow cache "
            "RUN.YAML"
        )
    return directory


def save_head(path: Path, head: Head, embeddings: Tensor | None) -> None:
    """Store a head and the input embeddings ``[V, H]``, once where they are the same.

    Raises:
        KdflowError: they cannot be written.
    """
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    told = "none"
    if embeddings is not None:
        told = "tied" if torch.equal(embeddings, head.weight) else "stored"
        tensors |= {"embeddings": embeddings} if told == "stored" else {}
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"scale": head.scale, "softcap": head.softcap, "embeddings": told}
    save_whole(path / HEAD, on_host, {name: json.dumps(value) for name, value in about.items()})


class StoredHead:
    """The head in a capture, and its embeddings, which are read when they are asked for.

    Raises:
        KdflowError: the capture has none yet, or the file is damaged.
    """

    def __init__(self, path: Path, dtype: torch.dtype, device: torch.device) -> None:
        if not (path / HEAD).exists():
            raise KdflowError(f"{path} has no {HEAD} yet: let kdflow cache RUN.YAML go on")
        self._file, self._dtype, self._device = open_tensors(path / HEAD), dtype, device
        about = {name: json.loads(value) for name, value in self._file.metadata().items()}
        bias = self._read("bias") if "bias" in self._file.keys() else None  # noqa: SIM118  no mapping
        self.head = Head(self._read("weight"), bias, about["scale"], about["softcap"])
        self._embeddings = about["embeddings"]

    def embeddings(self) -> Tensor | None:
        """The input embeddings ``[V, H]``; None where the engine gave none."""
        if self._embeddings == "none":
            return None
        return self.head.weight if self._embeddings == "tied" else self._read("embeddings")

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor.to(self._device, self._dtype, copy=True)  # of its own, and not of the file's pages
