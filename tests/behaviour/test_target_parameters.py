# SPDX-License-Identifier: Apache-2.0
"""Entries of norms, biases, patch embedding and merging: selected, trained, saved, merged."""

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from sfa_peft import (
    SFAConfig,
    SFASelector,
    TargetError,
    budget_report,
    register_score,
    selection_summary,
)
from sfa_peft.selection import scores
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import masks_of
from tests.tiny import MLP, images, upernet

HEAD = {"modules_to_save": ["decode_head"]}
ENDS = ["layernorm_before.weight", "bias", "projection.weight", "reduction.weight"]
CONFIG = {"budget": 0.3, "selection_steps": 2, "target_parameters": ENDS, **HEAD}


def names_of(model):
    return find_pool(model, "default").names


def logits(model, seed=9):
    with torch.no_grad():
        return model(**images(seed=seed)).logits


@pytest.fixture(scope="module")
def trained():
    model = get_peft_model(upernet(), SFAConfig(**CONFIG))
    selector = SFASelector(model, total_steps=5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        model(**images(seed=step)).loss.backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return model.eval()


def test_names_by_their_end_reach_every_kind_of_parameter_and_no_head():
    names = names_of(get_peft_model(upernet(), SFAConfig(**CONFIG)))
    start = "backbone.encoder.layers.0."
    assert {
        "backbone.embeddings.patch_embeddings.projection.weight",
        "backbone.embeddings.patch_embeddings.projection.bias",
        "backbone.embeddings.norm.bias",
        start + "blocks.0.layernorm_before.weight",
        start + "blocks.0.layernorm_before.bias",
        start + "blocks.0.attention.self.query.bias",
        start + "blocks.0.intermediate.dense.weight",
        start + "downsample.reduction.weight",
    } <= set(names)
    assert "backbone.embeddings.norm.weight" not in names
    assert start + "blocks.0.attention.self.key.bias" not in names  # there is none
    assert all(name.startswith("backbone.") for name in names)  # decode_head has biases as well
    assert len(set(names)) == len(names)


def test_one_regular_expression_matches_whole_names():
    regex = r".*blocks\.\d\.layernorm_(before|after)\.(weight|bias)"
    names = names_of(get_peft_model(upernet(), SFAConfig(target_parameters=regex, **HEAD)))
    assert sum("layernorm" in n for n in names) == 5 * 4
    assert sum("layernorm" not in n for n in names) == 5 * 6  # the default layers stay


def test_parameters_may_be_all_there_is():
    config = SFAConfig(budget=0.01, rho=0, target_modules=[], target_parameters=["bias"], **HEAD)
    assert {n.rpartition(".")[2] for n in names_of(get_peft_model(upernet(), config))} == {"bias"}


def test_the_wrapped_model_equals_the_base_to_the_bit_and_nothing_is_said():
    expected = logits(upernet().eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
        model = get_peft_model(upernet(), SFAConfig(**CONFIG)).eval()
    assert torch.equal(logits(model), expected)


def test_training_changes_selected_entries_only_and_some_of_every_kind(trained):
    logits(trained)
    pool, base = find_pool(trained, "default"), dict(upernet().named_parameters())
    assert pool.num_assigned == pool.values.numel()
    changed = set()
    for ordinal, (name, mask) in enumerate(masks_of(pool).items()):
        differs = pool.weights[ordinal].tensor.detach() != base[name]
        assert not (differs & ~mask).any(), name
        if differs.any():
            changed |= {end for end in ENDS if name.endswith(end)}
    assert changed == set(ENDS)


def test_saved_and_reloaded_it_gives_the_same_bits(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    resolved = json.loads((tmp_path / "adapter_config.json").read_text())["resolved"]
    assert [t["name"] for t in resolved["tensors"]] == names_of(trained)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(upernet(), tmp_path, low_cpu_mem_usage=low).eval()
        assert names_of(loaded) == names_of(trained)
        assert torch.equal(logits(loaded), logits(trained))
        assert torch.equal(find_pool(loaded, "default").slots, find_pool(trained, "default").slots)


def test_merging_keeps_the_output_and_unmerging_the_pretrained_bits(trained):
    expected = logits(trained)
    trained.merge_adapter()
    assert torch.equal(logits(trained), expected)
    trained.unmerge_adapter()
    base = dict(upernet().named_parameters())
    pool = find_pool(trained, "default")
    for ordinal, name in enumerate(pool.names):
        assert torch.equal(pool.weights[ordinal].tensor, base[name])
    assert torch.equal(logits(trained), expected)
    with trained.disable_adapter():
        backbone = trained.base_model.model.backbone
        pixels = images(seed=9)["pixel_values"]
        pairs = zip(
            backbone(pixels).feature_maps,
            upernet().eval().backbone(pixels).feature_maps,
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_summary_has_a_row_per_parameter_and_the_budget_counts_them(trained):
    rows, pool = selection_summary(trained), find_pool(trained, "default")
    assert [f"{r['name']}.{r['parameter']}" for r in rows] == pool.names
    assert sum(r["selected"] for r in rows) == pool.num_assigned
    for row, mask in zip(rows, masks_of(pool).values(), strict=True):
        assert (row["selected"], row["numel"]) == (int(mask.sum()), mask.numel())
        assert row["share"] == row["selected"] / row["numel"]
    report = budget_report(trained)
    assert report.external + report.internal == report.allowed
    resolved = pool.store.layer.adapters["default"].record
    assert [(t.name, t.shape) for t in resolved.tensors] == [
        (n, tuple(pool.weights[i].tensor.shape)) for i, n in enumerate(pool.names)
    ]


def test_excluded_layers_and_those_saved_whole_are_left_out():
    excluded = SFAConfig(target_parameters=["bias"], exclude_modules=["query", "norm"], **HEAD)
    names = names_of(get_peft_model(upernet(), excluded))
    assert any(n.endswith(".value.bias") for n in names)
    assert not any(".query." in n or ".norm." in n for n in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["norm.weigth"]}, r"no parameter .* matches \['norm\.weigth'\]"),
        ({"target_parameters": ["bias", "nope", "zilch"]}, r"matches \['nope', 'zilch'\]"),
        ({"target_parameters": ["rm.bias"]}, r"matches \['rm\.bias'\]"),
        ({"target_parameters": r"layernorm_before\.weight"}, "one regular expression for whole"),
        ({"target_parameters": ["classifier.bias"]}, "modules_to_save"),
        (
            {"target_parameters": ["query.bias"], "exclude_modules": ["query"]},
            "check exclude_modules",
        ),
        (
            {"target_parameters": ["logit_scale"]},
            r"attention\.self` \(Swinv2SelfAttention\) holds other layers.*\['logit_scale'\]",
        ),
    ],
)
def test_a_name_that_finds_nothing_or_cannot_be_wrapped_is_refused(options, message):
    with pytest.raises(TargetError, match=message):
        get_peft_model(upernet(), SFAConfig(**options, **HEAD))


def test_a_tied_parameter_is_refused():
    tied = MLP()
    tied.second.bias = tied.first.bias
    with pytest.raises(TargetError, match=r"`first`: its bias is shared by `first\.bias`"):
        get_peft_model(
            tied, SFAConfig(rho=0, target_modules=["head"], target_parameters=["first.bias"])
        )


def test_a_parameter_that_is_none_is_not_there():
    model = MLP()
    model.second = nn.Linear(16, 16, bias=False)
    config = SFAConfig(budget=0.1, rho=0, target_modules=["first"], target_parameters=["bias"])
    assert names_of(get_peft_model(model, config)) == ["first.weight", "first.bias", "head.bias"]


def test_rows_of_biases_and_weights_compete_together(tmp_path):
    config = SFAConfig(
        budget=0.3,
        rho=0,
        score="magnitude",
        granularity="row",
        target_modules=["first"],
        target_parameters=["first.bias"],
        init_weights=False,
    )
    model = get_peft_model(MLP(), config)
    masks = masks_of(find_pool(model, "default"))
    rows = masks["first.weight"].sum(1)
    assert set(rows.tolist()) == {0, 12}
    x = torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(MLP(), tmp_path)(x), model(x))


def test_an_adapter_of_an_own_score_loads_without_the_registration(tmp_path):
    register_score("mine", lambda w, g, s: s.add_(g.abs()))
    model = get_peft_model(
        MLP(), SFAConfig(rho=0, target_modules=["first"], selection_steps=1, score="mine")
    )
    selector, pool = SFASelector(model, total_steps=3), find_pool(model, "default")
    optimizer = torch.optim.SGD([pool.values], lr=0.1)
    x = torch.randn(3, 12)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
    model.save_pretrained(tmp_path)
    del scores._SCORES["mine"]
    loaded = PeftModel.from_pretrained(MLP(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].score == "mine"
    assert torch.equal(loaded(x), model(x))
    assert SFASelector(loaded).schedule is None  # a finished selection trains on
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(PeftModel.from_pretrained(MLP(), tmp_path / "again")(x), model(x))
