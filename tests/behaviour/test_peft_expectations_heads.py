# SPDX-License-Identifier: Apache-2.0
"""`modules_to_save`, whose names PEFT compares by their ends only."""

import ast

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from sfa_peft import SFAConfig, SFAWarning, TargetError, head_modules
from sfa_peft.backbones import find_backbone
from tests.head_zoo import HEADS
from tests.model_zoo import FAMILIES, SIZE
from tests.timm_like import VisionTransformer
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


def outside(model, **options) -> set[str]:
    own = {id(p) for p in find_backbone(model).module.parameters()}
    return {n for n, p in model.named_parameters(**options) if id(p) not in own}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_all_that_lies_outside_the_backbone_and_auto_trains_it(name):
    model = HEADS[name][1]()
    wanted, shared = outside(model), outside(model, remove_duplicate=False)
    direct = {n for n in wanted if n.rpartition(".")[0] in ("", "model")}  # of no module to name
    names = head_modules(model)
    for path in names:  # PEFT takes all modules whose path ends so
        ends = [n for n, _ in model.named_modules(remove_duplicate=False) if n.endswith(path)]
        assert ends == [path]
    tuned = get_peft_model(model, SFAConfig(budget=0.2, score="random", modules_to_save="auto"))
    assert tuned.peft_config["default"].modules_to_save == names
    trained = {
        n.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        for n, p in tuned.named_parameters()
        if p.requires_grad and ".sfa_" not in n
    }
    assert wanted - direct <= trained <= shared


def test_auto_is_saved_as_the_names_that_it_found(tmp_path):
    given = SFAConfig(score="random", modules_to_save="auto")
    model = get_peft_model(dpt(), given)
    with torch.no_grad():
        for parameter in model.base_model.model.head.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    assert SFAConfig.from_pretrained(tmp_path).modules_to_save == ["neck", "head.head"]
    expected = model.eval()(pixel_values=torch.ones(1, 3, SIZE, SIZE)).predicted_depth
    loaded = PeftModel.from_pretrained(dpt(), tmp_path).eval()
    assert torch.equal(loaded(pixel_values=torch.ones(1, 3, SIZE, SIZE)).predicted_depth, expected)
    other = get_peft_model(FAMILIES["vit"](), given)  # the same config serves another model
    assert other.peft_config["default"].modules_to_save == ["classifier"]


def test_auto_goes_together_with_names_and_with_a_task_type():
    names = ["auto", "embeddings.norm"]
    model = get_peft_model(dpt(), config(*names))
    assert model.peft_config["default"].modules_to_save == ["neck", "head.head", "embeddings.norm"]
    typed = SFAConfig(score="random", modules_to_save="auto", task_type="SEQ_CLS")
    model = get_peft_model(FAMILIES["vit"](), typed)
    assert wrapped(model) == ["classifier"]


def test_auto_without_a_head_or_a_backbone_says_so():
    auto = {"score": "random", "modules_to_save": "auto"}
    with pytest.warns(SFAWarning, match="the whole model is its backbone"):
        get_peft_model(FAMILIES["dinov3_vit"](), SFAConfig(**auto))
    with pytest.raises(TargetError, match="head_modules: no known vision backbone"):
        get_peft_model(MLP(), SFAConfig(target_modules=["first"], **auto))


class Ambiguous(nn.Module):
    """A head that PEFT cannot tell from a layer of the backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = FAMILIES["vit"]().vit
        self.layernorm = nn.LayerNorm(4)


def test_a_head_that_cannot_be_named_apart_is_refused():
    with pytest.raises(TargetError, match=r"would take `vit.layernorm` for `layernorm`"):
        head_modules(Ambiguous())


@pytest.mark.parametrize("names", [["encoder"], ["encoder", "backbone"], ["backbone", "decoder"]])
def test_an_entry_that_swallows_the_backbone_is_named_with_names_that_work(names):
    with pytest.raises(TargetError) as error:
        get_peft_model(HEADS["detr"][1](), config(*names))
    text = str(error.value)
    blamed = ", ".join(f"`{n}`" for n in names if n != "decoder")
    assert f"in a module that modules_to_save names ({blamed}: PEFT compares" in text
    listed = text.split("They are left with modules_to_save=")[1].partition("]")
    works = ast.literal_eval("".join(listed[:2]))
    tuned = get_peft_model(HEADS["detr"][1](), config(*works))
    assert "modules_to_save" in str(tuned)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exclude_modules": ".*"}, "exclude_modules='.*' leaves out every one of them (`"),
        ({"layers_to_transform": [77]}, "layers_to_transform=[77] leaves out every one of them (`"),
    ],
)
def test_a_field_that_leaves_out_every_layer_is_named(options, says):
    with pytest.raises(TargetError) as error:
        get_peft_model(FAMILIES["vit"](), SFAConfig(modules_to_save=["classifier"], **options))
    assert says in str(error.value)


def test_a_suggestion_that_would_not_work_is_not_made():
    model = VisionTransformer()
    config = SFAConfig(exclude_modules=".*")
    with pytest.raises(TargetError) as error:
        get_peft_model(model, config)
    assert "try target_modules" not in str(error.value)
