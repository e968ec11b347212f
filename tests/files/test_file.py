# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfa_peft import AdapterFileError
from sfa_peft.files.folder import (
    WEIGHTS_NAME,
    check_complete,
    check_selection,
    check_tensors,
)


def test_a_whole_file_and_a_folder_without_one_pass(tmp_path):
    check_complete(tmp_path)
    save_file({"a": torch.arange(5), "b": torch.zeros(0)}, tmp_path / WEIGHTS_NAME)
    check_complete(tmp_path)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = tmp_path / WEIGHTS_NAME
    save_file({"a": torch.arange(5)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterFileError, match=WEIGHTS_NAME):
            check_complete(tmp_path)
    path.write_bytes(whole + b"x")
    with pytest.raises(AdapterFileError, match="cut short or damaged"):
        check_complete(tmp_path)


@given(data=st.binary(max_size=200), header=st.booleans())
def test_hostile_bytes_give_the_one_clear_error(tmp_path_factory, data, header):
    folder = tmp_path_factory.mktemp("hostile")
    start = len(data).to_bytes(8, "little") if header else b""
    (folder / WEIGHTS_NAME).write_bytes(start + data)
    assume(not (header and data.startswith(b"{")))  # might be a file without tensors
    with pytest.raises(AdapterFileError, match="cut short or damaged"):
        check_complete(folder)


@pytest.mark.parametrize(
    "header", [[], {"a": 1}, {"a": {}}, {"a": {"data_offsets": [0]}}, {"a": {"data_offsets": "xy"}}]
)
def test_a_header_of_another_shape_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS_NAME).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(AdapterFileError):
        check_complete(tmp_path)


def test_tensors_must_be_there_with_the_shape_they_had():
    check_tensors([["a", [2, 3]]], {"a": (2, 3), "b": (1, 1)})
    with pytest.raises(AdapterFileError, match="changes `c`, which this model does not have"):
        check_tensors([["c", [2, 3]]], {"a": (2, 3)})
    with pytest.raises(AdapterFileError, match=r"`a` has shape \[3, 2\] here"):
        check_tensors([["a", [2, 3]]], {"a": (3, 2)})


@given(st.lists(st.integers(-3, 12), max_size=8))
def test_positions_pass_exactly_if_distinct_in_range_and_free_only_at_the_end(positions):
    slots, values = torch.tensor(positions, dtype=torch.int64), torch.zeros(len(positions))
    used = [p for p in positions if p >= 0]
    fine = (
        all(-1 <= p < 10 for p in positions)
        and len(set(used)) == len(used)
        and positions[: len(used)] == used
    )
    if fine:
        check_selection("x", slots, values, 10)
    else:
        with pytest.raises(AdapterFileError, match=r"^x: "):
            check_selection("x", slots, values, 10)
