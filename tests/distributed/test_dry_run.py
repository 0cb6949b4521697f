"""One rank of 64, whose collectives do nothing: the mesh is built, the student sharded, and its memory as planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdflow.runtime.check import check

RunFile = Callable[..., dict[str, Any]]
RANKS, TOKENS = 64, 512

STEP = """
import json, sys
from pathlib import Path

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from kdflow.data.packing import collate, pack
from kdflow.data.steps import open_steps
from kdflow.runtime.processes import Processes
from kdflow.runtime.prepare import make_algorithm, prepare
from kdflow.runtime.student import Student
from kdflow.runtime.tokenizers import open_tokenizers
from tests.support.live import Live

file, ranks = sys.argv[1], int(sys.argv[2])
dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
new_group = dist.new_group
dist.new_group = lambda *a, **k: new_group(*a, **{**k, "backend": "fake"})
config, plugins = prepare(Path(file), (), ())
processes, algorithm = Processes(config.training.replicas), make_algorithm(config, plugins)
tokenize, _ = open_tokenizers(config, plugins, algorithm)
drawn = open_steps(config, plugins, tokenize)[0].draw()
batches = [collate(pairs, False) for pairs in pack(list(drawn.pairs), config.data.max_tokens)[:3]]
student = Student(config.student, config.training, algorithm, tokenize.student.bytes_of, None, None, processes)
with Live() as live:
    for number, batch in enumerate(batches, start=1):
        student.backward(batch, lambda: None, drawn.target_tokens, number == len(batches))
    student.clip()
    student.step(1.0)
local = [(one.to_local().nbytes, one.numel()) for _, one in student.named_parameters()]
print(json.dumps({"mesh": list(processes.mesh.shape), "peak": live.peak, "shards": sum(one for one, _ in local),
                  "parameters": sum(count for _, count in local)}))
"""


@pytest.mark.parametrize("replicas", [1, 8])
def test_sixty_four_ranks(run_file: RunFile, tmp_path: Path, replicas: int) -> None:
    from tests.runtime.test_memory import HIDDEN, VOCAB
    from tests.support.models import make_model, make_tokenizer, texts, write_jsonl

    student = make_model(
        tmp_path / "student", hidden=HIDDEN, layers=4, seed=0, tokenizer=make_tokenizer(), padding=VOCAB
    )
    text = " ".join(texts())
    records = [{"text": text[start : start + 4000]} for start in range(0, 20000, 4000)]
    data = {"train": [{"path": write_jsonl(tmp_path / "long.jsonl", records), "format": "text"}], "eval": [],
            "max_length": TOKENS, "max_tokens": TOKENS}  # fmt: skip
    training = {"tokens_per_step": 3 * TOKENS * RANKS, "dtype": "bfloat16", "head_chunk": 64, "replicas": replicas}
    run = run_file(student={"model": student}, teacher=None, algorithm={"name": "sft"}, data=data, training=training)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    command = [sys.executable, "-c", STEP, str(file), str(RANKS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mesh"] == ([RANKS] if replicas == 1 else [replicas, RANKS // replicas])
    assert found["shards"] == pytest.approx(4 * found["parameters"] * replicas / RANKS, rel=0.02)
    planned = check(file, [], (), RANKS)["memory"]["bytes"]
    assert planned["total"] == pytest.approx(found["peak"], rel=0.1)
