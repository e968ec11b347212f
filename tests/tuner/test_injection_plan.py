# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Swinv2ForImageClassification

from sfa_peft import BudgetError, SFAConfig, SFALayer, SFAWarning, TargetError, budget_report
from tests.processes import run_code
from tests.tiny import MLP, swinv2_config, upernet

HEAD = {"modules_to_save": ["decode_head"]}


def layers_of(model) -> dict[str, SFALayer]:
    return {m.name: m for m in model.modules() if isinstance(m, SFALayer)}


def test_by_default_attention_and_mlp_of_the_backbone_are_adapted_and_nothing_else():
    layers = layers_of(get_peft_model(upernet(), SFAConfig(**HEAD)))
    assert len(layers) == 6 * 5
    assert all(name.startswith("backbone.encoder.layers.") for name in layers)
    outputs = [name for name, layer in layers.items() if "default" in layer.sfa_down]
    assert all(name.endswith("output.dense") for name in outputs)
    assert len(outputs) == 2 * 5


def test_exclude_modules_and_layers_to_transform_work_as_everywhere_in_peft():
    excluded = layers_of(get_peft_model(upernet(), SFAConfig(exclude_modules=["key"], **HEAD)))
    assert not any(name.endswith("key") for name in excluded)
    chosen = SFAConfig(layers_to_transform=[2], layers_pattern="layers", **HEAD)
    kept = layers_of(get_peft_model(upernet(), chosen))
    assert kept
    assert all(name.startswith("backbone.encoder.layers.2.") for name in kept)


@pytest.mark.parametrize("targets", [["query", "value"], r".*\.(query|value)"])
def test_target_modules_take_suffixes_or_one_regular_expression(targets):
    config = SFAConfig(budget=0.05, target_modules=targets, rho=0, **HEAD)
    layers = layers_of(get_peft_model(upernet(), config))
    assert {name.rpartition(".")[2] for name in layers} == {"query", "value"}


def test_targets_that_end_no_sub_layer_mean_selected_weights_only_with_a_warning():
    config = SFAConfig(budget=0.02, target_modules=["query"], **HEAD)
    with pytest.warns(SFAWarning, match="the whole budget goes to selected weights"):
        model = get_peft_model(upernet(), config)
    assert budget_report(model).external == 0
    with pytest.raises(BudgetError, match=r"rho=0\.5 asks for external adapters"):
        get_peft_model(upernet(), SFAConfig(target_modules=["query"], rho=0.5, **HEAD))


def test_any_model_with_linear_layers_works_and_names_of_timm_have_roles():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "head": nn.Linear(8, 2)})
    total = sum(p.numel() for p in model["blocks"].parameters())
    config = SFAConfig(target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
    tuned = get_peft_model(model, config)
    report = budget_report(tuned)
    assert report.backbone == total
    assert report.external > 0
    assert report.external + report.internal == report.allowed


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SFAConfig(), "Please specify `target_modules`.*known vision backbone.*Linear"),
        (SFAConfig(target_modules=["nowhere"]), "match target_modules=.*nowhere"),
        (SFAConfig(target_modules=["first"], exclude_modules=["first"]), "no layer to adapt found"),
    ],
)
def test_a_model_in_which_nothing_is_found_is_refused_with_what_is_there(config, message):
    with pytest.raises(TargetError, match=message):
        get_peft_model(MLP(), config)


def test_a_layer_type_that_cannot_be_wrapped_is_named():
    with pytest.raises(TargetError, match=r"is a \w*LayerNorm; only torch\.nn\.Linear"):
        get_peft_model(upernet(), SFAConfig(target_modules=["layernorm_before"], rho=0, **HEAD))
    packed = MLP()
    packed.first.weight = nn.Parameter(packed.first.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"packed \(quantised\) weight"):
        get_peft_model(packed, SFAConfig(target_modules=["first"], rho=0))


def test_a_layer_of_another_tuner_is_refused():
    model = get_peft_model(MLP(), LoraConfig(target_modules=["first"]))
    with pytest.raises(TargetError, match="already wrapped by Linear"):
        get_peft_model(model.base_model.model, SFAConfig(target_modules=["first"], rho=0))


def test_a_forgotten_head_is_reported():
    with pytest.warns(SFAWarning, match=r"outside the backbone stay frozen.*decode_head"):
        get_peft_model(upernet(), SFAConfig())


def test_a_budget_that_cannot_be_spent_is_reported():
    config = SFAConfig(budget=0.5, target_modules=["query"], rho=0, **HEAD)
    with pytest.warns(SFAWarning, match="Only .* of the .* parameters that budget=0.5"):
        get_peft_model(upernet(), config)


