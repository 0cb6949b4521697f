"""``kdflow quickstart``."""

from __future__ import annotations

import shutil
from pathlib import Path

import typer

from kdflow.cli import app

RUN_FILE = Path("examples/quickstart.yaml")


@app.command()
def quickstart(ctx: typer.Context) -> None:
    """Distil a real small model on the CPU, in a few minutes: examples/quickstart.yaml, yours to edit afterwards."""
    if not RUN_FILE.exists():
        _write_examples()
    from kdflow.cli.train import start

    start(str(RUN_FILE), [], True, ctx.obj)


def _write_examples() -> None:
    """Put the run file and its text here; an installed kdflow carries them, a checkout has them already."""
    import kdflow

    package = Path(kdflow.__file__).parent
    source = next(path for path in (package / "examples", package.parent / "examples") if path.is_dir())
    shutil.copytree(source, RUN_FILE.parent, dirs_exist_ok=True, copy_function=_copy_new)
    print(f"wrote {RUN_FILE} and its data: edit it and run 'kdflow train {RUN_FILE}'")


def _copy_new(source: str, target: str) -> None:
    """Copy a file, unless there is one already: it is the user's."""
    if not Path(target).exists():
        shutil.copyfile(source, target)
