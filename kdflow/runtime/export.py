"""A checkpoint as a Hugging Face directory, which AutoModelForCausalLM and SGLang load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from kdflow.config import RunConfig
from kdflow.contracts import KdflowError
from kdflow.models.loading import load_model, load_tokenizer
from kdflow.runtime.checkpoint import RUN_STATE, load_tensors, newest, verify


def export(run: Path, output: Path, dtype: str = "float32") -> Path:
    """Write the student of a run directory's newest whole checkpoint, or of one checkpoint, to ``output``.

    Returns:
        The checkpoint that was exported.

    Raises:
        KdflowError: there is no checkpoint, it is damaged, or ``output`` exists.
    """
    checkpoint = find_checkpoint(run)
    if output.exists():
        raise KdflowError(f"{output} exists; give a directory that does not")
    config = RunConfig(**json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))["run"])
    model = load_model(config.student.model, torch.float32, torch.device("cpu"), config.student.keep_layers)
    load_tensors(checkpoint, {f"student.model.{name}": tensor.data for name, tensor in model.named_parameters()})
    model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.config.use_cache = True
    aside = output.with_name(f".{output.name}")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    load_tokenizer(config.student.model).save_pretrained(aside)
    aside.rename(output)
    return checkpoint


def find_checkpoint(run: Path) -> Path:
    """The checkpoint that ``run`` means: itself, or the newest whole one of a run directory.

    Raises:
        KdflowError: there is none, or it is damaged.
    """
    run = run.resolve()
    if (run / RUN_STATE).exists():
        if damage := verify(run):
            raise KdflowError(f"checkpoint {run} is damaged ({damage})")
        return run
    found, warnings = newest(run / "checkpoints")
    if found is None:
        raise KdflowError(
            "\n".join([f"{run} holds no whole checkpoint; a run writes them to {run}/checkpoints", *warnings])
        )
    return found
