# SPDX-License-Identifier: Apache-2.0
"""Norms between a backbone and a head: their values, and that they belong to the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import sfa_peft
from sfa_peft.dense import MapNorm, NormedFeatures
from tests.tiny import images, upernet


def normed_upernet() -> nn.Module:
    model = upernet()
    torch.manual_seed(1)
    model.decode_head = NormedFeatures(model.decode_head, model.backbone.channels)
    return model.eval()


def test_a_map_is_normalised_at_each_place() -> None:
    torch.manual_seed(0)
    norm, maps = MapNorm(6), torch.randn(2, 6, 3, 4) * 5 + 2
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)

    found = norm(maps)

    for image in range(2):
        for row in range(3):
            for column in range(4):
                values = maps[image, :, row, column]
                spread = ((values - values.mean()) ** 2).mean()
                wanted = (values - values.mean()) / (spread + 1e-5).sqrt()
                wanted = wanted * norm.weight + norm.bias
                torch.testing.assert_close(found[image, :, row, column], wanted)


def test_the_head_gets_normalised_maps_and_everything_else_as_before() -> None:
    seen = []

    class Head(nn.Module):
        def forward(self, features, extra, *, named):
            seen.append((features, extra, named))
            return "result"

    maps = [torch.randn(1, 4, 2, 2), torch.randn(1, 8, 1, 1)]
    module = NormedFeatures(Head(), [4, 8])

    assert module(maps, 3, named=5) == "result"
    assert module(hidden_states=maps, extra=3, named=5) == "result"
    for features, extra, named in seen:
        assert (extra, named) == (3, 5)
        for norm, given, taken in zip(module.norms, maps, features, strict=True):
            assert torch.equal(norm(given), taken)
    with pytest.raises(sfa_peft.SFAError, match=r"built for 2 feature maps, got 1"):
        module(maps[:1])


def test_norms_are_trained_counted_and_saved_with_the_head(tmp_path: Path) -> None:
    channels = upernet().backbone.channels
    config = sfa_peft.SFAConfig(budget=0.2, modules_to_save=["decode_head"], selection_steps=2)
    plain = sfa_peft.budget_report(get_peft_model(upernet(), config))
    model = get_peft_model(normed_upernet(), config)
    report = sfa_peft.budget_report(model)

    assert report.head == plain.head + 2 * sum(channels)
    assert (report.backbone, report.internal) == (plain.backbone, plain.internal)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    selector = sfa_peft.SFASelector(model, total_steps=6)
    for seed in range(6):
        model(**images(seed=seed)).loss.backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    norms = [m for m in model.modules() if isinstance(m, MapNorm) and m.weight.requires_grad]
    assert len(norms) == len(channels)
    assert all((norm.weight != 1).any() for norm in norms)

    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(normed_upernet(), tmp_path).eval()
    pixels = images()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)
