"""Final answers: what counts as the answer of a response, and what equals what."""

from __future__ import annotations

import pytest

from kdflow.evaluation.answers import is_correct


@pytest.mark.parametrize(("response", "answer"), [
    ("42", "42"),
    ("6 times 7 is 42.", "42"),
    ("First 6, then 7.\nSo there are **42** apples in 3 or so baskets: 42", "42"),
    ("She pays $1,000.00", "1000"),
    ("It is 1000 €.", "$1,000"),
    ("x = -4", "-4"),
    ("x = −4", "-4"),
    ("7-4", "4"),
    ("The share is \\(\\frac{1}{2}\\).", "0.5"),
    ("0.50", "1/2"),
    (".5", "1/2"),
    ("about 20%", "20"),
    ("The area is 25 cm²", "25"),
    ("\\boxed{25 cm²}", "25"),
    ("25 ㎡", "25"),
    ("It weighs 44 g of CO₂.", "44"),
    ("CO2", "CO₂"),
    ("It is ½.", "0.5"),
    ("1⁄2", "1/2"),
    ("-2½", "-2.5"),
    ("\\boxed{2\\frac{1}{2}}", "2 1/2"),
    ("\\boxed{1{,}234}", "1234"),
    ("We get \\boxed{42}, since 6 and 7 are 2 factors.", "42"),
    ("\\boxed{1} is wrong, so \\boxed{\\dfrac{3}{4}}", "3/4"),
    ("\\boxed{\\text{Paris}}", "paris"),
    ("\\boxed{x^{2}+1}", "$x^{2}+1$"),
    ("6 * 7 = 42\n#### 42\nI hope that 3 examples help.", "42"),
    ("42", "6 * 7 = 42, so it is\n#### 42"),
    ("It is 42", "We multiply and get \\boxed{42}."),
    ("Paris", "paris"),
    ("I think of France.\n\nThe answer is: Paris.\n", "Paris"),
    ("Therefore, the final answer is **New  York**", "new york"),
    ("Answer: B", "b"),
    ("'Yes!'", "yes"),
    ("answering machine", "Answering machine"),
])  # fmt: skip
def test_right(response: str, answer: str) -> None:
    assert is_correct(response, answer)


@pytest.mark.parametrize(("response", "answer"), [
    ("", "42"),
    ("\n \n", "Paris"),
    ("forty-two", "42"),
    ("42, or perhaps 43", "42"),
    ("It was 42.\nNo, 41.", "42"),
    ("-42", "42"),
    ("4.2", "42"),
    ("1,42", "142"),
    ("50%", "0.5"),
    ("\\boxed{41}, that is, 42", "42"),
    ("\\boxed{none}: 42", "42"),
    ("42\n#### 41", "42"),
    ("#### ", "42"),
    ("10/0", "10"),
    ("102", "10²"),
    ("10", "10²"),
    ("2⁵", "2"),
    ("10²", "102"),
    ("CO", "CO₂"),
    ("x³", "x²"),
    ("2½", "10.5"),
    ("Paris\nor London", "Paris"),
    ("The capital is Paris", "Paris"),
    ("Not Paris", "Paris"),
    ("12 Elm Street", "12 Oak Street"),
])  # fmt: skip
def test_wrong(response: str, answer: str) -> None:
    assert not is_correct(response, answer)


def test_a_number_of_more_digits_than_python_reads_is_text() -> None:
    """A model that repeats itself writes them."""
    long = "1" * 5000
    assert not is_correct(f"The answer is {long}", "1")
    assert not is_correct("1", long)
    assert is_correct(f"The answer is {long}", long)
