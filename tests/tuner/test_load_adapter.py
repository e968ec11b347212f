# SPDX-License-Identifier: Apache-2.0
"""The one reader: how often a load reads, checks, parses and hashes, and a save hashes."""

from collections import Counter

import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import SFAConfig
from sfa_peft.files import adapter_config as record
from sfa_peft.files import folder, packing
from sfa_peft.tuner.adapted_layers import find_pool
from sfa_peft.tuner.upstream import save_and_load as files
from tests.tiny import MLP

NUM_TENSORS = 2


@pytest.fixture
def counts(monkeypatch):
    """Count calls of what costs time in proportion to files and weights."""
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
    return per_adapter | {"tensors hashed": NUM_TENSORS * chain}


def test_loading_reads_checks_and_parses_once_and_hashes_each_tensor_once(counts, tmp_path):
    save(tmp_path / "one")
    counts.clear()
    PeftModel.from_pretrained(MLP(), tmp_path / "one")
    assert counts == once()


def test_loading_beside_another_adapter_too(counts, tmp_path):
    save(tmp_path / "one")
    model = PeftModel.from_pretrained(MLP(), tmp_path / "one")
    counts.clear()
    model.load_adapter(tmp_path / "one", "two")
    assert counts == once()


def test_a_continued_adapter_costs_that_once_for_each_of_the_chain(counts, tmp_path):
    save(tmp_path / "one")
    save(tmp_path / "two", continue_from=str(tmp_path / "one"))
    save(tmp_path / "three", continue_from=str(tmp_path / "two"))
    counts.clear()
    PeftModel.from_pretrained(MLP(), tmp_path / "three")
    assert counts == once(chain=3)


def test_saving_takes_the_digests_of_each_tensor_once(counts, tmp_path):
    model = PeftModel.from_pretrained(MLP(), save(tmp_path / "one"))
    counts.clear()
    model.save_pretrained(tmp_path / "again")
    types = len(record.digests(torch.zeros(1)))  # a float32 base may be loaded in 16 bits
    counts["tensors hashed"] -= types
    assert counts == {"files checked": 1, "tensors hashed": NUM_TENSORS * types}
