# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation

from sfa_peft import AdapterFileError, SFAConfig, SFASelector, SFAWarning
from sfa_peft.tuner.adapted_layers import find_pool
from tests.processes import run_code
from tests.tiny import MLP, images, upernet

WEIGHTS = "adapter_model.safetensors"


def train(model, steps: int = 6):
    selector = SFASelector(model, total_steps=steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for step in range(steps):
        model(**images(seed=step)).loss.backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    config = SFAConfig(budget=0.2, selection_steps=2, modules_to_save=["decode_head"])
    return train(get_peft_model(upernet(), config))


@pytest.fixture
def folder(trained, tmp_path):
    trained.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_reloaded_model_equals_the_trained_one_to_the_bit(trained, folder, low_cpu_mem_usage):
    loaded = PeftModel.from_pretrained(
        upernet(), folder, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    batch = images(seed=9)["pixel_values"]
    assert torch.equal(loaded(batch).logits, trained(batch).logits)


def test_reloading_in_a_fresh_process_gives_the_same_bits(trained, folder):
    batch = images(seed=9)["pixel_values"]
    save_file({"logits": trained(batch).logits.detach()}, folder / "expected.safetensors")
    script = f"""
import sys; sys.path.insert(0, {str(sys.path[0])!r}); sys.path.insert(0, ".")
import torch; torch.set_num_threads(1)
import sfa_peft
from peft import PeftModel
from safetensors.torch import load_file
from tests.tiny import images, upernet
model = PeftModel.from_pretrained(upernet(), {str(folder)!r}).eval()
got = model(images(seed=9)["pixel_values"]).logits
assert torch.equal(got, load_file({str(folder / "expected.safetensors")!r})["logits"])
print("same bits")
"""
    run = run_code(script)
    assert "same bits" in run.stdout, run.stderr


def test_the_file_holds_adapters_selection_and_head_with_buffers_and_nothing_else(trained, folder):
    tensors = load_file(folder / WEIGHTS)
    kinds = {k.split(".sfa_")[1].split(".")[0] for k in tensors if ".sfa_" in k}
    assert kinds == {"packed", "down", "up"}
    others = [k for k in tensors if ".sfa_" not in k]
    assert all(".decode_head." in k for k in others)
    assert any(k.endswith("running_var") for k in others)
    pool = find_pool(trained, "default")
    packed = tensors[f"base_model.model.{pool.store.layer.name}.sfa_packed"]
    assert packed.numel() < 5 * pool.values.numel()  # of 8 bytes that positions and values take


def test_loading_onto_an_existing_name_takes_the_file_over(folder, trained):
    config = SFAConfig(budget=0.2, modules_to_save=["decode_head"])
    model = get_peft_model(upernet(), config).eval()
    batch = images(seed=9)["pixel_values"]
    model(batch)
    model.load_adapter(folder, "default", is_trainable=True)
    pool, expected = find_pool(model, "default"), find_pool(trained, "default")
    order = expected.slots.sort().indices  # a file has no order of picks
    assert torch.equal(pool.slots, expected.slots[order])
    torch.testing.assert_close(pool.values, expected.values[order], rtol=1e-4, atol=1e-8)


def test_a_second_adapter_beside_the_first_does_not_disturb_it(folder, trained):
    model = PeftModel.from_pretrained(upernet(), folder).eval()
    batch = images(seed=9)["pixel_values"]
    config = SFAConfig(
        budget=0.1, score="random", init_weights=False, modules_to_save=["decode_head"]
    )
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert not torch.equal(model(batch).logits, trained(batch).logits)
    model.set_adapter("default")
    assert torch.equal(model(batch).logits, trained(batch).logits)
    model.delete_adapter("other")
    assert torch.equal(model(batch).logits, trained(batch).logits)


def test_an_empty_selection_is_saved_with_a_warning(tmp_path):
    model = get_peft_model(MLP(), SFAConfig(rho=0, target_modules=["first"]))
    with pytest.warns(SFAWarning, match="saved with an empty selection"):
        model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MLP(), tmp_path)
    x = torch.randn(2, 12)
    assert torch.equal(again(x), MLP()(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 32}, r"has shape \[32, 32\] here, the adapter was trained on \[16, 16\]"),
        ({"depths": [1, 1, 1, 1]}, "changes `backbone.encoder.layers.2.blocks.1.*does not have"),
    ],
)
def test_an_adapter_of_another_model_is_refused_and_leaves_the_model_alone(
    folder, changes, message
):
    other = upernet(**changes)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(other, folder)
    assert not any(isinstance(m, BaseTunerLayer) for m in other.modules())
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("keep", [0, 7, 8, 50, 0.5, -1])
def test_a_file_cut_short_is_named_and_nothing_is_loaded(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    size = int(keep * len(data)) if isinstance(keep, float) else keep % len(data)
    (folder / WEIGHTS).write_bytes(data[:size])
    model = upernet()
    with pytest.raises(AdapterFileError, match=rf"{WEIGHTS}: .*(cut short|damaged)"):
        PeftModel.from_pretrained(model, folder)
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


def _damage(folder, suffix, change):
    tensors = load_file(folder / WEIGHTS)
    key = next(k for k in tensors if k.endswith(suffix))
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-1].clone(), "sfa_packed: "),
        (lambda t: torch.cat([t[:40], t[40:41] + 1, t[41:]]), "sfa_packed: "),
        (torch.zeros_like, "sfa_packed: "),
        (lambda t: t.int(), "expected flat bytes"),
    ],
)
def test_a_damaged_selection_is_named_and_nothing_is_loaded(folder, change, message):
    _damage(folder, "sfa_packed", change)
    model = upernet()
    with pytest.raises(AdapterFileError, match=message):
        PeftModel.from_pretrained(model, folder)
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


