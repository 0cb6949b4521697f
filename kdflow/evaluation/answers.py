r"""Whether a response gives the right answer: its final answer, compared as a number or as text.

A final answer stands in the last ``\boxed{…}``; else behind the last ``####``, as in GSM8K (arXiv 2110.14168); else it
is the last line that is not empty. Where the right answer is a number, the last number of that place counts, and of a
response that marks no answer the last number of all: "42, or perhaps 43" answers 43. Nothing else is judged.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_BOXED, _MARK = r"\boxed{", "####"
# A minus belongs to the number unless something stands before it: 7-4 ends in 4, "x = -4" in -4.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])-)?(?:\d+ (?=\d+/\d))?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?"
)
_LEAD = re.compile(r"(?:(?:so|thus|therefore|hence),? )?(?:the )?(?:(?:final|correct) )?answer(?: is\b:?|:| =) *")
# 10² is 10^2, which is no number here: neither 10 nor 102.
_POWER = re.compile(r"(?<=\d)[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
# A fraction right behind a whole number is added to it: 2½ and 2\frac{1}{2} are 2 1/2, not 21/2.
_MIXED = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞]|\\[dt]?frac\{)")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}")
_DECORATION = re.compile(r"\\[()\[\],;! ]|[$*`\"“”]|\\%|%")


def is_correct(response: str, answer: str) -> bool:
    """Whether the final answer of ``response`` is that of ``answer``, which may be a worked solution itself.

    Numbers are compared by value, without currency or percent signs: 0.50 is 1/2, and 1,000 is $1000. Text is compared
    without case, surrounding space, markup, a final full stop and a lead such as "The answer is".
    """
    response, answer = (
        _POWER.sub(lambda power: f"^{unicodedata.normalize('NFKC', power[0])}", text) for text in (response, answer)
    )
    expected, _ = _final(_level(answer))
    number = _value(expected) if _NUMBER.fullmatch(expected) else None
    if number is None:
        return _final(response)[0] == _final(answer)[0]
    response = _level(response)
    found, marked = _final(response)
    numbers = _NUMBER.findall(found if marked else _plain(response))
    return bool(numbers) and _value(numbers[-1]) == number


def _final(text: str) -> tuple[str, bool]:
    """The final answer in plain form, and whether the text marks it as such."""
    if (start := text.rfind(_BOXED)) >= 0:
        return _plain(_braced(text[start + len(_BOXED) :])), True
    _, mark, behind = text.rpartition(_MARK)
    lines = [line for line in (behind if mark else text).splitlines() if line.strip()]
    if not lines:
        return "", bool(mark)
    return (_plain(lines[0]), True) if mark else (_LEAD.sub("", _plain(lines[-1]), count=1), False)


def _braced(text: str) -> str:
    """``text`` up to the brace that closes it; all of it where none does."""
    depth = 1
    for at, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:at]
    return text


def _level(text: str) -> str:
    """``text`` without what is raised or lowered, ㎡ included: the number of 25 cm² is 25."""
    return "".join(c for c in text if not unicodedata.decomposition(c).startswith(("<super>", "<sub>", "<square>")))


def _plain(text: str) -> str:
    text = _MIXED.sub(" ", text.replace("{,}", ","))
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/")
    text = _FRACTION.sub(r"\1/\2", _WRAPPED.sub(r"\1", text))
    return " ".join(_DECORATION.sub("", text).casefold().split()).strip("€£' ").rstrip(".,;:!?' ")


def _value(number: str) -> Fraction | None:
    """None for a division by zero, and for more digits than Python reads, which a model that repeats itself writes."""
    whole, _, share = number.removeprefix("-").replace(",", "").rpartition(" ")
    above, _, below = share.partition("/")
    try:
        value = Fraction(whole or 0) + Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return -value if number.startswith("-") else value
