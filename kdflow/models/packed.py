"""A packed batch through a Hugging Face decoder, and the proof that its samples do not see each other."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from kdflow.contracts import KdflowError, TokenBatch


def decoder(model: transformers.PreTrainedModel) -> nn.Module:
    """The part that ends in hidden states after the final norm."""
    return model.base_model


def packed_hidden_states(model: transformers.PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Hidden states after the final norm, ``[T, H]``; samples do not see each other."""
    states: Tensor = decoder(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seqlens=batch.cu_seqlens,
        longest=batch.longest,
    ).last_hidden_state
    return states[0]


@torch.no_grad()
def probe_packing(model: transformers.PreTrainedModel) -> None:
    """Compare a sample behind another one with the same sample alone.

    Raises:
        KdflowError: they differ, since the model mixes tokens by more than the attention that is told of samples, as
            state-space models and some older architectures do.
    """
    who = f"model {model.name_or_path} ({type(model).__name__})"
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    ids = probe_ids(len(embeddings), embeddings.device)
    first, second = ids[:11], ids[11:]
    try:
        behind = packed_hidden_states(model, _pack(first, second))[len(first) :].float()
        alone = packed_hidden_states(model, _pack(second)).float()
    except Exception as error:  # architectures fail as they like
        raise KdflowError(f"{who} cannot read packed samples: {type(error).__name__}: {error}") from None
    # The median over tokens: in bf16 a router may send a token to another expert for rounding alone.
    difference = float(((behind - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-12)).median())
    tolerance = 5e-2 if embeddings.element_size() < 4 else 1e-3
    if not difference <= tolerance:
        raise KdflowError(
            f"{who} lets packed samples see each other: behind another sample, a sample's hidden states differ by "
            f"{difference:.3g} of their norm, at most {tolerance:g} expected; kdflow cannot train or distil this "
            "architecture yet"
        )


def probe_ids(vocab_size: int, device: torch.device) -> Tensor:
    """A few different tokens on which a model is probed."""
    return torch.arange(1, 17, device=device) * 37 % min(vocab_size, 30000)


def _pack(*samples: Tensor) -> TokenBatch:
    """A batch without targets."""
    ids, longest = torch.cat(samples), max(map(len, samples))
    positions = torch.cat([torch.arange(len(sample), device=ids.device) for sample in samples])
    bounds = torch.tensor([0, *map(len, samples)], dtype=torch.int32, device=ids.device).cumsum(0, dtype=torch.int32)
    return TokenBatch(ids, positions, bounds, ids[:0], ids[:0], longest, "")
