"""The states of the simulated denoising trajectory, as sets of masked tokens."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdlm.trajectory import anchor_mask, loss_mask, smallest, state_counts, trajectory
from tests import oracle

STRATEGIES = ["anchor_consistent", "anchor_only", "pre_anchor_only", "progressive"]
SCALES = [1.0, 1.15, 1.5, 2.0, 10.0]
strategies = st.sampled_from(STRATEGIES)
steps = st.integers(1, 5)
scales = st.sampled_from(SCALES)


@st.composite
def draws(draw, ties=False):
    """priority [B, L], maskable [B, L], probability [B]: ragged, empty and full rows included."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    priority = torch.rand(batch, length, generator=generator, dtype=torch.float64)
    if ties:
        priority = (priority * 4).floor() / 4
    share = torch.tensor([draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in range(batch)])
    maskable = torch.rand(batch, length, generator=generator) < share[:, None]
    rates = st.floats(1e-3, 1.0)
    probability = torch.tensor([draw(rates) for _ in range(batch)], dtype=torch.float64)
    return priority, maskable, probability


def make_states(strategy, inner_steps, scale, noise):
    priority, maskable, probability = noise
    anchor = anchor_mask(priority, maskable, probability)
    return anchor, trajectory(strategy, inner_steps, scale, priority, maskable, anchor)


@given(noise=draws())
def test_the_anchor_masks_the_maskable_tokens_below_the_probability(noise):
    priority, maskable, probability = noise
    anchor = anchor_mask(priority, maskable, probability)
    for row in range(len(anchor)):
        for i in range(anchor.shape[1]):
            below = bool(priority[row, i] < probability[row])
            assert bool(anchor[row, i]) == (below and bool(maskable[row, i]))


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_probability_outside_its_range_is_an_error(bad):
    probability = torch.tensor([0.5, bad], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"probability must be in \(0, 1\], got"):
        anchor_mask(torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), probability)


@given(strategy=strategies, inner_steps=steps, scale=scales, noise=draws(ties=True))
def test_there_are_k_states_of_maskable_tokens_and_each_contains_the_next(
    strategy, inner_steps, scale, noise
):
    _, states = make_states(strategy, inner_steps, scale, noise)
    assert len(states) == inner_steps
    assert all(not (state & ~noise[1]).any() for state in states)
    pairs = pairwise(states)
    assert all(not (later & ~earlier).any() for earlier, later in pairs)


@given(inner_steps=steps, scale=scales, noise=draws(ties=True))
def test_an_anchor_consistent_trajectory_ends_at_the_anchor(inner_steps, scale, noise):
    anchor, states = make_states("anchor_consistent", inner_steps, scale, noise)
    assert torch.equal(states[-1], anchor)


@given(inner_steps=steps, scale=scales, noise=draws())
def test_anchor_only_visits_nothing_but_the_anchor(inner_steps, scale, noise):
    anchor, states = make_states("anchor_only", inner_steps, scale, noise)
    assert all(torch.equal(state, anchor) for state in states)


@given(inner_steps=steps, scale=scales, noise=draws())
def test_pre_anchor_only_stays_at_the_first_state_of_the_consistent_one(inner_steps, scale, noise):
    _, states = make_states("pre_anchor_only", inner_steps, scale, noise)
    _, consistent = make_states("anchor_consistent", 2, scale, noise)
    assert all(torch.equal(state, consistent[0]) for state in states)


@given(strategy=strategies, inner_steps=steps, scale=scales, noise=draws())
def test_the_states_are_those_of_the_naive_twin(strategy, inner_steps, scale, noise):
    priority, maskable, probability = noise
    anchor, states = make_states(strategy, inner_steps, scale, noise)
    memory = SimpleNamespace(strategy=strategy, inner_steps=inner_steps, pre_anchor_scale=scale)
    _, expected_anchor, expected = oracle.simulate(
        memory,
        SimpleNamespace(schedule="linear"),
        torch.where(maskable, 1, -100).tolist(),
        probability.tolist(),
        priority.tolist(),
    )
    as_lists = [[row.nonzero()[:, 0].tolist() for row in state] for state in [anchor, *states]]
    assert as_lists == [expected_anchor, *expected]


@given(strategy=strategies, inner_steps=steps, scale=scales, noise=draws())
def test_the_same_priorities_give_the_same_states_and_stay_as_they_were(
    strategy, inner_steps, scale, noise
):
    before = [tensor.clone() for tensor in noise]
    _, states = make_states(strategy, inner_steps, scale, noise)
    _, again = make_states(strategy, inner_steps, scale, noise)
    assert all(map(torch.equal, states, again))
    assert all(map(torch.equal, before, noise))


@given(strategy=strategies, inner_steps=steps, scale=scales, noise=draws())
def test_a_sequence_has_the_states_that_it_has_alone(strategy, inner_steps, scale, noise):
    _, states = make_states(strategy, inner_steps, scale, noise)
    for row in range(len(noise[0])):
        alone = [tensor[row : row + 1] for tensor in noise]
        _, states_alone = make_states(strategy, inner_steps, scale, alone)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(states, states_alone, strict=True))


