# SPDX-License-Identifier: Apache-2.0
"""Rates and decay by part and layer, against dense training with an optimizer group per layer."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sfa_peft import (
    ConfigError,
    ParameterGroupWarning,
    SFACallback,
    SFAConfig,
    SFAError,
    SFASelector,
    parameter_groups,
)
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import DenseReference, assert_same, masks_of, step_where
from tests.tiny import images, upernet
from tests.training.trainer_runs import make_trainer

BETAS, EPS = (0.9, 0.999), 1e-3  # an eps that keeps rounding of tiny gradients small
DECAY = 0.7
TOTAL, ROUND = 12, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(12, 12), "fc2": nn.Linear(12, 12)})

    def forward(self, x):
        return x + self.mlp["fc2"](torch.tanh(self.mlp["fc1"](x)))


class Stack(nn.Module):
    """Three numbered blocks of no known backbone, with a layer before them and one after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(12, 12)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


#: How many layers each parameter of the stack is below the top, counted by hand.
BELOW = {"stem": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "head": 0}


def rate_of(name):
    return DECAY ** next(below for start, below in BELOW.items() if name.startswith(start))


def build(base=None, **options):
    settings = {
        "budget": 0.4,
        "rho": 0,
        "target_modules": ["stem", "fc1", "fc2", "head"],
        "selection_steps": ROUND,
        "select_until": 1,
    }
    model = get_peft_model(base or Stack(), SFAConfig(**(settings | options)))
    return model, find_pool(model, "default")


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 12, generator=generator)
    y = torch.randint(0, 4, (8,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("score", ["accumulated_gradient", "weight_difference"])
def test_every_step_equals_a_dense_reference_with_a_rate_for_each_layer(score, decay, ratio):
    base = Stack()
    dense = copy.deepcopy(base).requires_grad_(False)
    model, pool = build(base, score=score, internal_lr_ratio=ratio)
    parameters = dict(dense.named_parameters())
    reference = DenseReference(
        {n: parameters[n] for n in pool.names}, pool.size, TOTAL, ROUND, score=score
    )
    selector = SFASelector(model, total_steps=TOTAL)
    groups = parameter_groups(model, 1e-2, weight_decay=decay, layer_decay=DECAY)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, TOTAL)
    for step in range(TOTAL):
        course = scheduler.get_last_lr()[0] / 1e-2
        for net in (model, dense):
            loss_of(net, step).backward()
        optimizer.step()
        selector.step(optimizer)
        scheduler.step()
        optimizer.zero_grad()
        rates = {n: 1e-2 * ratio * course * rate_of(n) for n in pool.names}
        reference.step(rates, decay, BETAS, EPS)
        assert_same(pool, reference)
    assert pool.num_assigned == pool.size
    spans = [span for own in pool.layout() for span in own]
    assert len(spans) > len(pool.names)  # some have slots of several picks


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4),
    "AdamW-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-4),
    "SGD": lambda p: torch.optim.SGD(p, lr=5e-2, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=1e-3),
}


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_as_it_trains_dense_weights_with_a_group_per_layer(name, decay):
    model, pool = build(score="random", weight_decay_on="weight")
    dense = Stack().requires_grad_(False)
    weights = {n: p.requires_grad_() for n, p in dense.named_parameters() if n in pool.names}
    pretrained = {n: w.detach().clone() for n, w in weights.items()}
    masks, lr = masks_of(pool), 2e-2
    own = OPTIMIZERS[name](
        [{"params": [w], "lr": lr * rate_of(n), "weight_decay": decay} for n, w in weights.items()]
    )
    groups = parameter_groups(model, lr, weight_decay=decay, layer_decay=DECAY)
    optimizer = OPTIMIZERS[name](groups)
    for step in range(TOTAL):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(dense, step).backward()
        step_where(own, weights, masks, pretrained)
    model(torch.randn(2, 12))
    for n, weight in weights.items():
        live = model.base_model.model.get_submodule(n.rpartition(".")[0]).base_layer.weight
        torch.testing.assert_close(live.detach(), weight.detach(), rtol=0, atol=1e-6)
        assert not torch.allclose(weight.detach(), pretrained[n], atol=1e-3)


