"""``kdflow quickstart``."""

from __future__ import annotations

import shutil
from pathlib import Path

import typer

from kdflow.cli import app
from kdflow.contracts import KdflowError

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
    try:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target = RUN_FILE.parent / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # else it is the user's
                shutil.copyfile(file, target)
    except OSError as error:
        raise KdflowError(
            f"{error.filename} cannot be written: {error.strerror}; run kdflow quickstart in another folder"
        ) from None
    print(f"wrote {RUN_FILE} and its data: edit it and run 'kdflow train {RUN_FILE}'")
