"""The data formats that kdflow reads: ``chat``, ``prompt_response`` and ``text``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kdflow.contracts import DatasetReader, Message, Sample
from kdflow.hookspecs import hookimpl

ROLES = ("system", "user", "assistant", "tool")


class Chat(DatasetReader):
    """``{"messages": [{"role": …, "content": …}, …]}``; each side renders it with its own chat template."""

    name = "chat"

    def read(self, record: Mapping[str, Any]) -> Sample:
        """Turns of the assistant are learnt."""
        turns = _field(record, "messages", list)
        messages = tuple(self._message(turn, number) for number, turn in enumerate(turns, start=1))
        learnt = [message for message in messages if message.learn]
        if not learnt:
            raise ValueError("no turn has the role 'assistant': there is nothing to learn")
        if empty := [message for message in learnt if not message.content.strip()]:
            raise ValueError(f"message {messages.index(empty[0]) + 1}, the assistant's, is empty")
        return Sample(messages=messages)

    def _message(self, turn: Any, number: int) -> Message:
        if not isinstance(turn, Mapping):
            raise ValueError(f"message {number} must be an object with 'role' and 'content', not {turn!r}")
        for name in ("role", "content"):
            if not isinstance(turn.get(name), str):
                raise ValueError(f"message {number}: '{name}' must be text, not {turn.get(name)!r}")
        if turn["role"] not in ROLES:
            raise ValueError(f"message {number}: the role must be one of {', '.join(ROLES)}, not '{turn['role']}'")
        return Message(turn["role"], turn["content"], learn=turn["role"] == "assistant")


class PromptResponse(DatasetReader):
    """``{"prompt": …, "response": …}``, plain text without a template; the response is learnt."""

    name = "prompt_response"

    def read(self, record: Mapping[str, Any]) -> Sample:
        """Prompt and response as they are; end of sequence is appended."""
        prompt, response = _field(record, "prompt", str), _field(record, "response", str)
        if not response:
            raise ValueError("'response' is empty: there is nothing to learn")
        return Sample(prompt=prompt, response=response)


class Text(DatasetReader):
    """``{"text": …}``: every token is learnt."""

    name = "text"

    def read(self, record: Mapping[str, Any]) -> Sample:
        """The whole text as a response to nothing."""
        text = _field(record, "text", str)
        if not text:
            raise ValueError("'text' is empty: there is nothing to learn")
        return Sample(response=text)


def _field(record: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in record:
        raise ValueError(f"the field '{name}' is missing; the record has {', '.join(sorted(record)) or 'no fields'}")
    if not isinstance(record[name], kind):
        expected = "text" if kind is str else "a list"
        raise ValueError(f"'{name}' must be {expected}, not {record[name]!r}")
    return record[name]


@hookimpl
def kdflow_datasets() -> Iterable[type[DatasetReader]]:
    """The formats of this module."""
    return [Chat, PromptResponse, Text]