def test_the_uppermost_layer_takes_the_optimizers_own_step_to_the_bit_and_others_to_rounding():
    model, pool = build(score="random")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, 1e-2, weight_decay=0.1, layer_decay=DECAY), eps=EPS
    )
    parts = {n: nn.Parameter(torch.zeros(pool.count(i))) for i, n in enumerate(pool.names)}
    own = torch.optim.AdamW(
        [{"params": [p], "lr": 1e-2 * rate_of(n)} for n, p in parts.items()],
        weight_decay=0.1,
        eps=EPS,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        pool.values.grad = torch.randn(pool.size, generator=generator)
        for part, spans in zip(parts.values(), pool.layout(), strict=True):
            part.grad = torch.cat([pool.values.grad[a:b] for a, b in spans])
        optimizer.step()
        own.step()
    for (n, part), spans in zip(parts.items(), pool.layout(), strict=True):
        found = torch.cat([pool.values.detach()[a:b] for a, b in spans])
        if n.startswith("head"):
            assert torch.equal(found, part.detach())
        torch.testing.assert_close(found, part.detach(), rtol=1e-5, atol=1e-8)


def test_ratios_come_back_with_the_optimizers_state_and_belong_to_its_pool_only():
    model, pool = build(score="random")
    layered = torch.optim.AdamW(parameter_groups(model, 1e-2, layer_decay=DECAY))
    plain = torch.optim.AdamW(parameter_groups(model, 1e-2))
    wanted = layered.param_groups[0]["sfa_lr_ratios"]
    assert wanted == pytest.approx([rate_of(n) for n in pool.names])
    assert plain.param_groups[0]["sfa_lr_ratios"] == [1.0] * len(pool.names)
    plain.load_state_dict(copy.deepcopy(layered.state_dict()))
    assert plain.param_groups[0]["sfa_lr_ratios"] == wanted

    other, _ = build(target_modules=["fc1"], budget=0.2, score="random")
    foreign = torch.optim.AdamW(parameter_groups(other, 1e-2, layer_decay=DECAY))
    foreign.load_state_dict(layered.state_dict())
    loss_of(other, 0).backward()
    with pytest.raises(
        SFAError, match=r"rates for 8 weights, but adapter `default` selects from 3"
    ):
        foreign.step()


# --- which rate, which decay ---------------------------------------------------------------------


def rates_by_name(model, groups):
    names = {id(p): n for n, p in model.named_parameters()}
    flat = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(flat) == len(dict(flat))  # each once
    return dict(flat)


def scale_of_the_source(name, depths, factor):
    """The rule of SimMIM and MIM-Depth for a SwinV2, from names: patch merging is a layer."""
    top = sum(depths) + len(depths)
    block = re.match(r"backbone\.encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)", name)
    if "embeddings" in name:
        layer = 0
    elif block is None:
        layer = top
    else:
        stage = int(block[1])
        ordinal = depths[stage] if block[2] is None else int(block[2])
        layer = 1 + sum(depths[:stage]) + stage + ordinal
    return factor ** (top - layer)


def test_full_fine_tuning_of_swinv2_has_the_rates_of_the_source():
    model = upernet()
    found = rates_by_name(model, parameter_groups(model, 1e-3, layer_decay=0.9, head_lr=2e-3))
    assert set(found) == {n for n, _ in model.named_parameters()}
    for name, (rate, _) in found.items():
        inside = name.startswith("backbone.")
        scale = scale_of_the_source(name, [1, 1, 2, 1], 0.9) if inside else 1
        assert rate == pytest.approx((1e-3 if inside else 2e-3) * scale), name
    assert (
        len({rate for rate, _ in found.values()}) == 10
    )  # embeddings, 5 blocks, 3 mergers, the head


def test_norms_biases_and_embeddings_do_not_decay_unless_asked():
    model = upernet()
    found = rates_by_name(model, parameter_groups(model, 1e-3, weight_decay=0.05))
    for name, parameter in model.named_parameters():
        plain = parameter.ndim > 1 and not name.endswith("logit_scale")
        assert found[name] == (1e-3, 0.05 if plain else 0.0), name
    everything = parameter_groups(model, 1e-3, weight_decay=0.05, no_decay=())
    assert [(g["lr"], g["weight_decay"]) for g in everything] == [(1e-3, 0.05)]


def test_each_kind_can_be_spared_decay_alone():
    model = nn.Module()
    model.norm, model.linear, model.queries = nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Embedding(2, 4)
    model.gamma, model.cls_token = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1, 1, 4))

    def spared(*kinds):
        groups = parameter_groups(model, 1e-3, weight_decay=0.05, no_decay=kinds)
        return {n for n, (_, decay) in rates_by_name(model, groups).items() if decay == 0}

    assert spared("norms") == {"norm.weight", "norm.bias", "gamma"}
    assert spared("biases") == {"norm.bias", "linear.bias"}
    assert spared("embeddings") == {"queries.weight", "cls_token"}
    assert spared("norms", "biases", "embeddings") == {
        n for n, _ in model.named_parameters() if n != "linear.weight"
    }


def test_head_external_adapters_and_selected_weights_have_rates_of_their_own():
    config = SFAConfig(budget=0.3, modules_to_save=["decode_head"])
    model = get_peft_model(upernet(), config)
    groups = parameter_groups(
        model, 1e-3, weight_decay=0.05, head_lr=4e-3, external_lr=3e-3, internal_lr=2e-3
    )
    assert [g["lr"] for g in groups] == sorted((g["lr"] for g in groups), reverse=True)
    found = rates_by_name(model, groups)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, (rate, decay) in found.items():
        if "sfa_pool" in name:
            assert (rate, decay) == (2e-3, 0.05)
        else:
            assert rate == (3e-3 if "sfa_" in name else 4e-3), name
            matrix = model.get_parameter(name).ndim > 1
            assert decay == (0.05 if matrix else 0.0), name


