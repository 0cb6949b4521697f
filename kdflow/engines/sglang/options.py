"""What all engines of SGLang are told."""

from __future__ import annotations

import os
from typing import Any

import pydantic

from kdflow.contracts import EngineContext, KdflowError, ModelBytes, Options
from kdflow.engines.sglang.process import EngineProcess
from kdflow.engines.sglang.supervisor import FAILURES
from kdflow.engines.sglang.weights import LOADER

# SGLang takes a request of fewer tokens than its context has, by seven of them.
_SPARE_POSITIONS = 8


class SGLangOptions(Options):
    """Options that go through to ``sglang.Engine``, and how long it may take."""

    operational = frozenset({"memory_fraction", "start_timeout", "timeout"})

    tensor_parallel: int = pydantic.Field(default=1, ge=1)
    """GPUs that share every layer."""
    pipeline_parallel: int = pydantic.Field(default=1, ge=1)
    """Groups of GPUs that hold one range of layers each."""
    expert_parallel: int = pydantic.Field(default=1, ge=1)
    """Groups into which the tensor-parallel GPUs divide the experts of a mixture."""
    data_parallel: int = pydantic.Field(default=1, ge=1)
    """Copies of the model that divide the sequences."""
    memory_fraction: float = pydantic.Field(default=0.5, gt=0, lt=1)
    """Share of a GPU's memory for weights and keys and values, at most; on a CPU, of what is free."""
    attention_backend: str | None = None
    """SGLang's name for the attention kernels, such as triton; null: it chooses."""
    start_timeout: float = pydantic.Field(default=1800.0, gt=0)
    """Seconds until the engine must be up."""
    timeout: float = pydantic.Field(default=600.0, gt=0)
    """Seconds until it must have answered: up to four micro-batches scored, or a step's responses written."""

    @pydantic.model_validator(mode="after")
    def _divide_experts(self) -> SGLangOptions:
        if self.tensor_parallel % self.expert_parallel:
            raise ValueError(
                f"expert_parallel ({self.expert_parallel}) must divide tensor_parallel ({self.tensor_parallel}), the "
                "GPUs that share the experts"
            )
        return self

    def require_updatable(self) -> None:
        """Check that an engine of these options takes new weights.

        Raises:
            KdflowError: it has several copies of the model.
        """
        if self.data_parallel > 1:
            raise KdflowError(
                f"data_parallel: SGLang gives new weights to one copy of a model alone, not to {self.data_parallel}; "
                "leave it out where the student's weights go to the engine, or give tensor_parallel in its place"
            )

    @property
    def gpus(self) -> int:
        """Of one engine."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    @property
    def patience(self) -> float:
        """Seconds after which an engine has answered or is given up, however often it is started again."""
        return FAILURES * (self.start_timeout + self.timeout) + 60

    def arguments(self, path: str, context: EngineContext, first_gpu: int) -> dict[str, Any]:
        """Those of ``sglang.Engine`` that every use has in common.

        Raises:
            KdflowError: it is to sleep, and there is no GPU.
        """
        from kdflow.models.loading import context_length

        if context.sleeps and context.device.type == "cpu":
            raise KdflowError("teacher.sleep, rollout.sleep: sglang gives memory back on a GPU only; leave them out")
        return {
            "model_path": path,
            "device": context.device.type,
            # SGLang takes it for a number of NUMA nodes where there are no GPUs.
            "base_gpu_id": first_gpu if context.device.type == "cuda" else 0,
            "dtype": str(context.dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "context_length": None if (positions := context_length(path)) is None else positions + _SPARE_POSITIONS,
            "attention_backend": self.attention_backend,
            "mem_fraction_static": self.memory_fraction,
            "tp_size": self.tensor_parallel,
            "pp_size": self.pipeline_parallel,
            "ep_size": self.expert_parallel,
            "dp_size": self.data_parallel,
            "random_seed": 0,
            # Else a scheduler that has nothing to do takes a whole core from the student.
            "sleep_on_idle": True,
            # Else SGLang ends an engine whose pass takes longer than it thinks right.
            "watchdog_timeout": max(300.0, self.timeout),
            "custom_weight_loader": [LOADER],
            "enable_memory_saver": context.sleeps,
            # Else an engine that wakes has no weights.
            "enable_weights_cpu_backup": context.sleeps,
            "log_level": "error",
        }

    def pool(self, model: ModelBytes, cache_tokens: int | None) -> int:
        """Bytes that the engine's processes hold of each GPU: weights, and keys and values of so many tokens.

        Null tokens are as many as there is room for.
        """
        most = int(self.memory_fraction * model.device)
        if cache_tokens is None:
            return most
        needed = model.weights + cache_tokens * model.token_cache
        return min(most, needed // (self.tensor_parallel * self.pipeline_parallel))

    def process(self, arguments: dict[str, Any], context: EngineContext) -> EngineProcess:
        """An engine that is not started yet."""
        # Its processes are all on this machine. No position is used that the model does not have: see arguments.
        environment = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
                       "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}  # fmt: skip
        if context.device.type == "cpu":
            environment["SGLANG_USE_CPU_ENGINE"] = "1"
            if self.gpus > 1:
                # Else SGLang asks for a NUMA node for each of its processes.
                cores = sorted(os.sched_getaffinity(0))
                shares = (cores[number :: self.gpus] or cores for number in range(self.gpus))
                environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
        return EngineProcess(arguments, environment, self.start_timeout, self.timeout)
