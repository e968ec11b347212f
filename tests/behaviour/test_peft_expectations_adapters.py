# SPDX-License-Identifier: Apache-2.0
"""What people who know PEFT expect of any method, with LoRA as the measure where it has one."""

import copy
import io
import pickle
import re

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import TaskType

from sfa_peft import ConfigError, SFAConfig, SFAError, SFAModel
from sfa_peft.tuner.adapted_layers import find_pool
from tests.model_zoo import FAMILIES, pixels
from tests.tiny import images, upernet

HEAD = {"modules_to_save": ["decode_head"]}
BATCH = images()["pixel_values"]


def config(**options) -> SFAConfig:
    return SFAConfig(**{"score": "random", "init_weights": False, **HEAD, **options})


def lora(**options) -> LoraConfig:
    return LoraConfig(
        **{"target_modules": ["query"], "init_lora_weights": False, **HEAD, **options}
    )


def two(make=config) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(upernet(), make(), adapter_name="a")
    model.add_adapter("b", make())
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(BATCH).logits


def trainable(model) -> set[tuple[str, str]]:
    """Return (adapter, kind) of what is trainable, where kind is the adapter or the head."""
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "head" if "modules_to_save" in name else "adapter"
            adapters = [a for a in ("a", "b") if f".{a}." in f"{name}."]
            found.add(("base" if not adapters else adapters[0], kind))
    return found


STEPS = {
    "as made": lambda m: None,
    "set_adapter": lambda m: m.set_adapter("b"),
    "set_adapter for inference": lambda m: m.set_adapter("b", inference_mode=True),
    "set_requires_grad": lambda m: m.set_requires_grad("b"),
    "set_requires_grad off": lambda m: m.set_requires_grad("a", requires_grad=False),
    "disabled and enabled": lambda m: (
        m.base_model.disable_adapter_layers(),
        m.base_model.enable_adapter_layers(),
    ),
    "deleted the active one": lambda m: m.delete_adapter("a"),
    "deleted the other": lambda m: m.delete_adapter("b"),
    "merged and unmerged": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
}


@pytest.mark.parametrize("step", STEPS)
def test_what_is_active_and_trainable_is_as_with_lora(step):
    outcomes = []
    for make in (config, lora):
        model = two(make)
        STEPS[step](model)
        status = model.get_model_status()
        outcomes.append(
            (
                trainable(model),
                model.active_adapters,
                sorted(model.peft_config),
                status.active_adapters,
                status.merged_adapters,
                status.requires_grad,
                status.available_adapters,
                status.enabled,
            )
        )
    assert outcomes[0] == outcomes[1]


def test_the_status_names_method_layers_and_devices():
    model = two()
    status = model.get_model_status()
    assert status.peft_types == {"a": "SFA", "b": "SFA"}
    assert status.adapter_model_type == "SFAModel"
    assert status.devices == {"a": ["cpu"], "b": ["cpu"]}
    layers = [s for s in model.get_layer_status() if s.module_type == "SFALayer"]
    assert len(layers) == status.num_adapter_layers - 1  # the head
    model.merge_adapter()
    layers = [s for s in model.get_layer_status() if s.module_type == "SFALayer"]
    assert all(s.merged_adapters == ["a"] for s in layers)


def test_a_deleted_adapter_leaves_nothing_and_the_rest_as_it_was():
    model = two()
    model.set_adapter("b")
    expected = logits(model)
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert torch.equal(logits(model), expected)
    assert not any(".a." in f".{n}." for n in model.state_dict())


@pytest.mark.parametrize(
    "name", ["items", "x.y", "", "weight", "bias", "encoder", "decode_head", "conv", "0"]
)
def test_a_name_that_peft_cannot_keep_is_refused_before_the_model_is_touched(name):
    model = two()
    expected = logits(model)
    with pytest.raises(SFAError, match="cannot name a task or an adapter"):
        model.add_adapter(name, config())
    assert sorted(model.peft_config) == ["a", "b"]
    assert torch.equal(logits(model), expected)


def test_a_name_between_the_dots_of_the_models_paths_would_lose_tensors(tmp_path):
    """Why such names are refused: PEFT would leave out tensors of the other adapters."""
    lora = LoraConfig(target_modules=["query"])
    model = get_peft_model(upernet(), lora, adapter_name="a")
    whole = get_peft_model_state_dict(model, adapter_name="a")
    model.add_adapter("0", LoraConfig(target_modules=["key"]))
    assert len(get_peft_model_state_dict(model, adapter_name="a")) < len(whole)


def test_copies_of_every_kind_compute_the_same_bits():
    model = two()
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(file, weights_only=False))
    for made in copies:
        assert torch.equal(logits(made), expected)
        made.set_adapter("b")
        assert not torch.equal(logits(made), expected)
    assert torch.equal(logits(model), expected)
    assert pickle.loads(pickle.dumps(config())) == config()


