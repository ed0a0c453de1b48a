"""The weight of a token and the normaliser: a loss is one weighted sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdlm.loss import inner_weight, outer_normalizer, outer_weight
from tests import oracle

NORMS = ["token", "sequence", "batch"]
norms = pytest.mark.parametrize("norm", NORMS)
rows = st.lists(st.tuples(st.floats(0.5, 1e3), st.integers(0, 50)), min_size=1, max_size=5)


def columns(pairs):
    weights, counts = zip(*pairs, strict=True)
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(counts)


@pytest.mark.parametrize(
    ("norm", "expected"),
    # Two rows with weights 2 and 3; 4 and 1 maskable tokens; NLL sums 10 and 7.
    [
        ("token", (2 * 10 + 3 * 7) / (4 + 1)),
        ("sequence", (2 * 10 / 4 + 3 * 7 / 1) / 2),
        ("batch", (2 * 10 + 3 * 7) / 2),
    ],
)
def test_the_outer_loss_of_two_rows_by_hand(norm, expected):
    weight, count = columns([(2.0, 4), (3.0, 1)])
    nll = torch.tensor([10.0, 7.0], dtype=torch.float64)
    loss = (outer_weight(norm, weight, count) * nll).sum() / outer_normalizer(norm, count)
    assert loss.item() == pytest.approx(expected, rel=1e-14)


@norms
@pytest.mark.parametrize("scope", ["batch", "sample"])
@given(pairs=rows)
def test_the_inner_weight_is_the_naive_twins(norm, scope, pairs):
    weight, count = columns(pairs)
    groups = [[pair] for pair in pairs] if scope == "sample" else [pairs]
    expected = []
    for group in groups:
        weights, divisor = oracle.normalised(norm, *map(list, zip(*group, strict=True)))
        expected += [w / divisor for w in weights]
    torch.testing.assert_close(
        inner_weight(norm, scope, weight, count),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )


@norms
@given(pairs=rows)
def test_a_sequence_in_sample_scope_weighs_what_a_batch_of_one_weighs(norm, pairs):
    weight, count = columns(pairs)
    together = inner_weight(norm, "sample", weight, count)
    alone = [
        inner_weight(norm, "batch", weight[i : i + 1], count[i : i + 1]) for i in range(len(pairs))
    ]
    assert torch.equal(together, torch.cat(alone))


@norms
@given(pairs=rows, cut=st.integers(0, 5))
def test_micro_batches_add_up_to_the_whole_batch(norm, pairs, cut):
    weight, count = columns(pairs)
    whole = outer_weight(norm, weight, count)
    parts = [part for part in (slice(None, cut), slice(cut, None)) if len(count[part])]
    assert torch.equal(whole, torch.cat([outer_weight(norm, weight[p], count[p]) for p in parts]))
    # An empty micro-batch counts 1, so that alone it divides nothing by zero.
    if norm != "token" or all(count[part].sum() for part in parts):
        total = sum(outer_normalizer(norm, count[part]) for part in parts)
        assert outer_normalizer(norm, count) == total


@norms
def test_without_a_token_the_weights_and_the_normaliser_stay_finite(norm):
    weight, count = columns([(2.0, 0), (3.0, 0)])
    assert outer_weight(norm, weight, count).isfinite().all()
    assert inner_weight(norm, "batch", weight, count).isfinite().all()
    assert inner_weight(norm, "sample", weight, count).isfinite().all()
    assert outer_normalizer(norm, count) >= 1
