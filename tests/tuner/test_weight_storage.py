# SPDX-License-Identifier: Apache-2.0
"""A base that accelerate takes apart between forwards is refused by name; a placed one is not."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import PeftModel, get_peft_model
from transformers import UperNetForSemanticSegmentation

from sfa_peft import SFAConfig, TargetError
from tests.tiny import images, upernet

pytestmark = pytest.mark.filterwarnings("ignore::sfa_peft.MergeWarning")

PARTS = {"internal": {"rho": 0}, "both": {}}
REFUSED = r"`backbone\.encoder\.layers\.0.*`: accelerate offloads its weights"
BLOCK = ["Swinv2Layer"]


def config(**options) -> SFAConfig:
    head = {"modules_to_save": ["decode_head"], "init_weights": False}
    return SFAConfig(budget=0.5, score="random", **head, **options)


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images()["pixel_values"]).logits


@pytest.fixture(params=PARTS)
def saved(request, tmp_path):
    """An adapter's folder, and the output with it."""
    model = get_peft_model(upernet(), config(**PARTS[request.param]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", output(model)


def loaded(folder) -> PeftModel:
    return PeftModel.from_pretrained(upernet(), folder)


def parts_on_cpu(base) -> dict[str, str]:
    parts = [f"backbone.{name}" for name, _ in base.backbone.named_children()]
    return dict.fromkeys([*parts, "decode_head"], "cpu")


def on_cpu(model):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model, folder):
    return disk_offload(model, folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_base_gets_no_adapter_and_stays_as_it_was(saved, place, tmp_path):
    base = upernet()
    expected = output(base)
    on_cpu(base) if place == "cpu" else on_disk(base, tmp_path / "weights")
    with pytest.raises(TargetError, match=REFUSED):
        PeftModel.from_pretrained(base, saved[0])
    assert torch.equal(output(base), expected)
    with pytest.raises(TargetError, match=REFUSED):
        get_peft_model(base, config())
    assert torch.equal(output(base), expected)


def test_a_base_that_transformers_loaded_in_part_onto_the_disk_is_refused(saved, tmp_path):
    upernet().save_pretrained(tmp_path / "base")
    device_map = parts_on_cpu(upernet()) | {"backbone.encoder": "disk"}
    places = {"device_map": device_map, "offload_folder": str(tmp_path / "weights")}
    for add in (
        lambda base: PeftModel.from_pretrained(base, saved[0], offload_folder=str(tmp_path / "b")),
        lambda base: base.load_adapter(str(saved[0])),
        lambda base: get_peft_model(base, config()),
    ):
        base = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "base", **places)
        with pytest.raises(TargetError, match=REFUSED):
            add(base)


def test_a_base_that_is_offloaded_again_after_loading_is_refused(saved, tmp_path, monkeypatch):
    base = upernet()
    on_two = parts_on_cpu(base) | {"backbone.encoder": "disk"}
    # PEFT lets accelerate find the places anew, by the memory that there is.
    monkeypatch.setattr(
        "peft.peft_model.infer_auto_device_map",
        lambda *_, **__: {f"base_model.model.{name}": place for name, place in on_two.items()},
    )
    dispatch_model(base, on_two, offload_dir=str(tmp_path / "a"))
    with pytest.raises(TargetError, match=REFUSED):
        PeftModel.from_pretrained(base, saved[0], offload_dir=str(tmp_path / "b"))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"preload_module_classes": BLOCK}], ids=["layers", "blocks"]
)
def test_offloading_an_adapted_model_ends_at_the_next_forward_or_merge(saved, options, used):
    model = loaded(saved[0])
    if used:
        output(model)
    cpu_offload(model, execution_device=torch.device("cpu"), **options)
    for use in (output, lambda m: m.merge_adapter(), lambda m: m.merge_and_unload()):
        with pytest.raises(TargetError, match=REFUSED):
            use(model)


def test_what_the_refusal_advises_works(saved):
    folder, expected = saved
    assert torch.equal(output(on_cpu(loaded(folder).merge_and_unload())), expected)
    back = on_cpu(loaded(folder))
    remove_hook_from_submodules(back)
    assert torch.equal(output(back), expected)


def test_external_adapters_can_be_offloaded_with_their_model(tmp_path):
    model = get_peft_model(upernet(), config(rho=1))
    model.save_pretrained(tmp_path)
    offloaded = on_cpu(loaded(tmp_path))
    assert torch.equal(output(offloaded), output(model))
    assert torch.equal(output(offloaded.merge_and_unload()), output(model))


@pytest.mark.parametrize("places", ["one", "several"])
def test_a_device_map_without_offloading_changes_nothing(saved, places):
    folder, expected = saved
    base = upernet()
    device_map = {"": "cpu"} if places == "one" else parts_on_cpu(base)
    dispatch_model(base, device_map, force_hooks=True)
    model = PeftModel.from_pretrained(base, folder)
    assert torch.equal(output(model), expected)
    assert torch.equal(output(model.merge_and_unload()), expected)
