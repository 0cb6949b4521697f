"""Samples as text → the tokens of one side, rendered with its own tokenizer and template."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from kdflow.contracts import KdflowError, Message, Sample, Tokens
from kdflow.tokenizers.huggingface import from_transformers
from kdflow.tokenizers.tokenizer import Tokenizer

_MARK = "kdflow-response"  # stands where a response would, to see what a chat template writes after it
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # how sentencepiece writes a byte that no piece of its covers


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens that is learnt, or only read; the first ``content`` of those learnt spell ``text``."""

    ids: list[int]
    learn: bool
    text: str = ""
    content: int = 0


class SideTokenizer:
    """Renders samples for one model.

    Context and responses are encoded apart, as they are when the model writes: a response's tokens never depend on the
    template before it. Text of a response that looks like a special token stays text.
    """

    def __init__(self, tokenizer: Any, owner: str) -> None:
        self.tokenizer, self.owner = tokenizer, owner
        self.eos: int | None = tokenizer.eos_token_id
        probe = tokenizer.encode("a", add_special_tokens=True)
        bare = tokenizer.encode("a", add_special_tokens=False)
        # What the tokenizer itself puts before a text, <bos> for most that put anything; what it puts after is not
        # taken over, since every response here ends with the end-of-sequence token exactly once.
        self.prefix: list[int] = probe[: probe.index(bare[0])] if bare and bare[0] in probe else []
        added = tokenizer.added_tokens_decoder
        self.special = {self.eos, *(index for index, token in added.items() if token.special)}
        # Byte-level tokenizers write a byte as one character, and so é as two, Ã and ©.
        self._byte_level = "Ã" in "".join(tokenizer.convert_ids_to_tokens(self.encode("é")))
        self._ends: dict[bool, int | None] = {}

    def owned_by(self, owner: str) -> SideTokenizer:
        """The same for another model, which has the same tokenizer; what its tokens stand for is found out once."""
        other = copy.copy(self)
        other.owner, other.bytes_of = owner, self.bytes_of
        return other

    @cached_property
    def bytes_of(self) -> Tokenizer:
        """The same tokenizer, which tells the bytes that its tokens stand for.

        Raises:
            KdflowError: they are not known.
        """
        return from_transformers(self.tokenizer)

    @property
    def key(self) -> str:
        """A hash of vocabulary, merges, special tokens and chat template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = [
            backend.to_str() if backend is not None else str(sorted(self.tokenizer.get_vocab().items())),
            type(self.tokenizer).__name__, str(self.tokenizer.special_tokens_map), str(self.tokenizer.chat_template),
            str(self.prefix), str(self.eos),
        ]  # fmt: skip
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def render(self, sample: Sample) -> list[Segment]:
        """The segments of a sample.

        Raises:
            ValueError: it holds nothing to learn, or the chat template cannot render it.
        """
        segments = self._chat(sample) if sample.messages else self._plain(sample)
        if not any(segment.ids for segment in segments if segment.learn):
            raise ValueError(f"no tokens to learn with the tokenizer of the {self.owner}")
        return segments

    def prompt(self, sample: Sample) -> list[int]:
        """Ids up to where a model writes the response, of a sample whose last turn is not the assistant's.

        Raises:
            ValueError: the chat template cannot render it.
        """
        if not sample.messages:
            return self._context(sample)
        self._require_place_for_tools(sample)
        return self.encode(self._template(sample, sample.messages, add_generation_prompt=True), special=True)

    def stop_ids(self, sample: Sample) -> tuple[int, ...]:
        """Ids that end a response to such a sample: the end of the sequence, and what the template ends a turn with."""
        ends = [] if self.eos is None else [self.eos]
        if sample.messages:
            whole = self._template(sample, [*sample.messages, Message("assistant", _MARK)])
            ending = self.encode(whole.rpartition(_MARK)[2], special=True)
            ends += [token for token in ending if token in self.special][:1]
        return tuple(ends)

    def end(self, chat: bool) -> int | None:
        """The id that ends a response, of a turn of a conversation or of a text."""
        if chat not in self._ends:  # asked of every response that a student writes
            ends = self.stop_ids(Sample((Message("user", _MARK),)) if chat else Sample())
            self._ends[chat] = ends[-1] if ends else None
        return self._ends[chat]

    def _context(self, sample: Sample) -> list[int]:
        return self.prefix + (self.encode(sample.prompt) if sample.prompt else [])

    def _plain(self, sample: Sample) -> list[Segment]:
        context = self._context(sample)
        response = self.encode(sample.response)
        ending = [] if self.eos is None or sample.unfinished else [self.eos]
        return [Segment(context, False), Segment(response + ending, True, sample.response, len(response))]

    def _chat(self, sample: Sample) -> list[Segment]:
        messages, segments, done, before, before_ids = sample.messages, [], "", "", list[int]()
        self._require_place_for_tools(sample)
        for index, message in enumerate(messages):
            if not message.learn:
                continue
            whole = self._template(sample, messages[: index + 1])
            start, after, own_way = self._place(sample, index, whole)
            if not message.content.strip() and not own_way:
                raise ValueError(f"turn {index + 1}, the {message.role}'s, is empty")
            if start is None or not whole.startswith(done):
                raise ValueError(
                    f"the chat template of the {self.owner} rewrites turn {index + 1} or a turn before it, so that the "
                    "tokens to learn cannot be told apart; learn the last turn alone (turns: last), use a template "
                    "that only appends, or the format prompt_response"
                )
            content = whole[start : len(whole) - len(after)]
            context = self._following(before, before_ids, whole[len(done) : self._asked(sample, index, whole, start)])
            ending = after_ids = self.encode(after, special=True)
            # The turn ends with its first special token; where the template writes none, with the end of the sequence.
            learnt = next((at for at, token in enumerate(ending, start=1) if token in self.special), 0)
            if learnt == 0 and self.eos is not None:
                ending, learnt = [self.eos, *ending], 1
            if sample.unfinished and index == len(messages) - 1:
                ending, learnt = [], 0
            ids = self.encode(content, special=own_way)
            segments += [
                Segment(context, False),
                Segment(ids + ending[:learnt], True, content, len(ids)),
                Segment(ending[learnt:], False),
            ]
            done, before, before_ids = whole, after, after_ids
        return segments

    def _place(self, sample: Sample, index: int, whole: str) -> tuple[int | None, str, bool]:
        """Where in ``whole`` the content of turn ``index``, its last, begins, and the text that follows it.

        The last value says whether the template writes more of the turn than its content, as it does calls of tools.
        """
        message, earlier = sample.messages[index], sample.messages[:index]
        before, _, after = self._template(sample, [*earlier, Message(message.role, _MARK)]).rpartition(_MARK)
        if message.extra:
            bare = before + message.content + after
            if message.content.strip():  # else the template may refuse it without a call
                bare = self._template(sample, [*earlier, replace(message, extra={})])
            if whole not in (bare, before + after):
                before = self._template(sample, earlier, add_generation_prompt=True)
                fits = whole.startswith(before) and whole.endswith(after)
                return (len(before) if fits else None), after, True
        contents = (message.content, message.content.strip())
        starts = [len(whole) - len(text + after) for text in contents if whole.endswith(text + after)]
        # A newline that ends the header is none of the answer's, which the template may have stripped of its own; but
        # headers may depend on the answer, as where it begins with a thought.
        least = len(before) if whole.startswith(before) else 0
        behind = (start for start in starts if start >= least)
        return next(behind, starts[-1] if starts else None), after, False

    def _asked(self, sample: Sample, index: int, whole: str, start: int) -> int:
        """Where the prompt ends that a model answers with turn ``index``: before spaces that follow it there.

        Templates such as Llama 2's put one before an answer that the prompt does not end with.
        """
        if index == 0 or sample.messages[index].role != "assistant" or not whole[:start].endswith(" "):
            return start
        prompt = self._template(sample, sample.messages[:index], add_generation_prompt=True)
        return len(prompt) if whole[:start].rstrip(" ") == prompt.rstrip(" ") else start

    def _following(self, before: str, before_ids: list[int], text: str) -> list[int]:
        """Ids of a text that follows another, ``before_ids``: alone, some tokenizers would put a space before it."""
        if not before:
            return self.encode(text, special=True)
        both = self.encode(before + text, special=True)
        return both[len(before_ids) :] if both[: len(before_ids)] == before_ids else self.encode(text, special=True)

    def _require_place_for_tools(self, sample: Sample) -> None:
        """A template that has no place for tools leaves them out without a word."""
        tools = [index for index, message in enumerate(sample.messages) if message.role == "tool"]
        marked = list(sample.messages)
        for index in tools:  # what a tool said may be written in another way, as JSON escapes it
            marked[index] = replace(marked[index], content=f"{_MARK}-{index}-")
        whole = self._template(sample, marked) if tools or sample.tools else ""
        if any(marked[index].content not in whole for index in tools):
            raise ValueError(f"the chat template of the {self.owner} has no place for messages of the role 'tool'")
        if sample.tools and whole == self._template(Sample(sample.messages), marked):
            raise ValueError(f"the chat template of the {self.owner} has no place for 'tools'")

    def _template(self, sample: Sample, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise KdflowError(
                f"the format 'chat' needs a chat template, and the tokenizer of the {self.owner} "
                f"({self.tokenizer.name_or_path}) has none; use a model with a template, or the format prompt_response"
            )
        turns = [{"role": message.role, "content": message.content, **message.extra} for message in messages]
        tools = [dict(tool) for tool in sample.tools] or None
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the chat template of the {self.owner} refuses the conversation: {error}") from None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, nothing added; what looks like a special token is one only if ``special``."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special))

    def tokens(self, segments: Sequence[Segment]) -> Tokens:
        """Join segments. The first token of all has no position that predicts it, so it is no target."""
        ids: list[int] = []
        targets: list[int] = []
        response: list[int] = []
        text_bytes = number = 0
        for segment in segments:
            if segment.learn and segment.ids:
                first = max(len(ids), 1)
                positions = range(first - 1, len(ids) + len(segment.ids) - 1)
                targets += positions
                response += [number] * len(positions)
                text_bytes += len(segment.text.encode())
                if not ids:
                    text_bytes -= self._bytes(segment.ids[:1])
                number += 1
            ids += segment.ids
        return Tokens(_int64(ids), _int64(targets), _int64(response), max(text_bytes, 0))

    def truncate(self, tokens: Tokens, length: int) -> Tokens:
        """The first ``length`` ids, and the targets whose next token is among them."""
        kept = tokens.targets < length - 1
        text_bytes = tokens.text_bytes - self._bytes(tokens.ids[tokens.targets[~kept] + 1].tolist())
        return Tokens(tokens.ids[:length], tokens.targets[kept], tokens.response[kept], max(text_bytes, 0))

    def _bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes that tokens spell, which may begin or end inside a character; special tokens spell none."""
        known = self.tokenizer.convert_ids_to_tokens([index for index in ids if index not in self.special])
        tokens = [token for token in known if token is not None]  # ids may have gaps, and be drawn all the same
        if self._byte_level:
            return sum(map(len, tokens))
        return sum(1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace("▁", " ").encode()) for token in tokens)


def _int64(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)
