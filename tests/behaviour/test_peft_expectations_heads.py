# SPDX-License-Identifier: Apache-2.0
"""`modules_to_save`, whose names PEFT compares by their ends only."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from sfa_peft import SFAConfig, SFAWarning, TargetError
from tests.head_zoo import HEADS
from tests.model_zoo import SIZE
from tests.tiny import MLP

DPT = HEADS["dpt"][1]


def dpt():
    torch.manual_seed(0)
    return DPT().eval()


def config(*names: str, **options) -> SFAConfig:
    return SFAConfig(**{"score": "random", "modules_to_save": list(names), **options})


def wrapped(model) -> list[str]:
    found = [n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return [n.removeprefix("base_model.model.") for n in found]


def test_the_nested_heads_of_dpt_are_trained_saved_and_loaded(tmp_path):
    batch = torch.randn(2, 3, SIZE, SIZE)
    plain = dpt()
    whole = {f"head.{n}" for n, _ in plain.head.named_parameters()}
    model = get_peft_model(plain, config("head"))
    assert wrapped(model) == ["head.head"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".sfa_" not in n}
    names = {
        n.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for n in trained
    }
    assert names == whole
    with torch.no_grad():
        for parameter in model.base_model.model.head.parameters():
            parameter.add_(0.1)
    expected = model.eval()(pixel_values=batch).predicted_depth
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(dpt(), tmp_path).eval()
    assert torch.equal(loaded(pixel_values=batch).predicted_depth, expected)


def test_a_second_adapter_with_the_same_head_and_unloading_work():
    model = get_peft_model(dpt(), config("head"))
    model.add_adapter("b", config("head", seed=1))
    assert wrapped(model) == ["head.head"]
    model.set_adapter("b")
    state = dpt().state_dict()
    assert {k: v.shape for k, v in model.unload().state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }


class Nested(MLP):
    """A head whose own parameter cannot be named without that of the head inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential()
        self.head.add_module("head", nn.Linear(16, 4))
        self.head.scale = nn.Parameter(torch.ones(4))


class ByItsEnd(MLP):
    """An adapted layer whose name ends as the head's does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"overhead": nn.Linear(16, 16)})


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (Nested, ["first"], "would save `head` and `head.head` inside it"),
        (ByItsEnd, ["overhead"], "also saves `block.overhead` whole, in which"),
    ],
)
def test_what_peft_would_wrap_wrongly_is_refused_before_the_model_is_touched(
    make, targets, message
):
    model = make()
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, config("head", rho=0, target_modules=targets))
    assert not any(isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper)) for m in model.modules())


def test_names_that_do_not_nest_stay_as_they_were_given():
    given = config("head", "absent", rho=0, target_modules=["first"])
    assert wrapped(get_peft_model(MLP(), given)) == ["head"]
    assert given.modules_to_save == ["head", "absent"]


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_a_config_serves_models_whose_heads_nest_and_others(task, tmp_path):
    given = config("head", task_type=task)
    first = get_peft_model(dpt(), given)
    first.add_adapter("b", given)
    other = get_peft_model(HEADS["zoedepth"][1](), given)
    assert given.modules_to_save == ["head"]
    assert wrapped(first) == ["head.head"]
    assert any(p.requires_grad for n, p in other.named_parameters() if "modules_to_save" in n)
    first.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "b"):
        assert SFAConfig.from_pretrained(folder).modules_to_save == ["head.head"]


def test_a_typing_error_in_modules_to_save_is_named_in_the_warning():
    with pytest.warns(SFAWarning, match=r"ends in `haed`\.$"):
        get_peft_model(dpt(), config("haed", "head"))
    with pytest.warns(SFAWarning, match=r"to train and save it\.$"):
        get_peft_model(dpt(), config("head"))
