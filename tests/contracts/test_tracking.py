"""What trackers make of an event."""

from __future__ import annotations

import math

from kdflow.contracts import scalars


def test_the_numbers_of_an_event() -> None:
    event = {
        "event": "step", "step": 3, "loss": 1.5, "tokens": 7, "phases": {"data": 0.25, "deep": {"er": 1}},
        "samples": "a1",
    }  # fmt: skip
    assert scalars(event) == {"loss": 1.5, "tokens": 7, "phases/data": 0.25, "phases/deep/er": 1}


def test_what_is_no_number_is_left_out_and_what_is_infinite_stays() -> None:
    event = {
        "event": "eval",
        "divergence": None,
        "perplexity": math.inf,
        "done": True,
        "ids": [1, 2],
        "parts": {"a": None},
    }
    assert scalars(event) == {"perplexity": math.inf}
