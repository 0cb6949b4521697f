"""The student: a Hugging Face model under FSDP2, whose loss is computed inside the sharded root's forward."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kdflow import ops
from kdflow.config import StudentConfig, TrainingConfig
from kdflow.contracts import Algorithm, Batch, Head, ModelSpec, Side
from kdflow.contracts.returned import require_loss, require_module
from kdflow.models.activations import checkpoint_activations
from kdflow.models.head import probe_head, read_head
from kdflow.models.joined import joining
from kdflow.models.loading import blocks, load_model
from kdflow.models.lora import add_adapters, merged
from kdflow.models.packed import packed_hidden_states
from kdflow.runtime.optimizer import make_optimizer, optimizer_step, state_of
from kdflow.runtime.processes import Processes
from kdflow.runtime.whole import whole
from kdflow.tokenizers.tokenizer import Tokenizer

Compute = Callable[[Side], tuple[Tensor, ...]]
Metrics = Mapping[str, tuple[Tensor, float]]

# Blocks that FSDP handles as one where none of it is gathered from others: its hooks at each unit keep the host busy,
# for which a fast GPU waits.
_UNIT = 4


def blocks_to_a_unit(training: TrainingConfig, whole: bool) -> int:
    """How many of the student's blocks FSDP handles as one; ``whole`` says that each rank holds all of them."""
    return _UNIT if whole and not training.activation_checkpointing else 1


class Root(nn.Module):
    """The root that FSDP shards: while its forward runs, the head's weight is whole, exactly once.

    It returns a tuple of tensors, since older FSDP2 loses the gradients of other outputs.
    """

    def __init__(self, model: transformers.PreTrainedModel, valid_vocab: int, with_embeddings: bool) -> None:
        super().__init__()
        self.model = model
        self.algorithm: nn.Module | None = None
        self._valid_vocab, self._with_embeddings = valid_vocab, with_embeddings

    def forward(self, batch: Batch, compute: Compute) -> tuple[Tensor, ...]:
        """Hidden states at the targets, handed to ``compute`` with the head."""
        tokens = batch.student
        rows = packed_hidden_states(self.model, tokens)[tokens.targets]
        embed = self.model.get_input_embeddings() if self._with_embeddings else None
        head: Head = read_head(self.model, self._valid_vocab)
        return compute(Side(tokens, rows, head, tokens.response_of_target, embed))


@dataclass(frozen=True)
class Micro:
    """What a micro-batch leaves behind: sums, still on the device."""

    loss: Tensor
    metrics: dict[str, tuple[Tensor, float]]


