"""Hugging Face models and tokenizers: loaded, refused with a reason, and cut in depth."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from kdflow.contracts import KdflowError
from kdflow.files import sha256
from kdflow.models.attention import PACKED
from kdflow.models.fetch import resolve
from kdflow.models.packed import decoder, probe_packing

_log = logging.getLogger("kdflow")

# Keys of a config that depend on who saved it, and on how it is loaded.
_IDLE = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"})
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # files that one is made of
# What may be a part of one, and what is not; and the keys of a config by which transformers chooses how to read them.
_PARTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "additional_chat_templates/*")
_NO_PARTS = ("config.json", "generation_config.json", "*.index.json")
_CHOOSING = ("model_type", "model_name", "tokenizer_class", "transformers_version")


def load_model(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    keep_layers: str | Sequence[int] | None = None,
    packed: bool = True,
) -> transformers.PreTrainedModel:
    """A causal language model, by default with attention that never crosses packed samples.

    Args:
        model: a local directory or a hub id.
        dtype: of all weights.
        device: where they go.
        keep_layers: a slice such as ``"::3"`` or a list of layers, to cut it in depth.
        packed: False leaves transformers' own attention, which takes padded batches and a key-value cache.

    Raises:
        KdflowError: there is no such model, it is no whole causal language model, its architecture cannot keep packed
            samples apart, or layers are out of range.
    """
    path, config = resolve(model), _config(model)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=PACKED if packed else None, trust_remote_code=False,
            # Straight to the device, unless much of it is not to stay.
            device_map=device if keep_layers is None else None, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors raise what they like
        raise KdflowError(f"model {model} cannot be loaded as a causal language model: {_reason(error)}") from None
    loaded: transformers.PreTrainedModel = found[0]
    if missing := sorted(found[1]["missing_keys"]):
        raise KdflowError(
            f"model {model} is no whole causal language model: its files lack {len(missing)} weights of a "
            f"{type(loaded).__name__}, such as {missing[0]}, which would be left random"
        )
    if keep_layers is not None:
        cut_depth(loaded, keep_layers)
    loaded.config.use_cache = False
    nn.Module.to(loaded, device)
    if packed:
        probe_packing(loaded)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    _log.info(f"loaded {model}: {type(loaded).__name__}, {parameters:,} parameters, in {dtype} on {device}")
    return loaded


def meta_model(
    model: str, dtype: torch.dtype, keep_layers: str | Sequence[int] | None = None, attention: str = PACKED
) -> transformers.PreTrainedModel:
    """The same model without weights, on the meta device: its shapes, in a second.

    Raises:
        KdflowError: there is no such model, it is no causal language model, or layers are out of range.
    """
    config = _config(model)
    try:
        with torch.device("meta"):
            built: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except Exception as error:  # transformers raises what it likes
        raise KdflowError(f"model {model} cannot be built as a causal language model: {_reason(error)}") from None
    if keep_layers is not None:
        cut_depth(built, keep_layers)
    built.config.use_cache = False
    return built


def _config(model: str) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(resolve(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise KdflowError(f"model {model}: {_reason(error)}") from None
    if any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        raise KdflowError(
            f"model {model} is a {config.model_type} with a vision or audio part; kdflow distils text models only"
        )
    return config


def context_length(model: str) -> int | None:
    """Tokens of the longest sequence that a model has positions for; None where its config names no bound.

    Raises:
        KdflowError: there is no such model.
    """
    positions = getattr(_config(model), "max_position_embeddings", None)
    return None if positions is None else int(positions)


def end_ids(model: str) -> frozenset[int]:
    """Ids that end a text, by a model's tokenizer, its config, or its settings for generation.

    Raises:
        KdflowError: there is no such model.
    """
    owners = [load_tokenizer(model), _config(model)]
    path = Path(resolve(model))
    if (path / "generation_config.json").exists():
        owners.append(transformers.GenerationConfig.from_pretrained(path))
    found: set[int] = set()
    for owner in owners:
        ids = getattr(owner, "eos_token_id", None)
        found |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return frozenset(found)


def copy_weights(model: transformers.PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy new weights, by their Hugging Face names, into a model in place.

    Raises:
        KdflowError: the model has no weight of that name.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in weights:
            if name not in own:
                raise _foreign(model, name)
            own[name].copy_(tensor)


def as_saved(
    model: transformers.PreTrainedModel, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by the names and in the shapes of its files, which other libraries read.

    transformers holds some of them otherwise, such as the experts of a layer as one tensor.

    Raises:
        KdflowError: the model has no weight of that name.
    """
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    # To ask for each weight takes as long as to copy it.
    alike = revert_weight_conversion(model, own) is own
    for name, tensor in weights:
        if name not in own:
            raise _foreign(model, name)
        yield from ((name, tensor),) if alike else revert_weight_conversion(model, {name: tensor}).items()


def _foreign(model: transformers.PreTrainedModel, name: str) -> KdflowError:
    return KdflowError(f"{type(model).__name__} has no weight '{name}'; these weights are another model's")


