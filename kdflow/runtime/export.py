"""A checkpoint as a Hugging Face directory, which AutoModelForCausalLM and SGLang load."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from kdflow.config import StudentConfig
from kdflow.contracts import KdflowError
from kdflow.extras import require
from kdflow.models.fetch import resolve
from kdflow.models.loading import load_model, load_tokenizer
from kdflow.models.lora import add_adapters, identity
from kdflow.runtime.checkpoint import RUN_STATE, load_tensors, newest, verify
from kdflow.validation import validate_options


def export(run: Path, output: Path, dtype: str = "float32", adapter: bool = False) -> Path:
    """Write the student of a run directory's newest whole checkpoint, or of one checkpoint, to ``output``.

    Args:
        run: a run directory, or one checkpoint.
        output: the directory to write, which may not exist.
        dtype: of the weights that are written.
        adapter: write the adapters of ``student.lora`` alone, as peft does; else they are merged into the base. The
            base of a student cut in depth is a model of its own and is written beside its adapters, to ``base``.

    Returns:
        The checkpoint that was exported.

    Raises:
        KdflowError: there is no checkpoint, it is damaged, ``output`` exists, there are no adapters, or the base has
            changed since they were trained.
        OSError: it cannot be written.
    """
    checkpoint = find_checkpoint(run)
    if output.exists():
        raise KdflowError(f"{output} exists; give a directory that does not")
    student, adapters = student_of(checkpoint)
    if adapter and student.lora is None:
        raise KdflowError(f"{checkpoint} holds no adapter: its run has no student.lora; export without --adapter")
    if not output.parent.exists():  # else what is no directory is told as such
        output.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix=".kdflow-", dir=output.parent) as folder:  # a name that nobody has
        aside = Path(folder, "made")
        _write(checkpoint, student, adapters, aside, output, dtype, adapter)
        aside.rename(output)
    return checkpoint


def _write(
    checkpoint: Path, student: StudentConfig, adapters: Any, aside: Path, output: Path, dtype: str, adapter: bool
) -> None:
    """Write to ``aside`` what will be ``output``; ``adapters`` is the identity of those that were trained."""
    model: Any = load_model(student.model, torch.float32, torch.device("cpu"), student.keep_layers)
    if student.lora is None:
        _load(checkpoint, model)
        _save(model, student, aside, dtype)
        return
    require("peft", "lora", "student.lora")
    if identity(student) != adapters:
        raise KdflowError(
            f"{checkpoint}: student.model, {student.model}, holds other weights than when its adapters were "
            "trained, or another config; put the old ones back"
        )
    if adapter and student.keep_layers is not None:
        _save(model, student, aside / "base", dtype)
    adapted = add_adapters(model, student.lora, torch.float32)
    _load(checkpoint, model)
    if adapter:
        adapted.to(getattr(torch, dtype))
        adapted.peft_config["default"].base_model_name_or_path = _base(student, output)
        with _os_errors():
            adapted.save_pretrained(aside, save_embedding_layers=False)
    else:
        _save(adapted.merge_and_unload(), student, aside, dtype)


def write_student(student: StudentConfig, output: Path) -> None:
    """Write the student as it is before training, cut in depth as its section says, to ``output``.

    Raises:
        KdflowError: it cannot be written.
    """
    shutil.rmtree(output, ignore_errors=True)
    model = load_model(student.model, torch.float32, torch.device("cpu"), student.keep_layers)
    try:
        _save(model, student, output, "float32")
    except OSError as error:
        raise KdflowError(
            f"{output}, the student as engines load it, cannot be written: {error.strerror or error}; make room, or "
            "give another output"
        ) from None


def _load(checkpoint: Path, model: transformers.PreTrainedModel) -> None:
    """Read what was trained."""
    trained = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    load_tensors(checkpoint, {f"student.model.{name}": tensor for name, tensor in trained.items()})


def _save(model: transformers.PreTrainedModel, student: StudentConfig, directory: Path, dtype: str) -> None:
    model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.config.use_cache = True
    tokenizer = load_tokenizer(student.model)
    with _os_errors():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise what the disk says as an OSError: safetensors and tokenizers have errors of their own for it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


@contextmanager
def exported(checkpoint: Path, output: Path, dtype: str, advice: str) -> Iterator[str]:
    """The student of a checkpoint as a directory that an engine loads, for as long.

    Raises:
        KdflowError: it cannot be written; ends with ``advice``.
    """
    shutil.rmtree(output, ignore_errors=True)
    try:
        try:
            export(checkpoint, output, dtype)
        except OSError as error:
            raise KdflowError(
                f"{checkpoint} cannot be exported to {output}: {error.strerror or error}; {advice}"
            ) from None
        yield str(output)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def _base(student: StudentConfig, output: Path) -> str:
    """Where peft finds the base of adapters in ``output``."""
    if student.keep_layers is not None:
        return str(output.resolve() / "base")
    local = Path(student.model).expanduser()
    return str(local.resolve()) if local.exists() else student.model


def student_of(checkpoint: Path) -> tuple[StudentConfig, Any]:
    """The student of a checkpoint as its run file has it, and the identity of its adapters.

    Raises:
        KdflowError: another version of kdflow had other keys, or the model that it began from is not found.
    """
    state = json.loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))
    student = validate_options(StudentConfig, state["run"]["student"], f"{checkpoint / RUN_STATE}: run.student")
    try:
        resolve(student.model)
    except KdflowError as error:
        if Path(student.model).expanduser().is_absolute():
            raise
        raise KdflowError(
            f"{error}\n{checkpoint} names this model as its run did. If it is a path relative to the folder where the "
            "run began, start kdflow there"
        ) from None
    return student, state["adapters"]


def find_checkpoint(run: Path) -> Path:
    """The checkpoint that ``run`` means: itself, or the newest whole one of a run directory.

    Raises:
        KdflowError: there is none, it cannot be read, or it is damaged.
    """
    try:
        run = run.resolve()
        single = (run / RUN_STATE).exists()
    except OSError as error:
        raise KdflowError(f"{run} cannot be read: {error.strerror}; give a run directory or a checkpoint") from None
    if single:
        if damage := verify(run):
            raise KdflowError(f"checkpoint {run} is damaged ({damage})")
        return run
    found, warnings = newest(run / "checkpoints")
    if found is None:
        raise KdflowError(
            "\n".join([f"{run} holds no whole checkpoint; a run writes them to {run}/checkpoints", *warnings])
        )
    return found