class Student:
    """Forward, backward and optimizer step of the model that is trained."""

    def __init__(self, config: StudentConfig, training: TrainingConfig, algorithm: Algorithm, tokenizer: Tokenizer,
                 end: int | None, teacher: ModelSpec | None, processes: Processes) -> None:  # fmt: skip
        self.algorithm, self._training, self._processes = algorithm, training, processes
        # What is trained is held in `parameters`. A frozen base may be held in what is computed in: FSDP would cast it
        # to that before each use, and asks for one dtype among what is trained only.
        trained = getattr(torch, training.parameters)
        held = trained if config.lora is None else getattr(torch, training.dtype)
        model = load_model(config.model, held, processes.device, config.keep_layers)
        model.train()
        probe_head(model, "student")
        self.model: Any = model
        valid_vocab = tokenizer.vocabulary_size
        self.root = Root(model, valid_vocab, "embeddings" in algorithm.needs)
        # The same initial values on every rank, whatever was drawn before.
        with torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []):
            torch.manual_seed(0)
            head = read_head(model, valid_vocab)
            spec = ModelSpec(head.weight.shape[1], head.vocab_size, head, tokenizer, end)
            algorithm.module = require_module(algorithm, algorithm.build(spec, teacher))
            if config.lora is not None:
                add_adapters(model, config.lora, trained)
        if algorithm.module is not None:
            self.root.algorithm = algorithm.module.to(processes.device, trained)
        self._shard()
        self.optimizer = make_optimizer(self.root, training, self._rates())

    def _shard(self) -> None:
        training, mesh = self._training, self._processes.mesh
        checkpoint_activations(self.model, int(training.activation_checkpointing))
        policy = MixedPrecisionPolicy(
            param_dtype=getattr(torch, training.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        # Where nobody shares the weights, they stay as they are computed with between micro-batches, and gradients are
        # summed in fp32 where they are, which saves copies.
        reshard = False if self._processes.whole else None
        shard = partial(fully_shard, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        layers, size = list(blocks(self.model)), blocks_to_a_unit(training, self._processes.whole)
        for first in range(0, len(layers), size):
            shard(layers[first : first + size])
        shard(self.root)
        if training.compile:
            # Not the call, in which FSDP's hooks cut the graph; and only now, since it takes the forward that is there.
            for layer in layers:
                layer.forward = torch.compile(layer.forward, backend=joining("inductor"))
        # The blocks of a unit share its state.
        self._units = [unit for unit in (*layers[::size], self.root) if isinstance(unit, FSDPModule)]
        if self._processes.size > 1:
            for unit in self._units:
                # Gradients are of sums already divided by the global number of target tokens: ranks add up. Plain sums,
                # since gloo knows no others.
                unit.set_gradient_divide_factor(1.0)
                unit.set_force_sum_reduction_for_comms(True)

    def _rates(self) -> dict[nn.Parameter, float]:
        """Learning rates that are not the run's."""
        rate, module = self.algorithm.learning_rate, self.root.algorithm
        return {} if rate is None or module is None else dict.fromkeys(module.parameters(), rate)

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that the model has positions for."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def drops_out(self) -> bool:
        """Whether what it computes while it is trained is not what it computes alone."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.root.modules())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and sharded parameters, shared ones once."""
        return self.root.named_parameters()

    def backward(
        self,
        batch: Batch,
        teacher: Callable[[], Side | None],
        target_tokens: int,
        last: bool,
        also: Callable[[Side, Batch], Metrics] | None = None,
    ) -> Micro:
        """Add the gradients of one micro-batch, divided by the target tokens of the whole step.

        ``teacher`` is asked once the student's hidden states are there, or on their way; ``last`` says that it is the
        step's last micro-batch; ``also`` adds metrics to the algorithm's.

        Raises:
            KdflowError: of the teacher or the algorithm, or its metrics have names that are taken.
        """
        for unit in self._units:
            if self._processes.whole:
                unit.set_requires_gradient_sync(last, recurse=False)
                unit.set_reshard_after_backward(last, recurse=False)
            else:
                unit.set_requires_all_reduce(last, recurse=False)  # between replicas, once a step
        names: dict[str, float] = {}

        def compute(side: Side) -> tuple[Tensor, ...]:
            result = require_loss(self.algorithm, self.algorithm.loss(side, teacher(), batch))
            metrics = {**result.metrics, **(also(side, batch) if also else {})}
            names.update({name: count for name, (_, count) in metrics.items()})
            return (result.value, *(value.detach() for value, _ in metrics.values()))

        with ops.chunk_rows(self._training.head_chunk):
            try:
                loss, *metrics = self.root(batch, compute)
            except Exception:
                # FSDP does not see its forward end: it would not let go of what it gathered, and a checkpoint of the
                # last step would hold that, in what is computed in.
                for unit in self._units:
                    unit.set_reshard_after_forward(True, recurse=False)
                self._reshard()
                raise
        (loss / target_tokens).backward()
        return Micro(loss.detach(), dict(zip(names, zip(metrics, names.values(), strict=True), strict=True)))

    @torch.no_grad()
    def measure(self, batch: Batch, measure: Compute) -> tuple[Tensor, ...]:
        """Apply ``measure`` to the student's side of a micro-batch, without gradients."""
        self.root.eval()
        with ops.chunk_rows(self._training.head_chunk):
            found: tuple[Tensor, ...] = self.root(batch, measure)
        self._reshard()
        self.root.train()
        return found

    def _reshard(self) -> None:
        """Let go of what was gathered: without a backward pass it would stay, and be taken for what is trained."""
        for unit in self._units:
            unit.reshard()

    def clip(self) -> Tensor:
        """Bound the gradient's norm; returns what it was."""
        norm = torch.nn.utils.clip_grad_norm_(self.root.parameters(), self._training.clip_norm or math.inf)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, share: float) -> None:
        """Move the parameters, at this share of their learning rates."""
        optimizer_step(self.optimizer, share)

    @torch.no_grad()
    def generate(self, prompt_ids: Tensor, max_new_tokens: int, eos: int | None) -> Tensor:
        """Greedy continuation of ``[T]``; every rank calls it, with the same prompt."""
        self.root.eval()
        assert isinstance(self.root, FSDPModule)
        self.root.unshard()
        with torch.compiler.set_stance("force_eager"):
            ids: Tensor = self.model.generate(
                prompt_ids[None], attention_mask=torch.ones_like(prompt_ids[None]), max_new_tokens=max_new_tokens,
                do_sample=False, use_cache=True, eos_token_id=eos, pad_token_id=eos,
            )  # fmt: skip
        self._reshard()
        self.root.train()
        return ids[0, len(prompt_ids) :]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and sharded parameters of the model that move, the algorithm's own left out."""
        return ((name, one) for name, one in self.model.named_parameters() if one.requires_grad)

    @torch.no_grad()
    def weights(self, instead: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """What is trained, whole, by its Hugging Face names, adapters merged; every rank goes through all of it.

        Args:
            instead: other values of the parameters that :meth:`trained` names.
        """
        values = {id(one): instead[name] for name, one in self.trained()} if instead is not None else {}
        return merged(self.model, lambda parameters: whole(values.get(id(one), one) for one in parameters))

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds, by name; loading writes into them.

        The frozen base of adapters is none of them: it is read from ``student.model`` again.
        """
        self._reshard()  # an error may have come between two micro-batches, while all is gathered
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad or not name.startswith("model."):
                tensors[f"student.{name}"] = parameter.data
            for key, value in state_of(self.optimizer, parameter).items():
                tensors[f"optimizer.{name}.{key}"] = value
        if (module := self.root.algorithm) is not None:
            kept = module.state_dict().keys()  # of the buffers, those that are persistent
            tensors |= {f"student.algorithm.{name}": one for name, one in module.named_buffers() if name in kept}
        return tensors
