"""The engine's process: ``python -m kdflow.engines.sglang.server CONNECTION LIFE PARENT FOLDER``.

The first two are inherited descriptors, then come the process that started it and the folder of temporary files.

It reads messages and answers each, until its connection ends. It watches the process that started it, and the engine's
own: once one is gone, however it went, it ends every process of the engine and takes their files away. Schedulers are
spawned, and so import this module again: nothing happens on import.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from kdflow.engines.sglang.kv_cache import KVCache
from kdflow.engines.sglang.process_group import end, held_files, schedulers, shared_files
from kdflow.engines.sglang.slots import TokenIds
from kdflow.engines.sglang.weights import LOADER, Bucket
from kdflow.imports import large_imports

# With one new token, SGLang begins to decode a second one before it knows that the first was the last.
_NO_NEW_TOKEN = {"temperature": 0.0, "max_new_tokens": 0}
_GREEDY = {"temperature": 0.0, "max_new_tokens": 1}
_LIKELIEST = 8


def main() -> None:
    """Serve until the connection ends, and then wait to be ended."""
    descriptor, life, parent = map(int, sys.argv[1:4])
    for one in (descriptor, life):
        os.set_inheritable(one, False)
    connection: Connection[Any, Any] = Connection(descriptor)
    children, held = list[int](), set[str]()
    watched = (life, parent, sys.argv[4], shared_files(), children, held)
    watch = threading.Thread(target=_watch, args=watched, daemon=True)
    watch.start()
    try:
        _start_and_serve(connection, children, held)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    connection.close()
    # Whoever started this process is gone, or ends it now that the connection has ended. If it ended by itself, the
    # thread that watches would not come to take the files away, and SGLang would kill its children before theirs are
    # known.
    watch.join()


def _start_and_serve(connection: Connection[Any, Any], children: list[int], held: set[str]) -> None:
    """Start an engine with the arguments that come first, and answer; notes its children and what they hold."""
    arguments = connection.recv()
    with large_imports():
        import sglang

        make = sglang.Engine  # imported when it is asked for
    try:
        engine = make(**arguments)
    except RuntimeError as error:  # its trace says less than what the scheduler printed just before
        print(f"RuntimeError: {error}", file=sys.stderr)
        return
    held |= held_files(os.getpgid(0))  # what a process holds cannot be told once it has been killed
    children += [child.sentinel for child in multiprocessing.active_children()]
    # With data_parallel, schedulers are another's children. A kernel before 5.3 tells of no others than one's own.
    with contextlib.suppress(OSError):
        children += [os.pidfd_open(process) for process in schedulers(os.getpgid(0))]
    connection.send(("done", (str(sglang.__version__), KVCache.of(engine))))
    _serve(engine, connection)


def _serve(engine: Any, connection: Connection[Any, Any]) -> None:
    """Answer until the connection ends."""
    while True:
        try:
            kind, *values = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = "done", _ANSWERS[kind](engine, *values)
        except ValueError as error:  # SGLang's word for a request that it cannot take
            answer = "refused", str(error)
        try:
            connection.send(answer)
        except OSError:
            return


def _prefill(engine: Any, sequences: list[TokenIds], rids: list[str]) -> None:
    # The answer comes after the hook's copies: SGLang waits for one that is queued behind them, also of no new token.
    engine.generate(input_ids=[ids.read() for ids in sequences], sampling_params=_NO_NEW_TOKEN, rid=rids)


def _log_probabilities(engine: Any, ids: TokenIds, rid: str) -> list[tuple[int, int, float]]:
    """``(row, id, log-probability)`` of the next token after each but the last, and of the likeliest ones."""
    answer = engine.generate(
        input_ids=[ids.read()], sampling_params=_GREEDY, rid=[rid], return_logprob=True, logprob_start_len=0,
        top_logprobs_num=_LIKELIEST,
    )[0]["meta_info"]  # fmt: skip
    found = []
    both = zip(answer["input_token_logprobs"][1:], answer["input_top_logprobs"][1:], strict=True)
    for row, (own, likeliest) in enumerate(both):
        found += [(row, int(token), float(value)) for value, token, *_ in (own, *likeliest)]
    return found


def _generate(
    engine: Any, input_ids: list[list[int]], parameters: list[dict[str, Any]]
) -> list[tuple[list[int], list[float], str]]:
    """Ids, their log-probabilities, and how each response ended: ``stop`` or ``length``."""
    answers = engine.generate(input_ids=input_ids, sampling_params=parameters, return_logprob=True)
    found = []
    for answer in answers:
        reason = answer["meta_info"]["finish_reason"]
        if reason["type"] not in ("stop", "length"):
            raise ValueError(f"a response ended by '{reason['type']}': {reason.get('message')}")
        told = answer["meta_info"]["output_token_logprobs"]
        found.append(([int(token) for _, token, *_ in told], [float(value) for value, *_ in told], str(reason["type"])))
    return found


def _update_weights(engine: Any, buckets: list[Bucket], first: bool, last: bool) -> None:
    """Load buckets, of which the first and the last of all weights may be among them; the schedulers open them."""
    has_sessions = hasattr(engine, "begin_weight_update")  # since 0.5.18 or so
    if first:
        _settle(engine)
        if has_sessions:
            engine.begin_weight_update()
    for bucket in buckets:
        done, message = engine.update_weights_from_tensor(
            [("kdflow", bucket.told())], load_format=LOADER, flush_cache=False
        )
        if not done:
            raise ValueError(f"new weights: {message}")
    if last and has_sessions:
        engine.end_weight_update()


def _settle(engine: Any) -> None:
    """Wait until no request runs, and forget what is cached: its weights will change, or go. None comes meanwhile."""
    deadline = time.monotonic() + 60
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise ValueError("requests are still running after 60 s")
        time.sleep(0.01)


def _sleep(engine: Any) -> None:
    _settle(engine)
    engine.release_memory_occupation()


def _wake(engine: Any) -> None:
    engine.resume_memory_occupation()


_ANSWERS: dict[str, Callable[..., Any]] = {
    "prefill": _prefill,
    "log_probabilities": _log_probabilities,
    "generate": _generate,
    "update_weights": _update_weights,
    "sleep": _sleep,
    "wake": _wake,
}


def _watch(
    life: int, parent: int, folder: str, known: set[str], children: list[int], held: set[str]
) -> None:  # fmt: skip
    """Wait for the end of the process that started this one, or of one of the engine's; then end them all.

    The end of the pipe of the first closes, or this process is another's child. SGLang looks after the others, but with
    a signal to itself, which does not always interrupt what it waits for: the answer of the process that is gone.
    """
    while os.getppid() == parent:
        if select.select([life, *children], [], [], 1.0)[0]:
            break
    end(os.getpgid(0), folder, known, held, patience=5.0)
    os._exit(1)


if __name__ == "__main__":
    main()
