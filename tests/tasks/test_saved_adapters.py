# SPDX-License-Identifier: Apache-2.0
"""What is read off files alone, against the models that wrote them."""

import json

import pytest
import torch
from peft import get_peft_model

from sfa_peft import AdapterFileError, SFAConfig, selection_summary
from sfa_peft.tasks import diff, inspect, overlaps
from sfa_peft.tasks.saved_adapters import plot_saved
from sfa_peft.tuner.adapted_layers import adapter_layers, find_pool
from tests.reference import deltas_of, masks_of
from tests.task_folder import plain_model, save_backbone, save_task


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=[{}, {"rho": 0}, {"rho": 1}], ids=str)
def saved(request, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "task"
    return folder, save_task(folder, backbone, **request.param)


def test_a_report_counts_what_the_model_holds(saved):
    folder, model = saved
    report = inspect(folder)
    rows = selection_summary(model)
    assert report.selected == sum(row["selected"] for row in rows)
    assert list(report.rows) == rows
    layers = adapter_layers(model, "default")
    assert sum(part.layers for part in report.parts) == len(layers)
    for part in report.parts:
        inside = [m for m in layers if (m.stage, m.role) == (part.stage, part.role)]
        assert part.layers == len(inside)
        external = [p for m in inside for h in (m.sfa_down, m.sfa_up) for p in h.parameters()]
        assert part.external == sum(p.numel() for p in external)
    head = model.get_base_model().decode_head.modules_to_save["default"]
    assert report.head == sum(t.numel() for t in head.state_dict().values())
    assert report.total == sum(p.numel() for p in model.get_base_model().backbone.parameters()) - (
        sum(p.numel() for n, p in model.named_parameters() if "sfa_" in n)
    )


def test_bits_are_those_of_the_file(saved):
    folder, _ = saved
    report = inspect(folder)
    bits = (report.position_bits + report.value_bits) * report.selected
    assert bits <= 8 * report.selection_nbytes
    if report.selected:  # headers and the list of tensors are left out
        assert bits > 0.3 * 8 * report.selection_nbytes
        assert report.values == "float32"
    assert report.base.endswith("/backbone")  # of task.json
    json.dumps(report.to_dict())
    assert f"{report.selected:,}" in str(report)


def test_positions_of_a_16_bit_adapter_need_no_base(backbone, tmp_path):
    model = get_peft_model(
        plain_model(backbone).bfloat16(), SFAConfig(budget=0.1, rho=0, score="random")
    )
    with torch.no_grad():
        find_pool(model, "default").values.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    report = inspect(tmp_path)
    assert report.values == "ulps_bfloat16"
    assert report.dtypes == ("bfloat16",)
    wanted = [row["selected"] for row in selection_summary(model)]
    assert [row["selected"] for row in report.rows] == wanted


def test_overlaps_are_those_of_masks(backbone, tmp_path):
    models = {f"t{i}": save_task(tmp_path / f"t{i}", backbone, seed=i, rho=0) for i in range(3)}
    masks = {name: masks_of(find_pool(model, "default")) for name, model in models.items()}
    found = overlaps([tmp_path / name for name in models])
    assert len(found) == 3
    for (one, two), share in found.items():
        a, b = (masks[path.rpartition("/")[2]] for path in (one, two))
        both = sum(int((a[n] & b[n]).sum()) for n in a.keys() & b.keys())
        smaller = min(sum(int(m.sum()) for m in side.values()) for side in (a, b))
        assert share == both / smaller
    path = tmp_path / "overlap.png"
    assert plot_saved([tmp_path / name for name in models], path) == found
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_difference_is_one_of_config_selection_and_tensors(backbone, tmp_path):
    one = save_task(tmp_path / "one", backbone, rho=0)
    two = save_task(tmp_path / "two", backbone, rho=0, seed=1)
    save_task(tmp_path / "again", backbone, rho=0)
    same = diff(tmp_path / "one", tmp_path / "again")
    assert same.same
    assert same.shared == find_pool(one, "default").size
    report = diff(tmp_path / "one", tmp_path / "two")
    assert not report.same
    assert report.config == {"seed": (0, 1)}
    a, b = (masks_of(find_pool(model, "default")) for model in (one, two))
    assert report.shared == sum(int((a[n] & b[n]).sum()) for n in a.keys() & b.keys())
    assert report.only_first == sum(int(m.sum()) for m in a.values()) - report.shared
    assert any("decode_head" in name for name in report.tensors)
    json.dumps(report.to_dict())


def test_other_changes_at_the_same_places_are_a_difference(backbone, tmp_path):
    model = save_task(tmp_path / "one", backbone, rho=0)
    with torch.no_grad():
        find_pool(model, "default").values.mul_(1.5)
    model.save_pretrained(tmp_path / "two")
    report = diff(tmp_path / "one", tmp_path / "two")
    assert (report.only_first, report.only_second) == (0, 0)
    assert list(report.tensors.values()) == ["other values"]
    assert not report.same
    assert deltas_of(find_pool(model, "default"))


def test_a_folder_without_an_adapter_is_one_error(tmp_path):
    with pytest.raises(AdapterFileError, match="no adapter can be read"):
        inspect(tmp_path)
