"""The numerics that divergences share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdflow.ops.logspace import kl, log_mixture, log_probabilities, nonnegative


def test_what_rounding_left_below_zero_is_removed_but_its_gradient_stays() -> None:
    values = torch.tensor([-1e-9, 0.0, 2.0, math.inf], requires_grad=True)
    result = nonnegative(values)
    assert result.tolist() == [0.0, 0.0, 2.0, math.inf]
    assert torch.autograd.grad(result.sum(), values)[0].tolist() == [1.0] * 4


def test_kl_counts_0_log_0_as_0_and_what_the_other_side_lacks_as_infinite() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log().requires_grad_()
    q = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).log().requires_grad_()
    values = kl(p, q)
    torch.testing.assert_close(values, torch.tensor([math.log(2), math.inf, 0.0]))
    for gradient in torch.autograd.grad(values.sum(), (p, q)):
        assert gradient.isfinite().all()


def test_an_infinite_forward_kl_pulls_the_student_as_a_finite_one_does() -> None:
    student = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 0.5]])
    log_s, log_t = log_probabilities(student, teacher)
    (gradient,) = torch.autograd.grad(kl(log_t, log_s).sum(), student)
    torch.testing.assert_close(gradient, student.detach().softmax(-1) - teacher.softmax(-1))


def test_columns_masked_on_both_sides_count_nothing() -> None:
    student = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, -math.inf, 0.0]], requires_grad=True)
    log_s, log_t = log_probabilities(student, teacher)
    mixture = log_mixture(log_s, log_t, 0.3)
    torch.testing.assert_close(mixture.exp(), 0.3 * log_s.exp() + 0.7 * log_t.exp())
    values = kl(log_s, log_t) + kl(log_t, mixture)
    plain_s, plain_t = log_probabilities(student[:, ::2], teacher[:, ::2])
    torch.testing.assert_close(values, kl(plain_s, plain_t) + kl(plain_t, log_mixture(plain_s, plain_t, 0.3)))
    for gradient in torch.autograd.grad(values.sum(), (student, teacher)):
        assert gradient.isfinite().all()
        assert gradient[0, 1] == 0


@pytest.mark.parametrize("name", ["p", "q", "mixture"])
def test_a_second_derivative_is_refused_and_not_wrong(name: str) -> None:
    log_p, log_q = (torch.tensor([row]).log_softmax(-1) for row in ([0.0, 1.0, 2.0], [1.0, -1.0, 0.0]))
    leaf = (log_q if name == "q" else log_p).requires_grad_()
    value = (log_mixture(log_p, log_q, 0.5) if name == "mixture" else kl(log_p, log_q)).sum()
    with pytest.raises(RuntimeError, match="can be differentiated once, and create_graph=True asks for more"):
        torch.autograd.grad(value, leaf, create_graph=True)


def test_the_compiler_takes_the_gradients_that_are_written_out() -> None:
    student, teacher = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True), torch.tensor([[1.0, -1.0, 0.0]])

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        log_s, log_t = log_probabilities(student, teacher)
        mixture = log_mixture(log_t, log_s, 0.5)
        return (kl(log_t, mixture) + kl(log_s, mixture)).sum()

    traced = torch.compile(divergence, fullgraph=True, backend="aot_eager")
    plain, compiled = (function(student, teacher) for function in (divergence, traced))
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled, student), torch.autograd.grad(plain, student))


def test_a_mixture_keeps_what_one_side_lacks() -> None:
    p, q = (torch.tensor([row], requires_grad=True) for row in ([-0.5, -2.0, -math.inf], [-math.inf, -2.0, -0.5]))
    for weight in (1e-6, 0.1, 0.5, 1 - 1e-6):
        mixture = log_mixture(p, q, weight)
        torch.testing.assert_close(mixture.exp(), weight * p.exp() + (1 - weight) * q.exp())
        slopes = torch.autograd.grad(mixture.sum(), (p, q))
        for slope, expected in zip(
            slopes, (weight * (p - mixture).exp(), (1 - weight) * (q - mixture).exp()), strict=True
        ):
            torch.testing.assert_close(slope, expected)
