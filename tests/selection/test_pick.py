# SPDX-License-Identifier: Apache-2.0
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft import SelectionError
from sfa_peft.selection.pick import layer_quotas, pick, row_sizes
from sfa_peft.selection.score_distribution import ScoreDistribution
from sfa_peft.selection.topk import TAKEN, RandomSource, TensorSource, streaming_topk

NAN, INF = float("nan"), float("inf")
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)
SCORES = st.sampled_from([0.0, -0.0, 0.5, -1.0, 1.0, 2.0, -3.0, NAN, INF, -INF])


def _without(tensors, taken):
    """Return sources of scores in which some flat positions are marked as taken."""
    pairs = zip(tensors, taken, strict=True)
    return [
        TensorSource(t.flatten().index_fill(0, torch.as_tensor(own).long(), TAKEN))
        for t, own in pairs
    ]


@given(SIZES, st.lists(st.integers(0, 80), max_size=6))
def test_tensors_keep_equal_shares_over_any_number_of_picks(sizes, quotas):
    have, total = [0] * len(sizes), sum(sizes)
    for quota in quotas:
        own = layer_quotas(quota, sizes, have)
        assert all(q >= 0 for q in own)  # what is selected stays selected
        assert sum(own) == min(quota, total - sum(have))
        have = [h + q for h, q in zip(have, own, strict=True)]
        assert all(h <= size for h, size in zip(have, sizes, strict=True))
        share = sum(have) / total
        for h, size in zip(have, sizes, strict=True):
            assert abs(h - share * size) < 1 + 1e-9


@given(SIZES, st.integers(0, 10**6))
def test_a_first_pick_gives_each_tensor_its_share_rounded(sizes, quota):
    quota %= sum(sizes) + 1
    for own, size in zip(layer_quotas(quota, sizes, [0] * len(sizes)), sizes, strict=True):
        assert math.floor(quota * size / sum(sizes)) <= own <= math.ceil(quota * size / sum(sizes))


def test_layer_ranking_picks_the_best_of_each_tensor_however_small_they_are():
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(40, generator=generator) * 1000,
        torch.randn(80, generator=generator) / 1000,
    ]
    sources = [TensorSource(t) for t in tensors]
    first = pick(sources, 30, ranking="layer")
    assert [p.numel() for p in first] == [10, 20]
    for tensor, chosen in zip(tensors, first, strict=True):
        best = torch.topk(tensor.abs(), chosen.numel()).indices
        assert torch.equal(chosen, best.sort().values)
    left = _without(tensors, first)
    second = pick(left, 30, [p.numel() for p in first], ranking="layer")
    for tensor, chosen, before in zip(tensors, second, first, strict=True):
        best = torch.topk(tensor.abs(), 2 * before.numel()).indices.sort().values
        assert torch.equal(torch.cat([before, chosen]).sort().values, best)
    everywhere = pick(sources, 30)
    assert everywhere[1].numel() == 0  # the meta-test: a global ranking sees no small tensor


@st.composite
def matrices(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4))
    tensors = [
        torch.tensor(draw(st.lists(SCORES, min_size=a * b, max_size=a * b))).view(a, b)
        for a, b in shapes
    ]
    rows = [draw(st.sets(st.integers(0, a - 1), max_size=a)) for a, _ in shapes]
    return tensors, rows


def _whole(rows, size):
    return [r * size + i for r in sorted(rows) for i in range(size)]


@given(matrices(), st.integers(0, 60))
def test_rows_come_whole_and_in_the_order_of_a_full_sort_while_they_fit(drawn, quota):
    tensors, banned = drawn
    ranked = [
        (-float(tensor[row].abs().mean()), which, row)
        for which, tensor in enumerate(tensors)
        for row in range(tensor.shape[0])
        if row not in banned[which] and torch.isfinite(tensor[row]).all()
    ]
    expected, left = [[] for _ in tensors], quota
    for _, which, row in sorted(ranked):  # ties by position
        left -= tensors[which].shape[1]
        if left < 0:
            break
        expected[which].append(row)
    selected = [_whole(b, t.shape[1]) for b, t in zip(banned, tensors, strict=True)]
    chosen = pick(
        _without(tensors, selected),
        quota,
        granularity="row",
        row_sizes=row_sizes(tensors),
    )
    for tensor, rows, got in zip(tensors, expected, chosen, strict=True):
        assert got.dtype == torch.int64
        assert got.tolist() == _whole(rows, tensor.shape[1])


