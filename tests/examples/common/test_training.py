# SPDX-License-Identifier: Apache-2.0
"""The optimizer of the scripts, and what transformers' courses make of its rates."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from tests.tiny import upernet
from tests.tuner.test_parameter_groups import scale_of_the_source


def test_a_polynomial_course_ends_at_lr_end() -> None:
    training = importlib.import_module("common.training")
    ready, args = prepared("full")
    rates = training.Rates(backbone=2e-3, head=4e-3, added=2e-3)
    optimizer = training.make_optimizer(ready, rates, args)
    kwargs = {"power": 1.0, "lr_end": 1e-3}

    scheduler = get_scheduler("polynomial", optimizer, 0, 10, scheduler_specific_kwargs=kwargs)
    seen = []
    for _ in range(11):
        seen.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()

    assert seen[0] == pytest.approx([4e-3, 2e-3])
    assert seen[5] == pytest.approx([2.5e-3, 1.25e-3])
    assert seen[10] == pytest.approx([1e-3, 0.5e-3])


def prepared(method: str, **options: Any) -> tuple[Any, Any]:
    """Return a small task model made ready for a method, and the run's arguments."""
    shared = importlib.import_module("common.arguments").SharedArguments
    args = shared(method=method, budget=0.2, weight_decay=0.1, **options)
    torch.manual_seed(0)
    return importlib.import_module("common.methods").prepare_method(upernet(), args), args


def groups_of(ready: Any, args: Any) -> dict[str, dict[str, Any]]:
    """Return the optimizer's group of each trained parameter by name."""
    training = importlib.import_module("common.training")
    rates = training.pick_rates(args, adapters=1.0, full=2.0, head=3.0)
    optimizer = training.make_optimizer(ready, rates, args)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {n: p for n, p in ready.model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == set(group_of)
    return {name: group_of[id(p)] for name, p in trained.items()}


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        ("sfa", {"sfa_pool": 1e-5, "sfa_down": 1e-4, "sfa_up": 1e-4}),
        ("internal", {"sfa_pool": 1e-5}),
        ("external", {"sfa_down": 1e-4, "sfa_up": 1e-4}),
        ("random", {"sfa_pool": 1e-5}),
        ("gps", {"sfa_pool": 1e-5}),
        ("lora", {"lora_A": 1e-4, "lora_B": 1e-4}),
        ("shira", {"shira_weight": 1e-5}),
        ("super_tuning", {"supertuning_values": 1e-5}),
        ("bitfit", {"backbone.": 1e-5}),
        ("ssf", {".ssf.": 1e-4}),
        ("vpt", {".prompts": 1e-4}),
        ("adaptformer", {".down.": 1e-4, ".up.": 1e-4}),
        ("adapter_plus", {".adapter_plus.": 1e-4}),
        ("mona", {".mona.": 1e-4}),
        ("full", {"backbone.": 1e-5}),
    ],
)
def test_pretrained_weights_and_new_layers_have_rates_of_their_own(
    method: str, rates: dict[str, float]
) -> None:
    ready, args = prepared(
        method, learning_rate=1e-5, external_learning_rate=1e-4, head_learning_rate=1e-3
    )
    groups = groups_of(ready, args)

    seen = set()
    for name, group in groups.items():
        kinds = [kind for kind in rates if kind in name]
        assert len(kinds) == ("decode_head" not in name), name
        assert group["lr"] == (rates[kinds[0]] if kinds else 1e-3)
        seen.update(kinds)
    assert seen == set(rates)


def test_without_a_rate_of_their_own_new_layers_have_that_of_the_backbone() -> None:
    for options, wanted in (({}, 1.0), ({"learning_rate": 1e-5}, 1e-5)):
        groups = groups_of(*prepared("sfa", **options))
        assert {g["lr"] for n, g in groups.items() if "sfa_" in n} == {wanted}


def test_norms_biases_and_embeddings_are_spared_weight_decay_where_asked() -> None:
    def free(*kinds: str, method: str = "sfa") -> set[str]:
        groups = groups_of(*prepared(method, no_decay=list(kinds)))
        assert {group["weight_decay"] for group in groups.values()} <= {0.0, 0.1}
        return {name for name, group in groups.items() if group["weight_decay"] == 0}

    assert free() == set()
    norms, biases = free("norms"), free("biases")
    assert norms
    assert all("batch_norm" in name for name in norms)
    assert all(name.endswith("bias") for name in biases)
    assert any("sfa_up" in name for name in biases)
    assert any("classifier" in name for name in biases)
    assert free("norms", "biases") == norms | biases
    assert not any("sfa_pool" in name for name in norms | biases)
    assert any("backbone" in name for name in free("norms", method="full"))


def test_queries_are_spared_weight_decay_as_embeddings() -> None:
    training = importlib.import_module("common.training")
    example = importlib.import_module("semantic_segmentation")
    args = example.Arguments(
        head="mask2former", hidden_size=32, method="full", weight_decay=0.1, no_decay=["embeddings"]
    )
    ready = importlib.import_module("common.methods").prepare_method(
        example.build_model(args, 3), args
    )

    optimizer = training.make_optimizer(ready, training.Rates(1.0, 1.0, 1.0), args)
    spared = {id(p) for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}

    assert {n for n, p in ready.model.named_parameters() if id(p) in spared} == {
        "model.pixel_level_module.decoder.level_embed",
        "model.transformer_module.queries_embedder.weight",
        "model.transformer_module.queries_features.weight",
        "model.transformer_module.level_embed.weight",
    }


@pytest.mark.parametrize(
    "method", ["sfa", "external", "lora", "ssf", "vpt", "adaptformer", "mona", "full"]
)
def test_layer_decay_lowers_the_rates_of_every_method(method: str) -> None:
    ready, args = prepared(method, learning_rate=1.0, layer_decay=0.5)

    for name, group in groups_of(ready, args).items():
        plain = name.removeprefix("base_model.model.")
        if "sfa_pool" in name:
            assert group["lr"] == 0.5  # of the last block, the ratios are beside it
            assert (max(group["sfa_lr_ratios"]), min(group["sfa_lr_ratios"])) == (1, 0.5**7)
        elif plain.startswith("backbone."):
            assert group["lr"] == scale_of_the_source(plain, [1, 1, 2, 1], 0.5), name
        else:
            assert group["lr"] == 3.0


def test_sfas_options_reach_its_config() -> None:
    options = {"schedule": "cubic", "select_until": 0.5, "internal_lr_ratio": 0.1}
    options |= {"external_type": "mona"}
    ready, _ = prepared("sfa", adapter_dim=3, **options)
    config = ready.model.peft_config["default"]

    assert {name: getattr(config, name) for name in options} == options
    assert (config.adapter_dim, config.rho) == (3, None)
    widths = [
        p.shape[0] for n, p in ready.model.named_parameters() if "sfa_down" in n and p.ndim > 1
    ]
    assert set(widths) == {3}


def test_adaptformer_has_the_width_that_is_asked_for_within_the_budget() -> None:
    errors = importlib.import_module("sfa_peft")
    ready, _ = prepared("adaptformer", adapter_dim=5)
    widths = {p.shape[0] for n, p in ready.model.named_parameters() if ".down.weight" in n}
    assert widths == {5}
    with pytest.raises(errors.BudgetError, match=r"--adapter_dim 200: --budget 0.2 allows"):
        prepared("adaptformer", adapter_dim=200)
