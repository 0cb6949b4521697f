"""The LM head of a Hugging Face model, read and probed against the model's own logits, and the input embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from kdflow.contracts import Head, KdflowError
from kdflow.models.fetch import resolve
from kdflow.models.loading import meta_model
from kdflow.models.packed import decoder, probe_ids


def read_head(model: transformers.PreTrainedModel, valid_vocab: int | None = None) -> Head:
    """The head as it stands now; its tensors are the model's own."""
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if output is None:
        raise KdflowError(f"{type(model).__name__} has no LM head")
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(output.weight, getattr(output, "bias", None), scale, softcap, valid_vocab)


class HeadAndEmbeddings:
    """A model's LM head and input embeddings, from its files; what is between them stays on the meta device.

    The head is read at once, the embeddings when they are first asked for. Where they are tied, both are one tensor.

    Args:
        model: a local directory or a hub id.
        dtype: of the tensors.
        device: where they go.

    Attributes:
        model: the whole.

    Raises:
        KdflowError: there is no such model, or its safetensors hold no head under a name that transformers gives it.
    """

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device) -> None:
        self._path, self._device = Path(resolve(model)), device
        self.model = meta_model(model, dtype)
        self._embeddings: nn.Module = self.model.get_input_embeddings()
        for part in self._embeddings.modules():
            for name, buffer in part.named_buffers(recurse=False):
                # Such as a factor on the embeddings. What transformers does not fill stays NaN, and no run takes that.
                setattr(part, name, torch.full_like(buffer, torch.nan, device=device))
            self.model._init_weights(part)  # type: ignore[no-untyped-call]
        self._load(read_head(self.model).parameters(), "LM head")

    @property
    def head(self) -> Head:
        """The head; :meth:`update` writes into its tensors."""
        return read_head(self.model)

    def load_embeddings(self) -> nn.Module:
        """The model's own module from ids ``[n]`` to ``[n, H]``, read now if it was not.

        Raises:
            KdflowError: the safetensors hold no embeddings under a name that transformers gives them.
        """
        self._load(self._embeddings.parameters(), "input embeddings")
        return self._embeddings

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy new weights in place, those that were read; others are passed over."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            if name in own and not own[name].is_meta:
                own[name].copy_(tensor)

    def _load(self, wanted: Iterable[Tensor], what: str) -> None:
        """Read parameters that are still on the meta device."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for parameter in [one for one in wanted if one.is_meta]:
            names = [name for name, other in parameters.items() if other is parameter]  # several where it is tied
            tensor = _read_tensor(self._path, names)
            if tensor is None or tensor.shape != parameter.shape:
                found = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
                raise KdflowError(
                    f"{self._path}/*.safetensors: expected the {what} as {' or '.join(names)}, of shape "
                    f"{list(parameter.shape)}, found {found}; save the model with transformers' save_pretrained"
                )
            loaded = nn.Parameter(tensor.to(self._device, parameter.dtype), requires_grad=False)
            for name in names:
                owner, _, own_name = name.rpartition(".")
                setattr(self.model.get_submodule(owner), own_name, loaded)


def _read_tensor(folder: Path, names: list[str]) -> Tensor | None:
    """The first of some tensors that is in the safetensors of a folder."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                if name in tensors.keys():  # noqa: SIM118  no mapping
                    tensor: Tensor = tensors.get_tensor(name)
                    return tensor
    return None


def hidden_states(model: transformers.PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Hidden states after the final norm of one sequence ``[T]``, as ``[T, H]``."""
    positions = torch.arange(len(input_ids), device=input_ids.device)
    states: Tensor = decoder(model)(
        input_ids=input_ids[None], position_ids=positions[None], use_cache=False
    ).last_hidden_state
    return states[0]


@torch.no_grad()
def probe_head(model: transformers.PreTrainedModel, owner: str) -> None:
    """Compare logits recomputed by the head with the model's own, on a few tokens.

    Raises:
        KdflowError: they differ: the model does something between hidden states and logits that a head cannot say.
    """
    head, training = read_head(model), model.training
    model.train(False)  # dropout would make any two passes differ
    ids = probe_ids(head.vocab_size, head.weight.device)
    positions = torch.arange(len(ids), device=ids.device)
    expected = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0].float()
    found = head.logits(hidden_states(model, ids)).float()
    model.train(training)
    tolerance = 2e-2 if head.weight.element_size() < 4 else 1e-4
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error <= tolerance:
        raise KdflowError(
            f"the logits of the {owner} ({type(model).__name__}) cannot be recomputed from its hidden states and its "
            f"head: relative difference {error:.3g}, at most {tolerance:g} expected. Its head does more than weight, "
            "bias, scale and soft-capping; kdflow cannot distil this architecture yet"
        )
