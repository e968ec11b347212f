# SPDX-License-Identifier: Apache-2.0
import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft import AdapterFileError
from sfa_peft.files.adapter_config import (
    Link,
    Resolved,
    SavedLayer,
    SavedTensor,
    check_tensors,
    read_config,
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


def _with_tensor(**changes):
    data = WHOLE.to_dict()
    data["tensors"][0] |= changes
    return data


HUGE = 2**60
HOSTILE = {
    "a shape of many dimensions": _with_tensor(shape=[HUGE] * 200_000),
    "a shape of many weights": _with_tensor(shape=[HUGE] * 64),
    "a shape that is a number": _with_tensor(shape=3),
    "a type of nothing": _with_tensor(dtype="nn"),
    "a type that is a list": _with_tensor(dtype=[]),
    "digests that are a list": _with_tensor(digests=[1]),
    "a digest that is a number": _with_tensor(digests={"float32": 1}),
    "a name that is a list": _with_tensor(name=["a.b.weight"] * 10_000),
    "many links": WHOLE.to_dict()
    | {"format": 4, "chain": [{"source": "a", "digest": "b"}] * 10**5},
    "a link to a number": WHOLE.to_dict() | {"format": 4, "chain": [{"source": 1, "digest": "b"}]},
    "a role that is a list": WHOLE.to_dict()
    | {"layers": [{"name": "a.b", "width": 1, "role": [], "block": 0, "index": 0}]},
    "a block that is a text": WHOLE.to_dict()
    | {"layers": [{"name": "a.b", "width": 1, "role": "mlp_in", "block": "0", "index": 0}]},
    "a backbone that is a list": WHOLE.to_dict() | {"backbone": ["swin"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_that_no_adapter_has_is_one_short_error(name):
    start = time.process_time()
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: `resolved` is d") as caught:
        read_resolved(HOSTILE[name])
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 400


CONFIGS = {
    "nothing": b"",
    "bytes": b"\xff\xfe\x00\x01",
    "a list": b"[]",
    "a text": b'"SFA"',
    "another encoding": json.dumps({"a": 1}).encode("utf-16"),
    "deep lists": b'{"a": ' + b"[" * 200_000,
    "lists just too deep": b'{"a": ' + b"[" * 25 + b"]" * 25 + b"}",
    "a long number": b'{"a": ' + b"9" * 4000 + b"}",
    "many long numbers": b'{"a": [' + b",".join([b"9" * 4000] * 900) + b"]}",
    "no number": b'{"a": NaN}',
    "a number without end": b'{"a": -Infinity}',
    # The collector walks through all that a process has again and again while they are made: 2 s.
    "too many lists": b'{"a": [' + b"[]," * (1 << 17) + b"[]]}",
    "too many objects": b'{"a": [' + b"{}," * (1 << 17) + b"{}]}",
    "too many bytes": b'{"a": "' + b"x" * (1 << 22) + b'"}',
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_none_is_one_short_error_with_its_path(name, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(CONFIGS[name])
    start = time.process_time()
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: no config of") as caught:
        read_config(path)
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 400


def test_a_config_cut_at_any_byte_is_refused_and_one_with_a_mark_is_read(tmp_path):
    path = tmp_path / "adapter_config.json"
    fields = {"peft_type": "SFA", "resolved": WHOLE.to_dict(), "name": "gr\u00fcn", "a": -1.5e3}
    data = json.dumps(fields, ensure_ascii=False).encode()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(AdapterFileError, match="no config"):
            read_config(path)
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + data)
        assert read_config(path) == fields


@pytest.mark.parametrize("item", [b"[]", b"{}", b'"ab"', b"0.5", b"1000", b'{"a":0}'])
def test_the_largest_config_takes_bounded_memory(item, tmp_path):
    path = tmp_path / "adapter_config.json"
    count = (1 << 17) - 2 if item[0] in b"[{" else (1 << 22) // (len(item) + 1) - 4
    path.write_bytes(b'{"a":[' + b",".join([item] * count) + b"]}")
    tracemalloc.start()
    read_config(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20
