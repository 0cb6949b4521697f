"""The numerics that divergences share."""

from __future__ import annotations

import math

import torch

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


def test_columns_masked_on_both_sides_are_finite_and_without_mass() -> None:
    masked = torch.tensor([[0.0, -math.inf, 1.0]])
    for side in log_probabilities(masked, masked + 1):
        assert side.isfinite().all()
        torch.testing.assert_close(side.exp(), masked.softmax(-1))
    one, other = log_probabilities(masked, masked.nan_to_num(neginf=0.0))
    assert one[0, 1] == -math.inf
    assert other.isfinite().all()


def test_a_mixture_keeps_what_one_side_lacks() -> None:
    p, q = torch.tensor([[0.75, 0.25, 0.0]]).log(), torch.tensor([[0.0, 0.25, 0.75]]).log()
    for weight in (1e-6, 0.1, 0.5, 1 - 1e-6):
        torch.testing.assert_close(log_mixture(p, q, weight).exp(), weight * p.exp() + (1 - weight) * q.exp())
