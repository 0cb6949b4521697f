"""A packed batch through a Hugging Face decoder."""

from __future__ import annotations

import transformers
from torch import Tensor

from kdflow.contracts import TokenBatch
from kdflow.models.loading import decoder


def packed_hidden_states(model: transformers.PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Hidden states after the final norm, ``[T, H]``; samples do not see each other."""
    return decoder(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seqlens=batch.cu_seqlens,
        longest=batch.longest,
    ).last_hidden_state[0]