def weights_digest(model: str) -> str | None:
    """SHA-256 over the weight files of a model; None where there are none."""
    path = Path(resolve(model))
    files = sorted(path.glob("*.safetensors"))
    if not any(path.glob("model*.safetensors*")):  # which transformers reads before these
        files += sorted(path.glob("pytorch_model*.bin"))
    if not files:
        return None
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256("".join(pool.map(sha256, files)).encode()).hexdigest()


def config_digest(model: str) -> str:
    """SHA-256 of what the config of a model says, but for what changes nothing that is computed.

    Raises:
        KdflowError: there is no such model, or its config cannot be read.
    """
    path = Path(resolve(model))
    if broken := _broken_json(path, "config.json"):
        raise KdflowError(f"model {model}: {broken}")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    told = json.dumps({key: value for key, value in config.items() if key not in _IDLE}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model.

    Raises:
        KdflowError: the model has none.
    """
    path = resolve(model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise what they like
        if not any(file for names in _TOKENIZERS for file in Path(path).glob(names)):
            raise KdflowError(
                f"model {model} has no tokenizer: {path} holds none of {', '.join(_TOKENIZERS)}; save one there with "
                "tokenizer.save_pretrained"
            ) from None
        why = _broken_json(Path(path)) or _reason(error)
        raise KdflowError(f"model {model} has no tokenizer that can be loaded: {why}") from None
    # Without files, transformers makes an empty tokenizer for some architectures, to which everything is unknown.
    if "a" not in tokenizer.decode(tokenizer.encode("a", add_special_tokens=False)):
        raise KdflowError(f"model {model} has no tokenizer: {path} holds no vocabulary")
    return tokenizer


def same_tokenizer(model: str, other: str) -> bool:
    """Whether two models have one and the same tokenizer, file by file; a False may still mean equal ones.

    Raises:
        KdflowError: there is no such model.
    """
    return _made_of(Path(resolve(model))) == _made_of(Path(resolve(other)))


def _made_of(path: Path) -> dict[str, Any]:
    """What a tokenizer is made of, and perhaps more: its files by their hashes, and keys of the config."""
    files = {file for names in _PARTS for file in path.glob(names) if not any(map(file.match, _NO_PARTS))}
    found: dict[str, Any] = {str(file.relative_to(path)): sha256(file) for file in files}
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return {**found, **{key: config.get(key) for key in _CHOOSING}}
    except (OSError, ValueError, AttributeError):  # whoever loads the model says so
        return found


def _broken_json(path: Path, names: str = "*.json") -> str | None:
    """The first file of a model that is no JSON, and where: what reads them does not always say which."""
    for file in sorted(path.glob(names)):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{file} is no JSON: {error}"
    return None


def _reason(error: Exception) -> str:
    """What an error of transformers says, in one line: pages may follow it."""
    said = next((line.strip(" :") for line in str(error).splitlines() if line.strip()), "")
    return said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"


def blocks(model: transformers.PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks."""
    lists = [child for child in decoder(model).children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise KdflowError(f"{type(model).__name__} keeps its blocks in no list; kdflow cannot shard it")
    return max(lists, key=len)


def cut_depth(model: transformers.PreTrainedModel, keep_layers: str | Sequence[int]) -> None:
    """Keep some of the blocks, in place, and make the config agree.

    Raises:
        KdflowError: nothing is kept, a layer does not exist, or no config describes those that are kept.
    """
    layers = blocks(model)
    count = len(layers)
    if isinstance(keep_layers, str):
        parts = [int(part) if part else None for part in keep_layers.split(":")]
        kept = list(range(count))[slice(*parts)]
    else:
        kept = list(keep_layers)
    if not kept or any(not 0 <= layer < count for layer in kept):
        raise KdflowError(f"student.keep_layers keeps {kept} of the layers 0 to {count - 1}; choose among these")
    chosen = nn.ModuleList([layers[layer] for layer in kept])
    for index, layer in enumerate(chosen):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  the key-value cache is indexed by it
    name = next(name for name, child in decoder(model).named_children() if child is layers)
    setattr(decoder(model), name, chosen)
    _describe_cut(model.config, kept)
    with torch.device("meta"):
        described = transformers.AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)  # type: ignore[no-untyped-call]
    sizes, wanted = ({n: p.shape for n, p in one.named_parameters()} for one in (model, described))
    if other := [name for name in {**wanted, **sizes} if sizes.get(name) != wanted.get(name)]:
        raise KdflowError(
            f"student.keep_layers keeps {kept}, which no config of a {type(model).__name__} describes: {other[0]} "
            "would not be what it is. Keep layers of one kind, or the first ones"
        )


def _describe_cut(config: Any, kept: Sequence[int]) -> None:
    """What the config says of layers: one by one, by number, by how many there are before, or by a rhythm."""
    config.num_hidden_layers = len(kept)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, [getattr(config, name)[layer] for layer in kept])
    if hasattr(config, "decoder_sparse_step"):  # of experts, but in those layers that mlp_only_layers names
        step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
        config.mlp_only_layers = [at for at, layer in enumerate(kept) if layer in dense or (layer + 1) % step]
        config.decoder_sparse_step = 1
    if getattr(config, "first_k_dense_replace", None):
        config.first_k_dense_replace = sum(layer < config.first_k_dense_replace for layer in kept)
