"""The data formats that kdflow reads: ``chat``, ``prompt_response`` and ``text``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import pydantic

from kdflow.contracts import DatasetReader, Message, Options, Sample
from kdflow.hookspecs import hookimpl

ROLES = ("system", "user", "assistant", "tool")


class ChatOptions(Options):
    """Options of :class:`Chat`."""

    system: str | None = None
    """A system prompt for conversations that begin with none."""
    learn: list[str] = pydantic.Field(default=["assistant"], min_length=1)
    """Roles whose turns are learnt."""
    turns: Literal["all", "last"] = "all"
    """Which of them: each, or the last alone, for templates that rewrite earlier turns (they drop thoughts, say)."""

    @pydantic.field_validator("learn")
    @classmethod
    def _are_roles(cls, value: list[str]) -> list[str]:
        if unknown := sorted(set(value) - set(ROLES)):
            raise ValueError(f"roles are {', '.join(ROLES)}, not {', '.join(unknown)}")
        return value


class Chat(DatasetReader):
    """``{"messages": [{"role": …, "content": …}, …]}``; each side renders it with its own chat template.

    A turn may have ``tool_calls``, and the record ``tools``, which templates that know tools write. A record's
    ``teacher_prompt`` is the system prompt that the teacher alone sees (context distillation, arXiv 2209.15189). Where
    its ``finish`` is ``length``, as ``kdflow generate`` says of answers that were cut off, the last turn has no end.
    """

    name = "chat"
    Options = ChatOptions

    def read(self, record: Mapping[str, Any]) -> Sample:
        """By default the turns of the assistant are learnt."""
        turns = _field(record, "messages", list)
        messages = [self._message(turn, number) for number, turn in enumerate(turns, start=1)]
        learnt = [index for index, message in enumerate(messages) if message.role in self.options.learn]
        if not learnt:
            roles = " or ".join(f"'{role}'" for role in self.options.learn)
            raise ValueError(f"no turn has the role {roles}: there is nothing to learn")
        if self.options.turns == "last":
            learnt = learnt[-1:]
        for index in learnt:
            if not messages[index].content.strip() and not messages[index].extra:
                raise ValueError(f"message {index + 1}, the {messages[index].role}'s, is empty")
            messages[index] = replace(messages[index], learn=True)
        if self.options.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", self.options.system))
        tools = record.get("tools") or []
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise ValueError("'tools' must be a list of JSON schemas")
        return Sample(
            messages=tuple(messages), tools=tuple(tools), teacher_prompt=read_teacher_prompt(record),
            unfinished=messages[-1].learn and _unfinished(record),
        )  # fmt: skip

    def _message(self, turn: Any, number: int) -> Message:
        if not isinstance(turn, Mapping):
            raise ValueError(f"message {number} must be an object with 'role' and 'content', not {turn!r:.80}")
        # Tables give every turn every field, None or an empty list where it has none.
        extra = {key: value for key, value in turn.items()
                 if key not in ("role", "content") and value is not None and value != []}  # fmt: skip
        content = turn.get("content")
        if content is None and extra.get("tool_calls"):
            content = ""
        for name, value in (("role", turn.get("role")), ("content", content)):
            if not isinstance(value, str):
                raise ValueError(f"message {number}: '{name}' must be text, not {value!r:.80}")
        if turn["role"] not in ROLES:
            raise ValueError(f"message {number}: the role must be one of {', '.join(ROLES)}, not '{turn['role']}'")
        return Message(turn["role"], str(content), extra=extra)


class PromptResponse(DatasetReader):
    """``{"prompt": …, "response": …}``, plain text without a template; the response is learnt.

    A record's ``teacher_prompt`` is what the teacher sees in the place of ``prompt``. Where its ``finish`` is
    ``length``, as ``kdflow generate`` says of responses that were cut off, no end of sequence is appended.
    """

    name = "prompt_response"

    def read(self, record: Mapping[str, Any]) -> Sample:
        """Prompt and response as they are; end of sequence is appended."""
        prompt, response = _field(record, "prompt", str), _field(record, "response", str)
        if not response:
            raise ValueError("'response' is empty: there is nothing to learn")
        return Sample(
            prompt=prompt, response=response, teacher_prompt=read_teacher_prompt(record), unfinished=_unfinished(record)
        )


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
        has = ", ".join(sorted(record)) or "no fields"
        raise ValueError(
            f"the field '{name}' is missing; the record has {has}. If another one holds it, name it in the source: "
            f"fields: {{{name}: …}}"
        )
    if not isinstance(record[name], kind):
        expected = "text" if kind is str else "a list"
        raise ValueError(f"'{name}' must be {expected}, not {record[name]!r:.80}")
    return record[name]


def read_teacher_prompt(record: Mapping[str, Any]) -> str | None:
    """The field of this name, which tables have empty where a record has none.

    Raises:
        ValueError: it is no text.
    """
    return None if record.get("teacher_prompt") is None else _field(record, "teacher_prompt", str)


def _unfinished(record: Mapping[str, Any]) -> bool:
    """Whether ``kdflow generate`` cut the response off."""
    return record.get("finish") == "length"


@hookimpl
def kdflow_datasets() -> Iterable[type[DatasetReader]]:
    """The formats of this module."""
    return [Chat, PromptResponse, Text]
