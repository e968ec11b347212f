# SPDX-License-Identifier: Apache-2.0
import pytest

from sfa_peft import AdapterFileError
from sfa_peft.files.manifest import append_manifest, split_manifest
from sfa_peft.files.record import SavedTensor
from tests.files.golden import BLOB

TENSORS = (
    SavedTensor("a.weight", (2, 3), "float32", {"float32": "00ff"}),
    SavedTensor("b.bias", (4,)),
)


def test_names_and_digests_travel_with_a_blob():
    data = append_manifest(BLOB, TENSORS)
    assert split_manifest(data, "x") == (BLOB, TENSORS)
    assert split_manifest(BLOB, "x") == (BLOB, None)


def test_every_damaged_byte_of_it_is_refused():
    data = append_manifest(BLOB, TENSORS)
    for place in range(len(BLOB), len(data)):
        damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        with pytest.raises(AdapterFileError, match="x: the list of tensors"):
            split_manifest(damaged, "x")
    for end in range(len(BLOB) + 1, len(data)):
        with pytest.raises(AdapterFileError, match="x: the list of tensors"):
            split_manifest(data[:end], "x")
