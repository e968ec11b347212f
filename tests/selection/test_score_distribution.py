# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.selection.pick import pick, row_sizes
from sfa_peft.selection.score_distribution import LOW_BITS, ScoreDistribution
from sfa_peft.selection.topk import TAKEN, TensorSource, streaming_topk

FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3.4e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def _rounded_down(values: np.ndarray) -> np.ndarray:
    bits = np.abs(values.astype(np.float32)).view(np.uint32)
    return (bits >> LOW_BITS << LOW_BITS).view(np.float32)


@given(st.lists(FLOATS, min_size=1, max_size=60), st.floats(0, 1), st.data())
def test_quantiles_are_those_of_the_sorted_scores_rounded_down(values, share, data):
    k = data.draw(st.integers(1, len(values)))
    found = ScoreDistribution()
    streaming_topk([torch.tensor(values)], k, distribution=found)
    scores = np.abs(np.array(values, np.float32))
    rank = max(1, math.ceil(share * len(values)))
    assert found.quantile(share) == np.sort(_rounded_down(scores))[rank - 1]
    assert found.threshold == np.sort(scores)[-k]  # not rounded


def test_numbers_are_rounded_by_less_than_half_a_percent():
    values = np.random.default_rng(0).lognormal(sigma=5, size=10_000).astype(np.float32)
    found = ScoreDistribution()
    streaming_topk([torch.from_numpy(values)], 100, distribution=found)
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1)):
        exact = np.quantile(values, share, method="inverted_cdf")
        assert 0.996 * exact < found.summary()[name] <= exact


def test_selected_and_not_finite_scores_are_not_counted():
    tensor = torch.tensor([TAKEN, 1.0, math.nan, math.inf, 2.0])
    found = ScoreDistribution()
    streaming_topk([tensor], 0, distribution=found)
    assert int(found.counts.sum()) == 2
    assert found.summary() == {"p50": 1, "p90": 2, "p99": 2, "max": 2}  # nothing was admitted
    assert math.isnan(ScoreDistribution().quantile(0.5))


@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("granularity", ["weight", "block", "row"])
def test_every_kind_of_pick_reports_what_it_compared_and_the_smallest_admitted(
    ranking, granularity
):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(8, 4, generator=generator), torch.randn(6, 5, generator=generator)]
    before = [torch.arange(4), torch.arange(5, 10)]  # a row each
    found = ScoreDistribution()
    left = [
        t.clone().view(-1).index_fill(0, b, TAKEN) for t, b in zip(tensors, before, strict=True)
    ]
    chosen = pick(
        [TensorSource(t) for t in left],
        38,
        [old.numel() for old in before],
        ranking=ranking,
        granularity=granularity,
        row_sizes=row_sizes(tensors),
        distribution=found,
    )
    by_row = granularity != "weight"  # rows here are shorter than a block: each is one
    admitted, compared = [], 0
    for tensor, own, old in zip(tensors, chosen, before, strict=True):
        size = tensor.shape[1]
        scores = tensor.abs().flatten()
        if by_row:
            scores = tensor.abs().mean(1) if granularity == "row" else tensor.double().norm(dim=1)
        admitted.append(scores[own[::size] // size if by_row else own])
        compared += scores.numel() - (1 if by_row else old.numel())
    assert found.threshold == torch.cat(admitted).float().min().item()
    assert int(found.counts.sum()) == compared
