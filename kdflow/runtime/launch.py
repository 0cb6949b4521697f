"""Several ranks on one machine, by torch's elastic agent."""

from __future__ import annotations

import logging
import os
import uuid

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(processes: int, command: list[str]) -> int:
    """Run ``command`` as ``processes`` ranks and wait; returns 0, or the exit code of the first rank that failed.

    Everything stays on the loopback interface.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Ranks share the cores; more threads than cores make every one of them slower.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", logs_specs=DefaultLogsSpecs(),
    )  # fmt: skip
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks speak for themselves
    try:
        elastic_launch(config, entrypoint=command[0])(*command[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0
