# SPDX-License-Identifier: Apache-2.0
"""Each method trains what it should, within its budget, and is the same after loading."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sfa_peft.backbones import find_backbone
from tests.tiny import images, upernet

METHODS = (
    *("frozen", "sfa", "internal", "external", "random", "gps", "lora", "shira", "super_tuning"),
    *("bitfit", "ssf", "vpt", "adaptformer", "adapter_plus", "mona", "full"),
)
NOT_NEUTRAL = ("ssf", "vpt", "adapter_plus", "mona")  # as their authors start them
SHARES = {"frozen": (0, 0), "full": (1, 1), "bitfit": (0.001, 0.1), "ssf": (0.001, 0.1)}


@pytest.fixture
def methods() -> ModuleType:
    return importlib.import_module("common.methods")


def arguments(method: str, **changes: Any) -> Any:
    shared = importlib.import_module("common.arguments").SharedArguments
    return shared(method=method, budget=0.2, **changes)


def train(ready: Any, steps: int = 4) -> None:
    """Take steps large enough that every trained number moves."""
    import sfa_peft

    ready.model.train()
    optimizer = torch.optim.AdamW([*ready.head, *ready.adapted], lr=1e-2)
    selector = sfa_peft.SFASelector(ready.model, total_steps=steps) if ready.callbacks else None
    for seed in range(steps):
        ready.model(**images(seed=seed)).loss.backward()
        optimizer.step()
        if selector is not None:
            selector.step(optimizer)
        optimizer.zero_grad()
    ready.model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_its_share_and_is_the_same_after_loading(
    method: str, methods: ModuleType, tmp_path: Path
) -> None:
    args = arguments(method)
    torch.manual_seed(0)
    ready = methods.prepare_method(upernet(), args)
    batch = images()
    with torch.no_grad():
        before = ready.model.eval()(batch["pixel_values"]).logits
        untouched = upernet().eval()(batch["pixel_values"]).logits
    assert torch.equal(before, untouched) == (method not in NOT_NEUTRAL)

    train(ready)

    limits = SHARES.get(method, (0.1, 0.2))
    assert limits[0] <= ready.share <= limits[1]
    trained = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in (*ready.head, *ready.adapted))
    head = sum(p.numel() for p in upernet().decode_head.parameters())
    assert sum(p.numel() for p in ready.head) == head
    methods.save_method(ready, args, tmp_path)
    size = methods.saved_size(tmp_path)
    assert size == sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) > 4 * head
    with torch.no_grad():
        loaded = methods.load_method(upernet(), args, tmp_path)(batch["pixel_values"]).logits
        assert torch.equal(loaded, ready.model(batch["pixel_values"]).logits)
    assert not torch.equal(loaded, before)
    methods.check_loaded_again(ready, upernet(), args, tmp_path, batch["pixel_values"])
    with torch.no_grad():
        ready.head[0].add_(1)
    with pytest.raises(methods.SFAError, match="puts out something else"):
        methods.check_loaded_again(ready, upernet(), args, tmp_path, batch["pixel_values"])


def test_a_file_of_another_model_method_or_size_is_refused(
    methods: ModuleType, tmp_path: Path
) -> None:
    def written(**options: Any) -> tuple[Any, Path]:
        args = arguments(**options)
        folder = tmp_path / "_".join(map(str, options.values()))
        methods.save_method(methods.prepare_method(upernet(), args), args, folder)
        return args, folder

    frozen, folder = written(method="frozen")
    other = upernet()
    del other.decode_head.classifier
    narrow, _ = written(method="adapter_plus", adapter_dim=2)
    _, wide = written(method="adapter_plus", adapter_dim=3)
    for model, args, path in (
        (other, frozen, folder),
        (upernet(), narrow, folder),
        (upernet(), frozen, wide),
        (upernet(), narrow, wide),
    ):
        with pytest.raises(methods.SFAError, match="not of this model, method and budget"):
            methods.load_method(model, args, path)


def test_every_method_of_the_scripts_is_tried(methods: ModuleType) -> None:
    assert set(METHODS) == set(importlib.import_module("common.arguments").METHODS)


def test_every_trained_number_gets_a_gradient(methods: ModuleType) -> None:
    for method in METHODS:
        torch.manual_seed(0)
        ready = methods.prepare_method(upernet(), arguments(method))
        if method in NOT_NEUTRAL:
            ready.model(**images()).loss.backward()
        else:  # behind a branch that starts at zero
            train(ready, steps=2)
            ready.model.train()(**images()).loss.backward()
        silent = [
            n for n, p in ready.model.named_parameters() if p.requires_grad and p.grad is None
        ]
        assert silent == [], method
        assert all(p.grad is None for p in ready.model.parameters() if not p.requires_grad), method


def test_gps_gives_each_output_feature_as_many_weights(methods: ModuleType) -> None:
    import sfa_peft

    torch.manual_seed(0)
    ready = methods.prepare_method(upernet(), arguments("gps"))
    train(ready)
    (module,) = [m for m in ready.model.modules() if isinstance(m, sfa_peft.SFALayer)][:1]
    pool = module.adapters["default"].pool
    counts = {}
    for ordinal, name in enumerate(pool.names):
        weight = pool.weights[ordinal].tensor
        chosen = torch.zeros(weight.numel(), dtype=torch.int64)
        for a, b in pool.layout()[ordinal]:
            chosen[pool.slots[a:b] - pool.starts[ordinal]] = 1
        counts[name] = chosen.view(weight.shape[0], -1).sum(1)
    assert not any("norm" in name for name in counts)
    assert all(c.min() == 1 for name, c in counts.items() if name.endswith("bias"))
    wide = [c for name, c in counts.items() if name.endswith("weight") and "position" not in name]
    rows = torch.cat(wide)
    sizes = dict(zip(pool.names, [w.tensor[0].numel() for w in pool.weights], strict=True))
    most = int(rows.max())
    for name, count in counts.items():
        assert (count >= min(most - 1, sizes[name])).all(), name


def test_the_head_is_all_that_lies_beside_the_backbone(methods: ModuleType) -> None:
    example = importlib.import_module("semantic_segmentation")
    args = example.Arguments(head="mask2former", hidden_size=32)
    model = example.build_model(args, 3)
    backbone = find_backbone(model)
    assert backbone is not None
    head = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in backbone.module.parameters()
    )
    for method in ("sfa", "lora", "mona", "frozen"):
        ready = methods.prepare_method(example.build_model(args, 3), arguments(method))
        assert sum(p.numel() for p in ready.head) == head
