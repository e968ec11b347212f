# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from sfa_peft import SFAError, SFALayer
from sfa_peft.tasks import TaskBank
from tests.tasks.models import (
    MODELS,
    NAMES,
    PIXELS,
    answer,
    depth_model,
    make_bank,
    output,
    segmentation_model,
)

# --- the same bits as alone --------------------------------------------------------------------


def test_the_tasks_differ(expected):
    assert not torch.equal(expected["segmentation"], torch.zeros(()))
    assert len({tuple(v.shape) for v in expected.values()}) == 4


def test_each_task_gives_the_bits_it_gives_alone(bank, expected):
    for name in [*NAMES, None, *reversed(NAMES)]:
        assert torch.equal(output(bank, name), expected[name]), name


@given(data=st.data())
@settings(max_examples=20)
def test_any_order_of_use_adding_and_removing_gives_the_bits_of_each_task_alone(
    folders, expected, data
):
    originals = segmentation_model().state_dict()
    bank = TaskBank(segmentation_model())
    backbone = bank.backbone
    for _ in range(data.draw(st.integers(1, 12), label="steps")):
        name = data.draw(st.sampled_from(NAMES), label="task")
        if name not in bank:
            bank.add(name, folders[name], MODELS[name]())
        how = data.draw(
            st.sampled_from(["run", "direct", "nested", "plain", "remove"]), label="how"
        )
        if how == "remove":
            bank.remove(name)
        elif how == "run":
            assert torch.equal(output(bank, name), expected[name])
        elif how == "direct":  # through the PEFT model, without a word to the bank
            with torch.no_grad():
                assert torch.equal(answer(bank[name].model(PIXELS)), expected[name])
        elif how == "plain":
            assert torch.equal(output(bank, None), expected[None])
        else:
            other = data.draw(st.sampled_from(bank.list()), label="inner")
            with bank.activate(name) as task:
                assert torch.equal(output(bank, other), expected[other])
                assert bank.active == name
                assert torch.equal(answer(task(PIXELS)), expected[name])
    for name in bank.list():
        bank.remove(name)
    assert not any(isinstance(m, SFALayer) for m in backbone.modules())
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, originals[f"backbone.{key}"]), key


@pytest.mark.filterwarnings("ignore::sfa_peft.OtherBaseWarning")
def test_bfloat16_too(folders):
    def half(name):
        return MODELS[name]().bfloat16()

    x = PIXELS.bfloat16()
    alone = {n: PeftModel.from_pretrained(half(n), folders[n]).eval() for n in NAMES}
    bank = TaskBank(half("segmentation"))
    for name in NAMES:
        bank.add(name, folders[name], half(name))
    with torch.no_grad():
        for name in [*NAMES, *NAMES[::-1], *NAMES]:
            got, wanted = answer(bank.run(name, x)), answer(alone[name](x))
            assert torch.equal(got, wanted), name


def test_all_models_hold_the_very_same_backbone(bank):
    first, second = (bank[n].model.get_base_model().backbone for n in NAMES[:2])
    assert first is second is bank.backbone
    assert bank["classes"].model.get_base_model().swinv2.encoder is bank.backbone.encoder


def test_a_switch_behind_the_banks_back_is_noticed(bank, expected):
    bank.activate("depth")
    bank["segmentation"].model.set_adapter("segmentation")
    for name in ("depth", "segmentation"):
        assert torch.equal(output(bank, name), expected[name])


def test_a_merged_adapter_is_refused(bank, expected):
    bank.activate("segmentation")
    bank["segmentation"].model.merge_adapter()
    with pytest.raises(SFAError, match=r"is merged.*unmerge_adapter"):
        bank.activate("depth")
    bank["segmentation"].model.unmerge_adapter()
    assert torch.equal(output(bank, "depth"), expected["depth"])


# --- use ---------------------------------------------------------------------------------------


def test_a_notebook_shows_what_each_task_takes(bank):
    name = bank.list()[0]
    bank.activate(name)
    head, backbone, *tasks = ElementTree.fromstring(bank._repr_html_())
    assert head[-1].text == "total"
    assert backbone[-1].text == f"{bank.backbone_bytes:,}"
    assert [task[0].text for task in tasks] == [
        f"{n}, active" if n == name else n for n in bank.list()
    ]
    assert tasks[0][-1].text == f"{bank.memory()[name].total:,}"


def test_adding_does_not_change_the_active_task(folders, expected):
    bank = make_bank(folders, NAMES[:1])
    assert bank.active is None
    bank.activate("segmentation")
    bank.add("depth", folders["depth"], depth_model())
    assert bank.active == "segmentation"
    assert bank.list() == ["segmentation", "depth"] == list(bank)
    assert len(bank) == 2
    assert torch.equal(output(bank, "segmentation"), expected["segmentation"])


def test_a_plain_call_switches_and_the_end_of_a_block_does_not(bank):
    bank.activate("depth")
    assert bank.active == "depth"
    with bank.activate("classes"):
        assert bank.active == "classes"
    assert bank.active == "classes"
    assert bank.switches == 2


def test_map_switches_once_a_task_and_keeps_the_order(bank, expected):
    order = ["depth", "segmentation", "depth", "classes", "segmentation", "depth"]
    bank.activate("segmentation")
    before = bank.switches
    results = bank.map([(name, {"pixel_values": PIXELS}) for name in order])
    assert bank.switches - before == 2
    for name, result in zip(order, results, strict=True):
        assert torch.equal(answer(result), expected[name])


def test_map_of_nothing_and_of_an_unknown_task(bank):
    assert bank.map([]) == []
    with pytest.raises(SFAError, match=r"no task `flow`.*`segmentation`, `depth`"):
        bank.map([("depth", {"pixel_values": PIXELS}), ("flow", {})])
    assert bank.switches == 0
