# SPDX-License-Identifier: Apache-2.0
"""Each method trains what it should, within its budget, and is the same after loading."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sfa_peft.backbones import find_backbone, role_modules
from tests.tiny import images, upernet

METHODS = ("frozen", "sfa", "internal", "external", "lora", "adaptformer", "full")


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
    assert torch.equal(before, untouched)  # every adapter starts neutral

    train(ready)

    limits = {"frozen": (0, 0), "full": (1, 1)}.get(method, (0.1, 0.2))
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


def test_a_file_of_another_model_is_refused(methods: ModuleType, tmp_path: Path) -> None:
    args = arguments("frozen")
    methods.save_method(methods.prepare_method(upernet(), args), args, tmp_path)
    other = upernet()
    del other.decode_head.classifier
    with pytest.raises(methods.SFAError, match="not of this model"):
        methods.load_method(other, args, tmp_path)


@pytest.mark.parametrize("budget", [0.03, 0.1, 0.2, 0.5])
def test_the_largest_rank_and_width_within_the_budget_are_taken(
    budget: float, methods: ModuleType
) -> None:
    backbone = find_backbone(upernet())
    assert backbone is not None
    size = sum(p.numel() for p in backbone.module.parameters())
    roles = role_modules(backbone)
    layers = [backbone.module.get_submodule(r.name.removeprefix("backbone.")) for r in roles]
    per_rank = sum(sum(layer.weight.shape) for layer in layers)
    rank = methods.lora_config(backbone, budget, ["decode_head"]).r
    assert rank * per_rank <= budget * size < (rank + 1) * per_rank

    widths = [
        layer.out_features for layer, r in zip(layers, roles, strict=True) if r.role == "mlp_out"
    ]

    def cost(width: int) -> int:
        capped = [(features, min(width, features)) for features in widths]
        return sum(2 * features * w + w + features for features, w in capped)

    width = methods.adaptformer_width(backbone, budget)
    assert cost(width) <= budget * size
    assert width == max(widths) or cost(width + 1) > budget * size


def test_adaptformer_adds_a_scaled_branch_beside_the_mlp() -> None:
    adaptformer = importlib.import_module("common.adaptformer")
    model = upernet()
    backbone = find_backbone(model)
    assert backbone is not None
    adaptformer.add_adapters(backbone, width=5)
    block = model.backbone.encoder.layers[2].blocks[1]
    adapter = block.output.dense
    torch.manual_seed(0)
    for parameter in (*adapter.down.parameters(), *adapter.up.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, adapter.down.in_features)

    with torch.no_grad():
        found = block.output(block.intermediate(x))
        hidden = torch.nn.functional.gelu(block.intermediate.dense.base_layer(x))
        mlp = adapter.base_layer(hidden)
        inner = (x @ adapter.down.weight.T + adapter.down.bias).clamp_min(0)
        branch = inner @ adapter.up.weight.T + adapter.up.bias

    assert torch.allclose(found, mlp + 0.1 * branch, atol=1e-6)
    assert adapter.down.out_features == 5
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained
    assert all(".down." in name or ".up." in name for name in trained)


def test_the_head_is_all_that_lies_beside_the_backbone(methods: ModuleType) -> None:
    example = importlib.import_module("semantic_segmentation")
    args = example.Arguments(head="mask2former", hidden_size=32)
    model = example.build_model(args, 3)
    backbone = find_backbone(model)
    assert backbone is not None
    head = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in backbone.module.parameters()
    )
    for method in ("sfa", "lora", "frozen"):
        ready = methods.prepare_method(example.build_model(args, 3), arguments(method))
        assert sum(p.numel() for p in ready.head) == head