def test_loading_without_the_import_fails_and_the_card_says_what_to_do(folder):
    script = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(folder)!r})"
    run = run_code(script)
    assert "KeyError: 'SFA'" in run.stderr
    assert "import sfa_peft" in (folder / "README.md").read_text()


def test_the_saved_values_keep_fp32_on_a_bfloat16_backbone(tmp_path):
    config = SFAConfig(
        budget=0.3, rho=0, score="random", init_weights=False, target_modules=["first"]
    )
    model = get_peft_model(MLP().bfloat16(), config)
    assert find_pool(model, "default").values.dtype == torch.float32
    model.save_pretrained(tmp_path)
    x = torch.randn(2, 12, dtype=torch.bfloat16)
    for low in (False, True):
        again = PeftModel.from_pretrained(MLP().bfloat16(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(again(x), model(x))


def test_a_state_dict_moves_an_adapter_by_hand(trained):
    from peft import set_peft_model_state_dict

    state = get_peft_model_state_dict(trained)
    other = get_peft_model(upernet(), SFAConfig(budget=0.2, modules_to_save=["decode_head"])).eval()
    set_peft_model_state_dict(other, state)
    batch = images(seed=9)["pixel_values"]
    assert torch.equal(other(batch).logits, trained(batch).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_own_loader_gives_the_same_bits_and_misses_nothing(dtype, tmp_path, caplog):
    upernet().to(dtype).save_pretrained(tmp_path / "base")
    config = SFAConfig(budget=0.2, rho=0, score="random", modules_to_save=["decode_head"])
    model = get_peft_model(upernet().to(dtype), config).eval()
    with torch.no_grad():
        find_pool(model, "default").values.normal_(std=0.02)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    batch = images(seed=9)["pixel_values"].to(dtype)
    kind = type(model.get_base_model())
    attached = kind.from_pretrained(tmp_path / "base", dtype=dtype)
    with caplog.at_level("WARNING"):
        attached.load_adapter(str(tmp_path / "adapter"), is_trainable=True)
        found = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "adapter", dtype=dtype)
    assert "MISSING" not in caplog.text
    attached.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(upernet().to(dtype), tmp_path / "again")
    ours = find_pool(model, "default")
    with torch.no_grad():
        model(batch)
        for loaded in (attached, found, again):
            pool = find_pool(loaded, "default")
            parameter = pool.store.layer.sfa_pool["default"]
            # Weights and not outputs: transformers loads the base's tensors to other addresses,
            # where kernels round differently.
            loaded.eval()(batch)
            for ordinal in range(len(ours.weights)):
                assert torch.equal(pool.weights[ordinal].tensor, ours.weights[ordinal].tensor)
            assert pool.values is parameter  # what an optimizer made before the first use holds


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
@pytest.mark.parametrize("name", ["a", "s", "f_", "sfa"])
def test_names_inside_the_prefix_of_our_tensors_are_as_good_as_others(name, tmp_path):
    config = SFAConfig(
        budget=0.2, score="random", init_weights=False, modules_to_save=["decode_head"]
    )
    model = get_peft_model(upernet(), config, adapter_name=name).eval()
    model.add_adapter("other", config)
    with torch.no_grad():
        model.get_base_model().decode_head.modules_to_save[name].classifier.bias.add_(1)
        expected = model(images()["pixel_values"]).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(upernet(), tmp_path / name, adapter_name=name).eval()
    loaded.load_adapter(tmp_path / "other", "other")
    with torch.no_grad():
        assert torch.equal(loaded(images()["pixel_values"]).logits, expected)
    ours, theirs = (get_peft_model_state_dict(m, adapter_name=name) for m in (model, loaded))
    assert ours.keys() == theirs.keys()
