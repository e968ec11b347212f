# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft import SelectionError
from sfa_peft.selection import topk
from sfa_peft.selection.topk import TAKEN, streaming_topk

# Few distinct values make ties, zeros of both signs and the extremes of float32 likely.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-40, 3.4e38, -3.4e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
TENSORS = st.lists(st.lists(VALUES, max_size=40), min_size=1, max_size=5)


def _brute_force(tensors, k, banned):
    """Sort everything by (larger absolute value, earlier position)."""
    entries = [
        (-abs(float(v)), which, index)
        for which, tensor in enumerate(tensors)
        for index, v in enumerate(tensor)
        if index not in banned[which]
    ]
    chosen = sorted(entries)[:k]
    return [sorted(i for _, w, i in chosen if w == which) for which in range(len(tensors))]


@given(TENSORS, st.data())
def test_the_set_equals_a_full_sort_with_ties_by_position(lists, data):
    tensors = [torch.tensor(values, dtype=torch.float32) for values in lists]
    banned = [
        set(data.draw(st.lists(st.integers(0, max(0, t.numel() - 1)), max_size=5))) for t in tensors
    ]
    banned = [{b for b in ban if b < t.numel()} for ban, t in zip(banned, tensors, strict=True)]
    free = sum(t.numel() - len(b) for t, b in zip(tensors, banned, strict=True))
    k = data.draw(st.integers(0, free))
    left = [t.clone() for t in tensors]
    for tensor, ban in zip(left, banned, strict=True):
        tensor[sorted(ban)] = TAKEN
    chosen = [c.tolist() for c in streaming_topk(left, k)]
    assert chosen == _brute_force(tensors, k, banned)


def test_chosen_values_equal_torch_topk_over_a_concatenation():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, generator=generator) for n in (1000, 1, 37, 5000)]
    chosen = streaming_topk(tensors, 777)
    values = torch.cat([t.abs()[c] for t, c in zip(tensors, chosen, strict=True)])
    expected = torch.topk(torch.cat(tensors).abs(), 777).values
    assert torch.equal(values.sort(descending=True).values, expected)


def test_pieces_of_a_tensor_give_the_same_as_the_whole(monkeypatch):
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    tensor[::7] = TAKEN
    whole = streaming_topk([tensor], 1234)
    monkeypatch.setattr(topk, "_CHUNK", 64)
    assert torch.equal(streaming_topk([tensor], 1234)[0], whole[0])


def test_entries_that_are_not_finite_are_never_selected():
    tensor = torch.tensor([1.0, float("nan"), float("inf"), 2.0, -float("inf")])
    assert streaming_topk([tensor], 2)[0].tolist() == [0, 3]
    with pytest.raises(SelectionError, match="only 2 have a finite score"):
        streaming_topk([tensor], 3)


def test_other_dtypes_and_shapes_are_ranked_by_flat_position():
    tensor = torch.tensor([[1.0, -4.0], [3.0, 2.0]], dtype=torch.bfloat16).T
    assert streaming_topk([tensor], 2)[0].tolist() == [1, 2]