def test_rows_of_a_tensor_stay_within_its_own_quota_under_layer_ranking():
    tensors = [torch.ones(4, 5), torch.full((8, 5), 100.0)]
    sources = [TensorSource(t) for t in tensors]
    chosen = pick(sources, 30, ranking="layer", granularity="row", row_sizes=[5, 5])
    assert [c.tolist() for c in chosen] == [_whole([0, 1], 5), _whole([0, 1, 2, 3], 5)]


def _one_by_one(tensors, selected, quota):
    """Admit one weight after the other: the best in a row that has the fewest of all not full."""
    chosen = [set(own) for own in selected]
    # An infinite score is TAKEN: it counts as admitted, as one that was admitted before does.
    infinite = [{p for p, v in enumerate(t.flatten()) if math.isinf(v)} for t in tensors]
    for _ in range(quota):
        entries = [
            (
                sum(p // size == place // size for p in own | infinite[which]),
                -abs(float(value)),
                which,
                place,
            )
            for which, (tensor, own) in enumerate(zip(tensors, chosen, strict=True))
            for size in [tensor.shape[1]]
            for place, value in enumerate(tensor.flatten())
            if place not in own and math.isfinite(value)
        ]
        _, _, which, place = min(entries)
        chosen[which].add(place)
    return [sorted(own - set(before)) for own, before in zip(chosen, selected, strict=True)]


@given(matrices(), st.data())
def test_output_ranking_fills_the_emptiest_rows_first_over_any_number_of_picks(drawn, data):
    tensors, _ = drawn
    selected = [set() for _ in tensors]
    finite = int(sum(torch.isfinite(t).sum() for t in tensors))
    for _ in range(2):
        left = finite - sum(map(len, selected))
        quota = data.draw(st.integers(0, left))
        distribution = ScoreDistribution()
        chosen = pick(
            _without(tensors, [sorted(s) for s in selected]),
            quota,
            ranking="output",
            row_sizes=row_sizes(tensors),
            distribution=distribution,
        )
        wanted = _one_by_one(tensors, selected, quota)
        assert [c.tolist() for c in chosen] == wanted
        assert int(distribution.counts.sum()) == left
        admitted = [
            abs(float(t.flatten()[p])) for t, w in zip(tensors, wanted, strict=True) for p in w
        ]
        assert distribution.threshold == (min(admitted) if admitted else None)
        selected = [s | set(w) for s, w in zip(selected, wanted, strict=True)]


def test_what_is_taken_counts_for_its_row_also_where_its_weight_is_zero():
    scores = torch.tensor([[TAKEN, 1.0, 1.0], [2.0, 3.0, 4.0]])
    weight = torch.tensor([[0.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    source = TensorSource(scores, weight)
    assert pick([source], 1, [1], ranking="output", row_sizes=[3])[0].tolist() == [5]
    assert pick([source], 2, [1])[0].tolist() == [1, 2]


def test_output_ranking_says_when_too_few_scores_are_finite():
    sources = [TensorSource(torch.tensor([[1.0, NAN], [INF, 2.0]]))]
    with pytest.raises(SelectionError, match="Cannot select 3 weights: only 2 have a finite score"):
        pick(sources, 3, ranking="output", row_sizes=[2])
    with pytest.raises(SelectionError, match="needs row_sizes"):
        pick(sources, 1, ranking="output")


def test_a_row_of_a_convolution_is_a_channel_and_of_a_vector_one_entry():
    assert row_sizes([torch.zeros(8, 3, 2, 2), torch.zeros(8, 5), torch.zeros(8)]) == [12, 5, 1]
    with pytest.raises(SelectionError, match="needs row_sizes"):
        pick([TensorSource(torch.zeros(2))], 1, granularity="row")


def test_a_long_row_does_not_win_by_its_length():
    tensors = [torch.full((2, 100), 1.0), torch.full((2, 2), 1.5)]
    sources = [TensorSource(t) for t in tensors]
    chosen = pick(sources, 104, granularity="row", row_sizes=[100, 2])
    assert [c.numel() for c in chosen] == [100, 4]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(1, 4), st.integers(1, 40)),
            st.tuples(st.integers(1, 70)),
            st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 300),
    st.integers(0, 2**32),
)
def test_blocks_come_whole_and_in_the_order_of_a_full_sort_while_one_fits(shapes, quota, seed):
    rng = random.Random(seed)
    pool = [0.0, -0.0, 0.5, -1.0, 1.0, 2.0, -3.0, 1e-30, -3e-30, *[NAN, INF] * (seed % 2)]
    tensors = [torch.tensor(rng.choices(pool, k=math.prod(s))).view(s) for s in shapes]
    ranked, blocks = [], []  # blocks: of each tensor the positions of one after the other
    for which, tensor in enumerate(tensors):
        length = tensor[0].numel() if tensor.ndim > 1 and tensor[0].numel() > 1 else tensor.numel()
        starts = [
            (first, min(first + 16, row + length))
            for row in range(0, tensor.numel(), length)
            for first in range(row, row + length, 16)
        ]
        blocks.append([list(range(a, b)) for a, b in starts])
        flat = tensor.flatten().tolist()
        ranked += [
            (-np.float32(math.sqrt(sum(flat[i] ** 2 for i in block))), which, number)
            for number, block in enumerate(blocks[-1])
        ]
    banned = [set(rng.sample(range(len(own)), rng.randint(0, len(own)))) for own in blocks]
    expected, left = [[] for _ in tensors], quota
    for _, which, number in sorted(r for r in ranked if math.isfinite(r[0])):
        if left >= 16 and number not in banned[which]:
            expected[which].append(number)
            left -= len(blocks[which][number])

    def positions(chosen):
        pairs = zip(blocks, chosen, strict=True)
        return [[place for number in sorted(c) for place in own[number]] for own, c in pairs]

    chosen = pick(
        _without(tensors, positions(banned)),
        quota,
        granularity="block",
        row_sizes=row_sizes(tensors),
    )

    assert all(c.dtype == torch.int64 for c in chosen)
    assert [c.tolist() for c in chosen] == positions(expected)


def test_a_block_of_64_is_four_of_16_and_stays_in_its_tensors_quota():
    tensors = [torch.arange(256.0).view(2, 128), torch.full((1, 256), 1000.0)]
    sources = [TensorSource(t) for t in tensors]
    options = {"ranking": "layer", "row_sizes": [128, 256]}
    large = pick(sources, 256 + 40, granularity="block64", **options)
    assert [c.tolist() for c in large] == [list(range(128, 256)), list(range(128))]
    small = pick(sources, 256 + 40, granularity="block", **options)
    assert [c.tolist() for c in small] == [list(range(112, 256)), list(range(144))]


@given(st.lists(st.lists(SCORES, min_size=1, max_size=30), min_size=1, max_size=4), st.data())
def test_sources_with_banned_and_non_finite_entries_equal_torch_topk(lists, data):
    tensors = [torch.tensor(values) for values in lists]
    factors = [torch.full_like(t, 2.0) for t in tensors]
    banned = [
        sorted(data.draw(st.sets(st.integers(0, t.numel() - 1), max_size=10))) for t in tensors
    ]
    joined = torch.cat([t.abs() for t in tensors])
    starts = [sum(t.numel() for t in tensors[:i]) for i in range(len(tensors))]
    joined[~torch.isfinite(joined)] = -1
    for ban, start in zip(banned, starts, strict=True):
        joined[[start + b for b in ban]] = -1
    k = data.draw(st.integers(0, int((joined >= 0).sum())))
    left = _without(tensors, banned)
    sources = [TensorSource(t.tensor, f) for t, f in zip(left, factors, strict=True)]
    chosen = streaming_topk(sources, k)
    flat = torch.cat([c + start for c, start in zip(chosen, starts, strict=True)])
    assert flat.numel() == k
    values = joined[flat].sort(descending=True).values
    assert torch.equal(values, torch.topk(joined, k).values)
    assert (values >= 0).all()


def test_random_scores_do_not_depend_on_how_the_tensor_is_cut():
    source = RandomSource(200_000, "7/0", torch.device("cpu"))
    whole = source.read(0, 200_000)
    for size in (1000, 65_536, 70_001):
        parts = [source.read(a, min(a + size, 200_000)) for a in range(0, 200_000, size)]
        assert torch.equal(torch.cat(parts), whole)
    assert abs(float(whole.mean()) - 0.5) < 0.01
    assert whole.unique().numel() > 190_000  # blocks do not repeat
    other = RandomSource(200_000, "8/0", torch.device("cpu")).read(0, 200_000)
    assert not torch.equal(other, whole)
