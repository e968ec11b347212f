# SPDX-License-Identifier: Apache-2.0
from xml.etree import ElementTree

import pytest
import torch
from peft import get_peft_model

from sfa_peft import SFAConfig, TargetError, budget_report, plot_selection, selection_summary
from sfa_peft.model_card import html_table
from sfa_peft.tuner.adapted_layers import find_pool
from sfa_peft.tuner.report import card_facts, stage_shares
from tests.reference import masks_of
from tests.tiny import MLP, upernet


@pytest.fixture(scope="module")
def model():
    config = SFAConfig(budget=0.2, score="random", modules_to_save=["decode_head"])
    return get_peft_model(upernet(), config)


def test_the_report_adds_up_and_counts_what_really_trains(model):
    report = budget_report(model)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad)
    assert report.external + report.internal + report.head == trained
    assert report.external + report.internal <= report.allowed <= 0.2 * report.backbone
    backbone = sum(p.numel() for p in upernet().backbone.parameters())
    assert report.backbone == backbone
    assert report.head == sum(p.numel() for p in upernet().decode_head.parameters())
    assert report.selected == report.internal
    assert report.paper_backbone == backbone + 1000 * (128 + 1)


def test_the_printed_report_names_widths_by_stage_and_both_ways_of_counting(model):
    text = str(budget_report(model))
    for part in ("backbone", "external adapters", "selected weights", "not counted", "stage 4"):
        assert part in text
    assert "counted as in the paper, with a 1000-class head" in text


def cells_of(html):
    """The texts of a table, row by row."""
    table = ElementTree.fromstring(html)
    return [[cell.text or "" for cell in row] for row in table]


def test_a_notebook_shows_report_and_summary_as_tables(model):
    report, rows = budget_report(model), selection_summary(model)
    shown = {name: number for name, number, _ in cells_of(report._repr_html_())}
    assert shown["backbone"] == f"{report.backbone:,}"
    assert shown["external and selected"] == f"{report.external + report.internal:,}"
    assert shown["task head"] == f"{report.head:,}"
    head, *found = cells_of(rows._repr_html_())
    assert head == ["name", "parameter", "role", "numel", "selected", "share"]
    assert [row[0] for row in found] == [row["name"] for row in rows]
    assert [row[4] for row in found] == [f"{row['selected']:,}" for row in rows]
    assert html_table(["a"], [["<b> & c"]]) == (
        '<table><tr><th style="text-align:left">a</th></tr>'
        '<tr><td style="text-align:left">&lt;b&gt; &amp; c</td></tr></table>'
    )


def test_the_summary_has_a_row_per_weight_tensor_that_equals_the_masks(model):
    rows = selection_summary(model)
    masks = masks_of(find_pool(model, "default"))
    assert [f"{row['name']}.{row['parameter']}" for row in rows] == list(masks)
    for row in rows:
        mask = masks[f"{row['name']}.{row['parameter']}"]
        assert (row["numel"], row["selected"]) == (mask.numel(), int(mask.sum()))
        assert row["share"] == row["selected"] / row["numel"]
    assert {row["role"] for row in rows} == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
    assert sorted({row["layer"] for row in rows}) == [0, 1, 2, 3, 4]


def test_the_papers_model_is_planned_on_the_meta_device_without_any_memory():
    with torch.device("meta"):
        large = upernet(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])
        tuned = get_peft_model(large, SFAConfig(budget=0.05, modules_to_save=["decode_head"]))
    report = budget_report(tuned)
    assert report.backbone == 86_891_768  # without the final norm of Swinv2Model
    assert 0.99 * report.allowed <= report.external + report.internal <= report.allowed
    assert report.selected == 0
    assert len(selection_summary(tuned)) == 6 * 24


def test_external_only_has_no_rows_and_a_bare_model_is_refused():
    external = get_peft_model(upernet(), SFAConfig(rho=1, modules_to_save=["decode_head"]))
    assert selection_summary(external) == []
    assert budget_report(external).internal == 0
    for function in (selection_summary, budget_report):
        with pytest.raises(TargetError, match="no SFA adapter named `default`"):
            function(MLP())


def test_all_counts_are_one_count(model):
    pool = find_pool(model, "default")
    facts = card_facts(model, SFAConfig(budget=0.2), "default")
    report = budget_report(model)
    rows = selection_summary(model)
    assert facts.selected == report.selected == pool.num_assigned
    assert facts.selected == sum(row["selected"] for row in rows)
    assert sum(s.eligible for s in facts.stages) == sum(row["numel"] for row in rows)
    assert {s.stage: list(s.widths) for s in facts.stages} == report.widths
    assert (facts.external, facts.to_select) == (report.external, report.internal)
    masks = masks_of(pool)
    by_stage = {}
    for name, mask in masks.items():
        stage = int(name.split("encoder.layers.")[1].split(".")[0])
        by_stage.setdefault(f"stage{stage + 1}", []).append(mask.reshape(-1).float())
    shares = stage_shares(model, "default")
    assert shares.keys() == by_stage.keys()
    for stage, found in by_stage.items():
        assert shares[stage] == pytest.approx(torch.cat(found).mean().item(), rel=1e-5)


def test_layers_of_no_known_stage_are_counted_as_others():
    config = SFAConfig(rho=0, score="random", target_modules=["first", "second"])
    plain = get_peft_model(MLP(), config)
    rows = selection_summary(plain)
    share = sum(row["selected"] for row in rows) / sum(row["numel"] for row in rows)
    assert stage_shares(plain, "default") == {"other": share}


def test_a_model_is_drawn_as_its_rows_are(model, tmp_path):
    plot_selection(model, tmp_path / "model.png")
    plot_selection(selection_summary(model), tmp_path / "rows.png")
    assert (tmp_path / "model.png").read_bytes() == (tmp_path / "rows.png").read_bytes()
    with pytest.raises(TargetError, match="no SFA adapter named `other`"):
        plot_selection(model, tmp_path / "other.png", "other")
    assert not (tmp_path / "other.png").exists()
