"""Noise schedules: alpha, its inverse, and the weight that belongs to a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdlm.schedule import SCHEDULES
from tests import oracle

schedules = pytest.mark.parametrize("name", ["linear", "cosine"])
times = st.floats(1e-3, 1.0)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


@schedules
def test_nothing_is_masked_at_time_0_and_everything_at_time_1(name):
    ends = SCHEDULES[name].mask_probability(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))


@schedules
@given(time=times)
def test_mask_probability_is_that_of_the_naive_twin(name, time):
    actual = SCHEDULES[name].mask_probability(scalar(time)).item()
    assert actual == pytest.approx(oracle.mask_probability(name, time), rel=1e-14, abs=1e-16)


@schedules
@given(time=times)
def test_the_weight_is_minus_the_slope_of_alpha_over_the_masked_share(name, time):
    t = scalar(time).requires_grad_()
    masked = SCHEDULES[name].mask_probability(t)  # 1 - alpha, so its slope is -alpha'
    (slope,) = torch.autograd.grad(masked, t)
    torch.testing.assert_close(
        SCHEDULES[name].weight(t).detach(), slope / (masked.detach() + 1e-6), rtol=1e-12, atol=0
    )


def test_the_linear_weight_is_one_over_the_time():
    assert SCHEDULES["linear"].weight(scalar(0.25)).item() == pytest.approx(4.0, rel=1e-5)


@schedules
@given(share=st.floats(0.0, 1.0))
def test_time_at_inverts_the_mask_probability(name, share):
    schedule = SCHEDULES[name]
    time = schedule.time_at(scalar(share))
    assert 0 <= time.item() <= 1
    assert schedule.mask_probability(time).item() == pytest.approx(share, rel=1e-12, abs=1e-15)


@schedules
def test_more_is_masked_later(name):
    masked = SCHEDULES[name].mask_probability(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert (masked.diff() > 0).all()


@schedules
def test_the_weight_is_finite_where_nothing_is_masked(name):
    assert SCHEDULES[name].weight(scalar(0.0)).isfinite()
