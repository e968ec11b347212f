# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft import AdapterFileError
from sfa_peft.files.record import (
    Link,
    Resolved,
    SavedLayer,
    SavedTensor,
    check_tensors,
    read_resolved,
)

SIZES = {"total": 100, "allowed": 20, "adapter_dim": 2, "internal": 5}
WHOLE = Resolved(
    **SIZES,
    layers={"a.b": SavedLayer(2, "mlp_out", 3, 0), "c": SavedLayer()},
    tensors=(
        SavedTensor("a.b.weight", (2, 3), "float32", {"float32": "00ff"}),
        SavedTensor("c.bias", (4,)),
    ),
    packed=77,
    backbone="swinv2",
)


def test_what_is_written_is_read_again():
    assert read_resolved(WHOLE.to_dict()) == WHOLE
    assert WHOLE.num_weights == 10
    assert WHOLE.widths == {"a.b": 2}


@pytest.mark.parametrize("version", [0, 1, 2, 5, "3", None])
def test_an_unknown_version_is_refused_with_the_ones_that_are_read(version):
    with pytest.raises(AdapterFileError, match=r"reads 3, 4\. Upgrade"):
        read_resolved(WHOLE.to_dict() | {"format": version})


@pytest.mark.parametrize("field", ["total", "allowed", "internal", "layers", "tensors", "packed"])
def test_a_missing_field_is_named(field):
    data = {k: v for k, v in WHOLE.to_dict().items() if k != field}
    with pytest.raises(AdapterFileError, match=f"lacks {field}"):
        read_resolved(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.sampled_from(sorted(WHOLE.to_dict())), JSON)
def test_hostile_fields_give_the_one_clear_error_or_something_whole(field, value):
    try:
        found = read_resolved(WHOLE.to_dict() | {field: value})
    except AdapterFileError:
        return
    assert read_resolved(found.to_dict()) == found


def test_tensors_listed_twice_or_of_a_strange_layer_are_refused():
    data = WHOLE.to_dict()
    with pytest.raises(AdapterFileError, match="listed twice"):
        read_resolved(data | {"tensors": data["tensors"] * 2})
    with pytest.raises(AdapterFileError, match="not among the layers"):
        read_resolved(data | {"layers": []})


def test_a_chain_makes_a_version_of_its_own_and_must_be_there():
    links = (Link("first", "ab"), Link("org/second", "cd"))
    data = {"total": 9, "allowed": 3, "adapter_dim": 0, "internal": 0, "layers": {}, "tensors": ()}
    chained, alone = Resolved(**data, chain=links), Resolved(**data)
    assert (chained.to_dict()["format"], alone.to_dict()["format"]) == (4, 3)
    assert read_resolved(chained.to_dict()).chain == links
    assert read_resolved(alone.to_dict()).chain == ()
    for broken in ([{"source": "a"}], 7):
        with pytest.raises(AdapterFileError, match="`resolved` is damaged"):
            read_resolved(chained.to_dict() | {"chain": broken})
    without = {k: v for k, v in chained.to_dict().items() if k != "chain"}
    with pytest.raises(AdapterFileError, match="lacks chain"):
        read_resolved(without)


def test_tensors_must_be_there_with_the_shape_they_had():
    check_tensors([["a", [2, 3]]], {"a": (2, 3), "b": (1, 1)})
    with pytest.raises(AdapterFileError, match="changes `c`, which this model does not have"):
        check_tensors([["c", [2, 3]]], {"a": (2, 3)})
    with pytest.raises(AdapterFileError, match=r"`a` has shape \[3, 2\] here"):
        check_tensors([["a", [2, 3]]], {"a": (3, 2)})
