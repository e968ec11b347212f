# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing, however it is switched on."""

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from sfa_peft import SelectionError, SFACallback, SFAConfig, SFASelector, SFAWarning
from sfa_peft.tuner.adapted_layers import find_pool
from tests.behaviour.test_precision import assert_same, trained
from tests.model_zoo import FAMILIES, pixels
from tests.training.trainer_runs import make_trainer
from tests.whole_life import outputs


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    return ViTForImageClassification(ViTConfig(**sizes, num_labels=3))


class Labelled(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 3}


def train_classifier(out, prepare=None, wrapped=None, **changes):
    base = classifier()
    if prepare:
        prepare(base)
    config = SFAConfig(budget=0.2, selection_steps=2, modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    if wrapped:
        wrapped(model)
    options = {"model": model, "data": Labelled(), "max_steps": 6}
    make_trainer(out, [SFACallback()], **options, **changes).train()
    return find_pool(model, "default")


def checkpointing(**options):
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}


def switch_on(model, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


NEWER_NAME = "ignore:.*gradient_checkpointing.*:FutureWarning"


@pytest.mark.filterwarnings(NEWER_NAME)
@pytest.mark.parametrize("where", ["arguments", "before wrapping", "after wrapping"])
def test_reentrant_checkpointing_is_refused_and_the_other_kind_changes_no_bit(tmp_path, where):
    def options(reentrant: bool):
        return {
            "arguments": checkpointing(use_reentrant=reentrant),
            "before wrapping": {"prepare": lambda m: switch_on(m, reentrant)},
            "after wrapping": {"wrapped": lambda m: switch_on(m, reentrant)},
        }[where]

    with pytest.raises(SelectionError, match='"use_reentrant": False'):
        train_classifier(tmp_path, **options(True))
    assert_same(train_classifier(tmp_path, **options(False)), train_classifier(tmp_path))


@pytest.mark.filterwarnings(NEWER_NAME)
def test_reentrant_checkpointing_after_the_selector_was_made_is_refused():
    config = SFAConfig(budget=0.2, selection_steps=2, modules_to_save=["classifier"])
    model = get_peft_model(classifier(), config)
    selector = SFASelector(model, total_steps=4)
    switch_on(model, True)
    with pytest.raises(SelectionError, match='"use_reentrant": False'):
        selector.step(torch.optim.AdamW(trained(model)))


@pytest.mark.filterwarnings(NEWER_NAME)
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_before_wrapping_works_with_every_family_that_has_it(family):
    """PEFT's hook wants a tensor of the patch embeddings, where hierarchical ones give a tuple."""

    batch = {"pixel_values": pixels(family)}

    def gradients(checkpointed):
        torch.manual_seed(0)
        base = FAMILIES[family]()
        if not base.supports_gradient_checkpointing:
            pytest.skip("has no gradient checkpointing")
        if checkpointed:
            switch_on(base, False)
        config = SFAConfig(budget=0.2, score="random", init_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SFAWarning)  # heads stay frozen here
            model = get_peft_model(base, config).train()
        sum(t.nan_to_num().square().mean() for t in outputs(model, batch)).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert found.keys() == expected.keys()
    assert any(grad.any() for grad in expected.values())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