def test_layers_of_external_adapters_and_of_lora_count_like_their_blocks():
    sfa = get_peft_model(upernet(), SFAConfig(budget=0.3, rho=1, modules_to_save=["decode_head"]))
    lora = LoraConfig(r=2, target_modules=["query", "q_proj"], modules_to_save=["decode_head"])
    for model in (sfa, get_peft_model(upernet(), lora)):
        new = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
        groups = parameter_groups(model, 1e-2, layer_decay=0.9, external_lr=1e-3, new_layers=new)
        found = rates_by_name(model, groups)
        assert len({rate for rate, _ in found.values()}) == 6  # the head and 5 blocks
        for name, (rate, _) in found.items():
            plain = name.removeprefix("base_model.model.")
            inside = plain.startswith("backbone.")
            scale = scale_of_the_source(plain, [1, 1, 2, 1], 0.9) if inside else 1
            assert rate == pytest.approx(1e-3 * scale if inside else 1e-2), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected a finite number of 0 or more, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number"),
        ({"internal_lr": float("inf")}, "internal_lr: expected a finite number"),
        ({"layer_decay": 0.0}, r"layer_decay: expected a factor in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.1}, r"layer_decay: expected a factor in \(0, 1\], got 1.1"),
        ({"no_decay": ["norm"]}, r"no_decay: expected some of \['norms', .* got \['norm'\]"),
        ({"head_lr": 1.0}, "head_lr is given, but nothing outside the backbone is trained"),
        ({"internal_lr": 1e-3}, r"internal_lr=0.001, but SFAConfig.internal_lr_ratio=2.0 sets"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(options, message):
    model, _ = build(internal_lr_ratio=2.0)
    with pytest.raises(ConfigError, match=message):
        parameter_groups(model, **({"lr": 1e-3} | options))


def test_layer_decay_of_a_model_without_numbered_blocks_is_refused():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"the order of layers is not known.* Sequential"):
        parameter_groups(plain, 1e-3, layer_decay=0.9)
    assert len(parameter_groups(plain, 1e-3)) == 1


# --- rules by names and shapes -------------------------------------------------------------------


NORMS = {
    "budget": 5e-4,
    "rho": 0,
    "target_modules": [],
    "target_parameters": ["layernorm_before.weight"],
    "modules_to_save": ["decode_head"],
}


def test_the_trainers_own_groups_take_a_selection_in_norms_for_a_norm_which_a_warning_says(
    tmp_path,
):
    trainer = make_trainer(tmp_path, [SFACallback()], NORMS, weight_decay=0.05)
    with pytest.warns(ParameterGroupWarning, match=r"do not decay, .*\(weight_decay=0.05\)"):
        trainer.train()


def train(folder, resume=None, **changes):
    """Train as the documentation says; return the optimizer's groups of the selected weights."""
    model = get_peft_model(upernet(), SFAConfig(**NORMS, selection_steps=3))
    groups = parameter_groups(model, 1e-2, weight_decay=0.05, layer_decay=0.5)
    optimizers = torch.optim.AdamW(groups), None
    changes |= {"model": model, "optimizers": optimizers, "save_steps": 6}
    trainer = make_trainer(folder, [SFACallback()], **changes)
    trainer.train(resume_from_checkpoint=resume)
    pool = find_pool(trainer.model, "default")
    (group,) = [g for g in trainer.optimizer.param_groups if "sfa_lr_ratios" in g]
    assert [id(p) for p in group["params"]] == [id(pool.values)]
    assert group["weight_decay"] == 0.05
    return trainer.model, pool


def test_a_trainer_with_these_groups_decays_them_and_resumes_to_the_bit(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParameterGroupWarning)
        straight, pool = train(tmp_path / "straight")
        train(tmp_path / "cut", save_strategy="steps")
        checkpoint = str(tmp_path / "cut" / "checkpoint-6")
        resumed, again = train(tmp_path / "rest", resume=checkpoint)
    assert pool.num_assigned == pool.size > 0
    assert torch.equal(pool.slots, again.slots)
    for (name, a), (_, b) in zip(
        straight.named_parameters(), resumed.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_rates_by_layers_names_are_said_to_reach_selected_weights_at_one_rate():
    config = SFAConfig(budget=0.3, modules_to_save=["decode_head"], score="random")
    model = get_peft_model(upernet(), config)
    by_name = [
        {
            "params": [p],
            "lr": 1e-3 * scale_of_the_source(n[len("base_model.model.") :], [1, 1, 2, 1], 0.9),
        }
        for n, p in model.named_parameters()
        if p.requires_grad
    ]
    model(**images()).loss.backward()
    with pytest.warns(ParameterGroupWarning, match="has 6 learning rates, and all selected"):
        torch.optim.AdamW(by_name).step()
    with warnings.catch_warnings():  # what it suggests
        warnings.simplefilter("error", ParameterGroupWarning)
        other = get_peft_model(upernet(), config)
        other(**images()).loss.backward()
        torch.optim.AdamW(parameter_groups(other, lr=1e-3, layer_decay=0.9)).step()
