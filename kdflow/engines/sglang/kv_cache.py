"""How many tokens an engine keeps keys and values of, and how many a response needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KVCache:
    """What SGLang has made of the memory that it was given: plain data.

    Attributes:
        tokens: that there is room for, of all requests together.
        page: tokens that are given out at a time.
    """

    tokens: int
    page: int

    @classmethod
    def of(cls, engine: Any) -> KVCache | None:
        """That of a ``sglang.Engine``; None where its version does not tell."""
        try:
            told = engine.get_server_info()
            return cls(int(told["max_total_num_tokens"]), int(told["page_size"]))
        except Exception:  # it is asked for the sake of an error's words: no engine that works ends of it
            return None

    def needed(self, prompt: int, new: int) -> int:
        """Tokens that a cache must have for ``new`` ones after a prompt of so many.

        With fewer, SGLang shortens the response and does not say so (``Scheduler.init_req_max_new_tokens``): it keeps
        a page and a token free. A prompt must leave seven free, whatever is to follow (``validate_input_length``).
        """
        pages = -(-prompt // self.page) * self.page
        return max(pages + new + self.page + 1, prompt + 7)
