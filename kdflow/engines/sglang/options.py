"""What all engines of SGLang are told."""

from __future__ import annotations

from typing import Any

import pydantic

from kdflow.contracts import EngineContext, KdflowError, Options
from kdflow.engines.sglang.process import EngineProcess


class SGLangOptions(Options):
    """Options that go through to ``sglang.Engine``, and how long it may take."""

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
    """Seconds until it must have answered: a micro-batch scored, or a step's responses written."""

    def arguments(self, path: str, context: EngineContext) -> dict[str, Any]:
        """Those of ``sglang.Engine`` that every use has in common."""
        return {
            "model_path": path,
            "device": context.device.type,
            "base_gpu_id": context.device.index or 0,
            "dtype": str(context.dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "attention_backend": self.attention_backend,
            "mem_fraction_static": self.memory_fraction,
            "tp_size": self.tensor_parallel,
            "pp_size": self.pipeline_parallel,
            "ep_size": self.expert_parallel,
            "dp_size": self.data_parallel,
            "random_seed": 0,
            "log_level": "error",
        }

    def process(self, arguments: dict[str, Any], context: EngineContext) -> EngineProcess:
        """An engine that is not started yet."""
        environment = {"SGLANG_USE_CPU_ENGINE": "1"} if context.device.type == "cpu" else {}
        return EngineProcess(arguments, environment, self.start_timeout, self.timeout)


def refuse_shared_gpus(options: SGLangOptions, owner: str) -> None:
    """Refuse an engine of several GPUs beside several ranks.

    Raises:
        KdflowError: each rank would have one on its own GPU.
    """
    import torch

    gpus = options.tensor_parallel * options.pipeline_parallel * options.data_parallel
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if gpus > 1 and ranks > 1:
        raise KdflowError(
            f"{owner}: each of the {ranks} ranks has an engine of its own, on its own GPU, which leaves no GPUs for "
            "tensor_parallel, pipeline_parallel or data_parallel above 1; leave them at 1, or train with one process"
        )