@given(strategy=strategies, inner_steps=steps, scale=scales, noise=draws())
def test_padding_changes_no_state(strategy, inner_steps, scale, noise):
    priority, maskable, probability = noise
    _, states = make_states(strategy, inner_steps, scale, noise)
    padding = torch.zeros(len(priority), 3, dtype=torch.float64)
    padded = (
        torch.cat([priority, padding], 1),
        torch.cat([maskable, padding.bool()], 1),
        probability,
    )
    _, padded_states = make_states(strategy, inner_steps, scale, padded)
    width = priority.shape[1]
    for state, wide in zip(states, padded_states, strict=True):
        assert torch.equal(state, wide[:, :width])
        assert not wide[:, width:].any()


@given(
    inner_steps=st.integers(2, 6),
    scale=scales,
    counts=st.integers(0, 100).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))),
)
def test_the_reveals_are_spread_evenly_and_the_larger_ones_come_first(inner_steps, scale, counts):
    anchor, maskable = counts
    states = state_counts("anchor_consistent", inner_steps, scale, anchor, maskable)
    reveals = [a - b for a, b in pairwise(states)]
    assert sorted(reveals, reverse=True) == reveals
    assert reveals[0] - reveals[-1] <= 1


@pytest.mark.parametrize(
    ("strategy", "inner_steps", "scale", "anchor", "maskable", "expected"),
    [
        ("anchor_consistent", 1, 1.5, 4, 20, [4]),
        ("anchor_consistent", 2, 1.5, 4, 20, [6, 4]),
        ("anchor_consistent", 2, 1.5, 5, 20, [7, 5]),  # floor(7.5)
        ("anchor_consistent", 2, 1.5, 18, 20, [20, 18]),  # no more than there are
        ("anchor_consistent", 4, 2.0, 10, 40, [20, 16, 13, 10]),  # ceil first
        ("anchor_consistent", 3, 1.0, 7, 20, [7, 7, 7]),
        ("anchor_consistent", 2, 1.5, 0, 20, [0, 0]),
        ("anchor_consistent", 2, 1.5, 0, 0, [0, 0]),
        ("anchor_consistent", 2, 1.15, 20, 40, [23, 20]),  # 1.15 * 20 is below 23 in floats
        ("anchor_only", 3, 1.5, 4, 20, [4, 4, 4]),
        ("pre_anchor_only", 1, 1.5, 4, 20, [6]),
        ("progressive", 1, 1.5, 4, 20, [4]),  # 0.2 of 20
        ("progressive", 2, 1.5, 9, 20, [16, 4]),
        ("progressive", 4, 1.5, 9, 10, [8, 6, 4, 2]),  # 0.6 * 10 is below 6 in floats
        ("progressive", 3, 1.5, 0, 7, [5, 3, 1]),
    ],
)
def test_counts_worked_out_by_hand(strategy, inner_steps, scale, anchor, maskable, expected):
    assert state_counts(strategy, inner_steps, scale, anchor, maskable) == expected


@given(noise=draws(ties=True), count=st.integers(0, 50))
def test_smallest_takes_just_as_many_as_asked_for_and_none_that_is_larger(noise, count):
    priority, maskable, _ = noise
    chosen = smallest(priority, maskable, torch.full((len(priority),), count))
    for row in range(len(priority)):
        inside = priority[row][chosen[row]]
        outside = priority[row][maskable[row] & ~chosen[row]]
        assert len(inside) == min(count, int(maskable[row].sum()))
        assert len(inside) == 0 or len(outside) == 0 or inside.max() <= outside.min()


@given(inner_steps=steps, scale=scales, noise=draws())
def test_the_newly_revealed_tokens_and_the_anchor_divide_the_first_state(inner_steps, scale, noise):
    strategy = "anchor_consistent"
    anchor, states = make_states(strategy, inner_steps, scale, noise)
    taken = [
        loss_mask(strategy, "newly_revealed", states, anchor, k).long() for k in range(inner_steps)
    ]
    assert torch.equal(sum(taken), states[0].long())
    assert torch.equal(taken[-1].bool(), anchor)


@given(inner_steps=steps, scale=scales, noise=draws())
def test_pre_anchor_only_reveals_what_the_anchor_shows(inner_steps, scale, noise):
    strategy = "pre_anchor_only"
    anchor, states = make_states(strategy, inner_steps, scale, noise)
    for k in range(inner_steps):
        revealed = loss_mask(strategy, "newly_revealed", states, anchor, k)
        assert torch.equal(revealed, states[k] & ~anchor)


@given(strategy=strategies, inner_steps=steps, scale=scales, noise=draws())
def test_all_masked_takes_every_masked_token_of_the_state(strategy, inner_steps, scale, noise):
    anchor, states = make_states(strategy, inner_steps, scale, noise)
    for k in range(inner_steps):
        assert torch.equal(loss_mask(strategy, "all_masked", states, anchor, k), states[k])
