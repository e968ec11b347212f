# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc

import torch
from safetensors.torch import load_file

from sfa_peft.sparse.pairs import PAIRS
from sfa_peft.tuner.adapted_layers import find_pool
from sfa_peft.tuner.layer import SFALayer
from tests.tasks.models import NAMES, output, segmentation_model


def test_memory_is_what_the_model_holds(bank, folders):
    memory = bank.memory()
    for name in NAMES:
        tensors = load_file(folders[name] / "adapter_model.safetensors")
        size = {"external": 0, "head": 0}
        for key, tensor in tensors.items():
            if ".sfa_packed" not in key:
                size["external" if ".sfa_" in key else "head"] += tensor.nbytes
        got = memory[name]
        pool = find_pool(bank[name].model, name)
        assert got.values == (0 if pool is None else pool.values.nbytes)
        assert got.positions == (0 if pool is None else pool.slots.nbytes)
        assert got.external == size["external"]
        # Beside the trained head: what the model has outside the backbone and does not save.
        assert size["head"] <= got.head <= 1.2 * size["head"] + 4096
        assert got.total == sum([got.values, got.positions, got.external, got.head, got.switching])


def test_what_is_kept_for_switching_is_counted(bank):
    """Against the garbage collector's list of all tensors that there are."""
    for name in [*NAMES, *NAMES]:
        output(bank, name)
    found = sum(task.switching for task in bank.memory().values())
    gc.collect()
    before, pairs = storages(), PAIRS.nbytes
    for module in bank.backbone.modules():
        if isinstance(module, SFALayer):
            module._forget()
    for name in NAMES:
        pool = find_pool(bank[name].model, name)
        if pool is not None:
            pool.free_room()
    gc.collect()
    left = storages()
    freed = sum(size for pointer, size in before.items() if pointer not in left)
    pairs -= PAIRS.nbytes  # of two tasks each, within a bound for all: no task's
    assert pairs > 0
    assert 0 < found <= freed - pairs <= found + 4096


def storages() -> dict[int, int]:
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    kinds = [t.untyped_storage() for t in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in kinds if storage.data_ptr()}


def test_the_backbone_is_counted_once_and_without_adapters(bank):
    plain = segmentation_model().backbone
    size = sum(t.nbytes for t in [*plain.parameters(), *plain.buffers()])
    assert bank.backbone_bytes == size
    output(bank, "depth")
    assert bank.backbone_bytes == size
    assert bank.memory()["depth"].switching > 0
