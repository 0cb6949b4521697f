"""What plugins and the runtime say to each other: dataclasses and base classes, and no torch at import.

Shapes used throughout: N target tokens of a micro-batch (positions whose *next* token is learnt), H hidden size,
V vocabulary size, T packed tokens, B sequences.
"""

from __future__ import annotations

from kdflow.contracts.algorithms import (
    LEAST_TEMPERATURE,
    NEEDS,
    STEP_FIGURES,
    Algorithm,
    Aligner,
    Alignment,
    Divergence,
    DivergenceOptions,
    LossSum,
)
from kdflow.contracts.data import Batch, DatasetReader, Message, Pair, Sample, TargetAlignment, TokenBatch, Tokens
from kdflow.contracts.engines import (
    Engine,
    EngineContext,
    Lease,
    ModelBytes,
    TeacherEngine,
    Transport,
)
from kdflow.contracts.evaluation import EvaluatedModel, Evaluator, SampleError
from kdflow.contracts.models import Head, ModelSpec, Side
from kdflow.contracts.options import KdflowError, Options, TrainingStopped
from kdflow.contracts.rollouts import Rollout, RolloutEngine, Sampling
from kdflow.contracts.tracking import Tracker, scalars

__all__ = [
    "LEAST_TEMPERATURE",
    "NEEDS",
    "STEP_FIGURES",
    "Algorithm",
    "Aligner",
    "Alignment",
    "Batch",
    "DatasetReader",
    "Divergence",
    "DivergenceOptions",
    "Engine",
    "EngineContext",
    "EvaluatedModel",
    "Evaluator",
    "Head",
    "KdflowError",
    "Lease",
    "LossSum",
    "Message",
    "ModelBytes",
    "ModelSpec",
    "Options",
    "Pair",
    "Rollout",
    "RolloutEngine",
    "Sample",
    "SampleError",
    "Sampling",
    "Side",
    "TargetAlignment",
    "TeacherEngine",
    "TokenBatch",
    "Tokens",
    "Tracker",
    "TrainingStopped",
    "Transport",
    "scalars",
]