def test_a_shared_weight_is_refused_and_a_computed_one_too():
    tied = MLP()
    tied.second.weight = tied.first.weight = nn.Parameter(torch.randn(16, 16))
    with pytest.raises(TargetError, match="`first`: its weight is shared by"):
        get_peft_model(tied, SFAConfig(rho=0, target_modules=["first"]))
    twice = MLP()
    twice.third = twice.second
    with pytest.raises(TargetError, match="its weight is shared by"):
        get_peft_model(twice, SFAConfig(rho=0, target_modules=["second"]))
    computed = MLP()
    nn.utils.parametrizations.weight_norm(computed.first)
    with pytest.raises(TargetError, match="`first` computes its weight"):
        get_peft_model(computed, SFAConfig(rho=0, target_modules=["first"]))


def lying(layer, memory: torch.Tensor, first: int) -> None:
    """Make a layer's weight a view of memory."""
    count = layer.weight.numel()
    layer.weight = nn.Parameter(memory[first : first + count].view_as(layer.weight))


@pytest.mark.parametrize("first", [-255, -16, 0, 16, 255])
def test_weights_that_are_views_of_one_memory_are_refused(first, tmp_path):
    options = {"rho": 0, "score": "random", "target_modules": ["second"]}
    get_peft_model(MLP(), SFAConfig(**options)).save_pretrained(tmp_path)
    model, memory = MLP(), torch.randn(1000)
    model.third = nn.Linear(16, 16)
    lying(model.second, memory, 300)
    lying(model.third, memory, 300 + first)
    pair = " and ".join(sorted(("`second.weight`", "`third.weight`"), reverse=first < 0))
    message = f"`second`: its weight is shared by {pair}"
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, SFAConfig(**options))
    with pytest.raises(TargetError, match=message):
        PeftModel.from_pretrained(model, tmp_path, config=insisting(tmp_path))
    buffered = MLP()
    buffered.register_buffer("shown", buffered.second.weight.detach()[3, 4:6])
    with pytest.raises(TargetError, match=r"`second\.weight` and `shown`"):
        get_peft_model(buffered, SFAConfig(**options))


def insisting(folder) -> SFAConfig:
    config = SFAConfig.from_pretrained(folder)
    config.check_base = False
    return config


def test_neighbours_in_one_memory_are_not_shared():
    model, memory = MLP(), torch.randn(1000)
    lying(model.first, memory, 100)
    lying(model.second, memory, 100 + model.first.weight.numel())
    options = {"target_modules": ["first", "second"], "external_modules": ["second"]}
    get_peft_model(model, SFAConfig(score="random", **options))
    both = MLP()
    both.third = nn.Linear(16, 16)
    for layer in (both.second, both.third):
        lying(layer, memory, 0)  # external adapters only: nothing is written
    get_peft_model(both, SFAConfig(rho=1, **{name: ["second"] for name in options}))


def test_one_config_serves_models_of_different_sizes():
    config = SFAConfig(**HEAD)
    small = budget_report(get_peft_model(upernet(), config))
    large = budget_report(get_peft_model(upernet(embed_dim=32), config))
    assert large.allowed > 2 * small.allowed
    assert large.external + large.internal == large.allowed
    first = get_peft_model(upernet(), config)
    report = budget_report(first)
    get_peft_model(upernet(embed_dim=32), config)
    assert budget_report(first) == report == small


def test_a_second_adapter_gets_the_same_budget_as_it_would_alone():
    model = Swinv2ForImageClassification(swinv2_config(num_labels=3))
    alone = budget_report(get_peft_model(model, SFAConfig(modules_to_save=["classifier"])))
    both = get_peft_model(
        Swinv2ForImageClassification(swinv2_config(num_labels=3)),
        SFAConfig(budget=0.1, modules_to_save=["classifier"]),
    )
    both.add_adapter("second", SFAConfig(modules_to_save=["classifier"]))
    assert budget_report(both, "second") == alone


def test_registering_twice_is_harmless_and_a_taken_name_is_reported():
    from sfa_peft import SFAError
    from sfa_peft.config import SFAConfig as Config
    from sfa_peft.tuner.model import SFAModel
    from sfa_peft.tuner.upstream.peft_type import register

    register(Config, SFAModel)
    with pytest.raises(SFAError, match="already has a method named SFA"):
        register(Config, type("Another", (SFAModel,), {}))


def test_the_type_is_a_true_member_of_pefts_enum():
    script = (
        "import sfa_peft, pickle; from peft.utils import PeftType;"
        "m = PeftType('SFA');"
        "assert m is PeftType.SFA and m.value == m.name == 'SFA' and m in list(PeftType);"
        "assert pickle.loads(pickle.dumps(m)) is m; print('ok')"
    )
    run = run_code(script)
    assert "ok" in run.stdout, run.stderr
