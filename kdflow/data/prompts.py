"""Prompts that a model is to answer, and the records that its answers become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kdflow.contracts import Sample
from kdflow.data.formats import Chat, ChatOptions

_CHAT = Chat(ChatOptions(turns="last"))


@dataclass(frozen=True)
class Prompt:
    """What a record asks, with the record itself: its other fields are carried over.

    Attributes:
        sample: a conversation without the assistant's last turn, or a prompt.
        record: as it was read.
        answer: the right answer, if the record has one.
    """

    sample: Sample
    record: Mapping[str, Any]
    answer: str | None

    def answered(self, text: str) -> dict[str, Any]:
        """The record with a response, as the formats ``chat`` and ``prompt_response`` read it."""
        if not self.sample.messages:
            return {**self.record, "response": text}
        turns = self.record["messages"][: len(self.sample.messages)]
        return {**self.record, "messages": [*turns, {"role": "assistant", "content": text}]}


def read_prompt(record: Mapping[str, Any]) -> Prompt:
    """Read a record that has ``messages`` or else ``prompt``, and maybe ``answer``.

    An assistant's turn at the end of ``messages`` is left out: it is what is to be written anew.

    Raises:
        ValueError: it has neither, or asks nothing.
    """
    if "messages" in record:
        return Prompt(_conversation(record), record, _answer(record))
    if "prompt" not in record:
        has = ", ".join(sorted(record)) or "no fields"
        raise ValueError(f"a prompt needs the field 'messages' or 'prompt'; the record has {has}")
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"'prompt' must be text that is not empty, not {prompt!r}")
    return Prompt(Sample(prompt=prompt), record, _answer(record))


def _conversation(record: Mapping[str, Any]) -> Sample:
    turns = record["messages"]
    if isinstance(turns, list):
        if turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant":
            turns = turns[:-1]
        if not turns:
            raise ValueError("'messages' has no turn for the assistant to answer")
        turns = [*turns, {"role": "assistant", "content": "…"}]
    sample = _CHAT.read({**record, "messages": turns})
    return Sample(messages=sample.messages[:-1], tools=sample.tools)


def _answer(record: Mapping[str, Any]) -> str | None:
    answer = record.get("answer")
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(f"'answer' must be text or a number, not {answer!r}")
    # Responses write 0.00005, and Python 5e-05.
    return format(Decimal(str(answer)), "f") if isinstance(answer, float) else str(answer)
