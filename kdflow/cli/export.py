"""``kdflow export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdflow.cli import app
from kdflow.contracts import KdflowError
from kdflow.imports import large_imports


class Dtype(StrEnum):
    """What the exported weights are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or one checkpoint in it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.")],
    dtype: Annotated[
        Dtype, typer.Option(help="float32 is exactly what was trained; bfloat16 is half the size.")
    ] = Dtype.float32,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The adapter of student.lora alone, which peft loads; else it is merged.")
    ] = False,
) -> None:
    """Write a trained student as a Hugging Face directory."""
    with large_imports():
        from kdflow.runtime.export import export as export_run

    try:
        checkpoint = export_run(run, output, dtype.value, adapter)
    except OSError as error:
        raise KdflowError(
            f"{run} cannot be exported to {output}: {error.strerror or error}; give another output"
        ) from None
    print(f"{output}: the {'adapter' if adapter else 'student'} of {checkpoint}, in {dtype.value}")
