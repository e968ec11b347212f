# SPDX-License-Identifier: Apache-2.0
"""The one reader: how often a load reads, checks, parses and hashes, and a save hashes."""

from collections import Counter

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import AdapterFileError, SFAConfig
from sfa_peft.files import adapter_config as record
from sfa_peft.files import folder, packing
from sfa_peft.tuner.adapted_layers import find_pool
from sfa_peft.tuner.upstream import save_and_load as files
from tests.tiny import MLP

NUM_TENSORS = 2


@pytest.fixture
def counts(monkeypatch):
    """Count calls of what costs time in proportion to files and weights."""
    record._KNOWN.clear()
    found: Counter[str] = Counter()

    def count(module, name, what):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            found[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(folder, "safe_open", "files opened")
    count(files, "safe_open", "files opened")
    count(folder, "checksum", "files checked")
    count(folder, "read_packed", "selections parsed")
    count(packing, "_read_manifest", "manifests parsed")
    count(packing, "decode_entries", "selections decoded")
    count(record, "_digest", "tensors hashed")
    return found


def save(where, **options):
    config = SFAConfig(
        budget=0.2, rho=0, score="random", target_modules=["first", "second"], **options
    )
    model = get_peft_model(MLP(), config)
    with torch.no_grad():
        find_pool(model, "default").values.normal_()
    model.save_pretrained(where)
    return where


def once(chain: int = 1) -> dict[str, int]:
    """Return the counts of a load by a process that has not met the base."""
    per_adapter = dict.fromkeys(
        (
            "files opened",
            "files checked",
            "selections parsed",
            "manifests parsed",
            "selections decoded",
        ),
        chain,
    )
    return per_adapter | {"tensors hashed": NUM_TENSORS}


def forget(counts) -> None:
    """Begin as a process that has read and hashed nothing."""
    record._KNOWN.clear()
    counts.clear()


def test_loading_reads_checks_and_parses_once_and_hashes_each_tensor_once(counts, tmp_path):
    save(tmp_path / "one")
    forget(counts)
    PeftModel.from_pretrained(MLP(), tmp_path / "one")
    assert counts == once()


def test_loading_beside_another_adapter_too(counts, tmp_path):
    save(tmp_path / "one")
    model = PeftModel.from_pretrained(MLP(), tmp_path / "one")
    forget(counts)
    model.load_adapter(tmp_path / "one", "two")
    assert counts == once()


def test_a_continued_adapter_costs_that_once_for_each_of_the_chain(counts, tmp_path):
    save(tmp_path / "one")
    save(tmp_path / "two", continue_from=str(tmp_path / "one"))
    save(tmp_path / "three", continue_from=str(tmp_path / "two"))
    forget(counts)
    PeftModel.from_pretrained(MLP(), tmp_path / "three")
    assert counts == once(chain=3)


def test_a_base_is_hashed_once_however_often_adapters_are_saved_and_loaded(counts, tmp_path):
    types = len(record.digests(torch.zeros(1)))  # a float32 base may be loaded in 16 bits
    forget(counts)
    save(tmp_path / "one")
    assert counts["tensors hashed"] == NUM_TENSORS * types
    model = PeftModel.from_pretrained(MLP(), tmp_path / "one")
    for name in ("two", "three"):
        model.save_pretrained(tmp_path / name, selected_adapters=["default"])
        model.load_adapter(tmp_path / name, name)
    assert counts["tensors hashed"] == NUM_TENSORS * types


def _through_data(weight):
    weight.data[1, 2] += 1


def _through_numpy(weight):
    weight.detach().numpy()[1, 2] += 1


def _last_bit(weight):
    weight.data.view(torch.int32)[-1, -1] ^= 1


def _signs(weight):
    weight.data.neg_()


def _swapped(weight):
    weight.data[:2] = weight.data[:2].flip(0)


def _replaced(weight):
    weight.data = weight.data.clone().add_(1)


@pytest.mark.parametrize(
    "change", [_through_data, _through_numpy, _last_bit, _signs, _swapped, _replaced]
)
def test_a_base_that_was_changed_unseen_by_torch_is_hashed_anew(change, tmp_path):
    model = PeftModel.from_pretrained(MLP(), save(tmp_path / "one"))
    model.base_model.disable_adapter_layers()  # so that weights hold the base
    weight = model.base_model.model.second.base_layer.weight
    before = weight._version
    change(weight)
    assert weight._version == before
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(AdapterFileError, match="other pretrained weights: `second"):
        PeftModel.from_pretrained(MLP(), tmp_path / "two")
    other = MLP()
    with torch.no_grad():
        other.second.weight.copy_(weight)
    PeftModel.from_pretrained(other, tmp_path / "two")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, (1 << 18) - 1, (1 << 18) + 13])
def test_no_byte_of_a_content_is_left_out_of_what_tells_it_apart(size):
    data = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
    found = {record._sums(data)}
    places = {*range(min(size, 9)), *range(max(0, size - 9), size), *range(size)[::40_001]}
    for place in places:
        for bit in range(8):
            data[place] ^= 1 << bit
            found.add(record._sums(data))
            data[place] ^= 1 << bit
    assert len(found) == 8 * len(places) + 1
    assert record._sums(data) in found