def test_repr_tells_role_width_and_number_of_selected_weights():
    model = get_peft_model(upernet(), config(budget=0.2))
    layer = next(m for m in model.modules() if getattr(m, "role", "") == "mlp_out")
    found = re.search(r"role=mlp_out, default: (\d+) of (\d+) in weight selected", repr(layer))
    part = layer.weights["weight"].slices["default"]
    assert found
    assert (int(found[1]), int(found[2])) == (part.indices().numel(), layer.base_weight.numel())
    assert f"default: width {layer.sfa_down['default'].out_features}" in repr(layer)
    assert "mlp_out" in str(model)


@pytest.mark.parametrize(("cast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_adapter_dtype(cast, dtype):
    base = upernet().to(torch.bfloat16)
    model = get_peft_model(base, config(), autocast_adapter_dtype=cast)
    found = {p.dtype for n, p in model.named_parameters() if ".sfa_" in n}
    assert found == {dtype}


def test_low_cpu_mem_usage_makes_placeholders_that_loading_fills(tmp_path):
    model = two()
    model.save_pretrained(tmp_path)
    empty = get_peft_model(upernet(), config(), low_cpu_mem_usage=True, adapter_name="a")
    assert find_pool(empty, "a").values.is_meta
    loaded = PeftModel.from_pretrained(upernet(), tmp_path / "a", low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("error:.*empty selection")
def test_placeholders_cannot_be_saved_and_nothing_is_said_of_an_empty_selection(tmp_path):
    empty = get_peft_model(upernet(), SFAConfig(rho=0), low_cpu_mem_usage=True)
    with pytest.raises(SFAError, match="on the meta device and holds no values"):
        empty.save_pretrained(tmp_path)


@pytest.mark.parametrize("head", [{}, {"modules_to_save": None}])
def test_injected_without_a_peft_model_its_state_dict_moves_it(head):
    torch.manual_seed(0)
    model = inject_adapter_in_model(config(**head), upernet()).eval()
    state = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(config(seed=1, **head), upernet()).eval()
    assert not torch.equal(logits(other), logits(model))
    found = set_peft_model_state_dict(other, state)
    assert not found.unexpected_keys
    assert not [k for k in found.missing_keys if ".sfa_" in k]
    assert torch.equal(logits(other), logits(model))


def test_transformers_own_methods(tmp_path):
    torch.manual_seed(0)
    model = upernet().eval()
    plain = logits(model)
    model.add_adapter(config(modules_to_save=None), "a")
    model.add_adapter(config(modules_to_save=None, seed=1), "b")
    assert model.active_adapters() == ["b"]
    second = logits(model)
    model.set_adapter("a")
    first = logits(model)
    assert not torch.equal(first, second)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    model.delete_adapter("b")
    assert torch.equal(logits(model), first)
    loaded = upernet().eval()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), first)


@pytest.mark.parametrize(
    ("task", "saved"),
    [
        (TaskType.FEATURE_EXTRACTION, ["classifier"]),
        (TaskType.SEQ_CLS, ["classifier", "score"]),
        (TaskType.TOKEN_CLS, ["classifier", "score"]),
    ],
)
def test_task_types_that_fit_a_vision_model(task, saved, tmp_path):
    torch.manual_seed(0)
    given = None if len(saved) > 1 else saved
    state = FAMILIES["vit"]()
    base = copy.deepcopy(state)
    model = get_peft_model(base, config(task_type=task, modules_to_save=given)).eval()
    assert model.peft_config["default"].modules_to_save == saved
    assert isinstance(model.base_model, SFAModel)
    expected = model(pixel_values=pixels("vit")).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(state), tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(pixel_values=pixels("vit")).logits, expected)


def test_mixed_models_are_refused_by_name():
    with pytest.raises(ValueError, match="'SFA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(upernet(), config(), mixed=True)


@pytest.mark.parametrize("value", [5, 1.5, {}, [1]])
@pytest.mark.parametrize(
    "field",
    [
        "modules_to_save",
        "target_modules",
        "target_parameters",
        "external_modules",
        "exclude_modules",
        "selection_from",
        "continue_from",
    ],
)
def test_a_field_of_a_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(
        ConfigError, match=rf"SFAConfig\.{field}: expected a .*{re.escape(repr(value))}"
    ):
        SFAConfig(**{field: value})


@pytest.mark.parametrize("given", [["classifier"], ("classifier",)])
def test_a_list_of_names_given_stays_the_users(given):
    names = given
    get_peft_model(FAMILIES["vit"](), config(task_type="SEQ_CLS", modules_to_save=names))
    assert list(given) == ["classifier"]
