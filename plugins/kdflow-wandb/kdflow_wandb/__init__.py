"""Weights & Biases: a run's curves, the student's text, the run file and the last word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import kdflow
from kdflow.contracts import Tracker, scalars

_RUN_ID = "wandb-run-id"


class WandB(Tracker):
    """Tells a run to Weights & Biases, or offline to ``wandb`` in the run directory, from where it can be sent later.

    A run directory is one run there: its id is kept in ``wandb-run-id``, and a resumed run goes on under it.
    """

    name = "wandb"

    class Options(kdflow.Options):
        """What is null is left to wandb: its environment variable, such as ``WANDB_PROJECT``, or its default."""

        project: str | None = None
        """The project that the run belongs to."""
        entity: str | None = None
        """The user or team that the project belongs to."""
        group: str | None = None
        """Runs of one group are shown together."""
        display_name: str | None = None
        """What the run is called where it is shown."""
        tags: list[str] | None = None
        """Words by which runs are found."""
        mode: Literal["online", "offline"] | None = None
        """Whether to send while training, or to write files that ``wandb sync`` sends."""

    def start(self, directory: Path, run: Mapping[str, Any], first_step: int) -> None:
        """Begin the run, or go on with the one that this run directory already is.

        Raises:
            KdflowError: wandb refuses an option, or nobody is logged in.
        """
        import wandb  # takes a second or more, for which listing plugins need not wait

        kept = directory / _RUN_ID
        options = self.options
        try:
            self._run = wandb.init(
                dir=directory.absolute(), config=dict(run), allow_val_change=True,
                id=kept.read_text(encoding="utf-8").strip() if kept.exists() else None, resume="allow",
                project=options.project, entity=options.entity, group=options.group, name=options.display_name,
                tags=options.tags, mode=options.mode, reinit="create_new",
            )  # fmt: skip
        except (wandb.Error, ValueError) as error:
            told = " ".join(str(error).split()).rstrip(".")
            raise kdflow.KdflowError(
                f"tracker 'wandb' cannot start: {told}. Mend its entry in the run file's tracking, log in with "
                "'wandb login', or do without an account by mode: offline"
            ) from None
        kept.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._over = False
        # Charts count the steps of the run, not wandb's own calls.
        for chart in ("train", "eval"):
            self._run.define_metric(f"{chart}/*", step_metric="step")

    def event(self, event: Mapping[str, Any]) -> None:
        """Send one event; checkpoints and the like are left out."""
        import wandb

        kind = event["event"]
        if kind in ("step", "eval"):
            chart = "train" if kind == "step" else "eval"
            told = {f"{chart}/{name}": value for name, value in scalars(event).items()}
            self._run.log({"step": event["step"], **told})
        elif kind == "sample":
            table = wandb.Table(["step", "prompt", "text"], [[event["step"], event["prompt"], event["text"]]])
            self._run.log({"step": event["step"], "sample": table})
        elif kind == "end":
            self._run.summary.update(scalars(event))
            self._over = True

    def close(self) -> None:
        """Send what is left; a run that has not come to its end is marked as failed."""
        self._run.finish(exit_code=0 if self._over else 1)


@kdflow.hookimpl
def kdflow_trackers() -> Iterable[type[Tracker]]:
    """The tracker of this package."""
    return [WandB]
