# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DPTConfig, DPTForDepthEstimation, Swinv2ForImageClassification

from sfa_peft import AdapterFileError, SFAConfig, SFAError, SFALayer
from sfa_peft.tasks import TaskBank
from tests.tiny import images, swinv2_config, upernet

PIXELS = images(seed=5)["pixel_values"]
NAMES = ["segmentation", "depth", "classes"]
# By task: budget, external share, modules_to_save. One has no external adapter, one only that.
SETTINGS = {
    "segmentation": (0.2, 0.5, ["decode_head"]),
    # "head" alone would match `head.head` as well, which PEFT then cannot load.
    "depth": (0.1, 0.0, ["neck", "head.head"]),
    "classes": (0.05, 1.0, ["classifier"]),
}


def segmentation_model() -> nn.Module:
    return upernet(seed=0)


def depth_model() -> nn.Module:
    torch.manual_seed(7)
    config = DPTConfig(
        backbone_config=swinv2_config(),
        neck_hidden_sizes=[16, 32, 64, 128],
        fusion_hidden_size=16,
        reassemble_factors=[1] * 4,
    )
    model = DPTForDepthEstimation(config)
    model.backbone.load_state_dict(segmentation_model().backbone.state_dict())
    return model


def class_model() -> nn.Module:
    """Return a model whose backbone is of another class, under another name."""
    torch.manual_seed(8)
    model = Swinv2ForImageClassification(swinv2_config(num_labels=4))
    source = segmentation_model().backbone
    model.swinv2.encoder.load_state_dict(source.encoder.state_dict())
    model.swinv2.embeddings.load_state_dict(source.embeddings.state_dict())
    return model


MODELS = {"segmentation": segmentation_model, "depth": depth_model, "classes": class_model}


def answer(output) -> torch.Tensor:
    found = getattr(output, "logits", None)
    return output.predicted_depth if found is None else found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, (budget, rho, heads)) in enumerate(SETTINGS.items()):
        config = SFAConfig(
            budget=budget,
            rho=rho,
            score="random",
            seed=seed,
            init_weights=False,
            modules_to_save=heads,
        )
        model = get_peft_model(MODELS[name](), config)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():  # as if the head had been trained
            if "modules_to_save" in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.1 * noise)
        model.save_pretrained(root / name)
    return {name: root / name for name in SETTINGS}


@pytest.fixture(scope="module")
def expected(folders) -> dict[str | None, torch.Tensor]:
    """Outputs of each task loaded alone, and of the plain backbone."""
    found: dict[str | None, torch.Tensor] = {}
    with torch.no_grad():
        for name in NAMES:
            model = PeftModel.from_pretrained(MODELS[name](), folders[name]).eval()
            found[name] = answer(model(PIXELS))
        found[None] = segmentation_model().eval().backbone(PIXELS).feature_maps[-1]
    return found


def make_bank(folders, names=NAMES) -> TaskBank:
    bank = TaskBank(segmentation_model())
    for name in names:
        bank.add(name, folders[name], MODELS[name]())
    return bank


@pytest.fixture
def bank(folders) -> TaskBank:
    return make_bank(folders)


def output(bank: TaskBank, name: str | None) -> torch.Tensor:
    if name is None:
        with bank.activate(None) as backbone, torch.no_grad():
            return backbone(PIXELS).feature_maps[-1]
    return answer(bank.run(name, pixel_values=PIXELS))


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
    with pytest.raises(SFAError, match="is merged.*unmerge_adapter"):
        bank.activate("depth")
    bank["segmentation"].model.unmerge_adapter()
    assert torch.equal(output(bank, "depth"), expected["depth"])


# --- use ---------------------------------------------------------------------------------------


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
    with pytest.raises(SFAError, match="no task `flow`.*`segmentation`, `depth`"):
        bank.map([("depth", {"pixel_values": PIXELS}), ("flow", {})])
    assert bank.switches == 0


# --- memory ------------------------------------------------------------------------------------


def test_memory_is_what_the_file_holds(bank, folders):
    memory = bank.memory()
    for name in NAMES:
        tensors = load_file(folders[name] / "adapter_model.safetensors")
        size = {"values": 0, "positions": 0, "external": 0, "head": 0}
        for key, tensor in tensors.items():
            kind = next(
                (k for k, s in [("values", "pool"), ("positions", "slots")] if f".sfa_{s}" in key),
                "external" if ".sfa_" in key else "head",
            )
            size[kind] += tensor.nbytes
        got = memory[name]
        assert (got.values, got.positions, got.external) == (
            size["values"],
            size["positions"],
            size["external"],
        )
        # Beside the trained head: what the model has outside the backbone and does not save.
        assert size["head"] <= got.head <= 1.2 * size["head"] + 4096
        assert got.total == sum([got.values, got.positions, got.external, got.head, got.switching])


def test_the_backbone_is_counted_once_and_without_adapters(bank):
    plain = segmentation_model().backbone
    size = sum(t.nbytes for t in [*plain.parameters(), *plain.buffers()])
    assert bank.backbone_bytes == size
    output(bank, "depth")
    assert bank.backbone_bytes == size
    assert bank.memory()["depth"].switching > 0


# --- threads -----------------------------------------------------------------------------------


def in_thread(function):
    """Run a function in a thread called `second`; return its result or error."""
    box = []

    def body():
        try:
            box.append(function())
        except Exception as error:
            box.append(error)

    thread = threading.Thread(target=body, name="second")
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return box[0]


def test_another_task_in_another_thread_is_refused_while_one_is_in_use(bank, expected):
    with bank.activate("segmentation"):
        for use in (
            lambda: bank.activate("depth"),
            lambda: bank.run("depth", PIXELS),
            lambda: bank["depth"].model(PIXELS),
            lambda: bank.remove("depth"),
            lambda: bank.activate("depth", wait=0.05),
        ):
            error = in_thread(use)
            assert isinstance(error, SFAError)
            assert "thread `MainThread` is using `segmentation`" in str(error)
        assert torch.equal(output(bank, "segmentation"), expected["segmentation"])
    assert torch.equal(in_thread(lambda: output(bank, "depth")), expected["depth"])


def test_the_same_task_may_be_used_by_two_threads(bank, expected):
    with bank.activate("depth"):
        assert torch.equal(in_thread(lambda: output(bank, "depth")), expected["depth"])


def test_a_task_below_the_inner_one_is_not_lost_to_another_thread(bank, expected):
    with bank.activate("segmentation"), bank.activate("depth"):
        error = in_thread(lambda: bank.activate("depth"))
    assert "is using `segmentation`" in str(error)


def test_who_holds_a_task_beside_others_cannot_wait_for_another(bank):
    inside, done = threading.Event(), threading.Event()

    def hold():
        with bank.activate("depth"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold, name="holder")
    thread.start()
    inside.wait(60)
    try:
        with (
            bank.activate("depth"),
            pytest.raises(SFAError, match="`holder` is using `depth`.*cannot wait"),
        ):
            bank.activate("segmentation", wait=True)
    finally:
        done.set()
        thread.join(60)


def test_waiting_threads_get_their_turn_and_the_right_bits(bank, expected):
    wrong, failed = [], []

    def work(seed: int):
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(8):
                name = NAMES[int(torch.randint(3, (1,), generator=generator))]
                got = answer(bank.run(name, PIXELS, wait=True))
                if not torch.equal(got, expected[name]):
                    wrong.append(name)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not failed
    assert not wrong


def test_adding_and_removing_need_the_bank_for_themselves(bank, folders):
    with bank.activate("depth"):
        with pytest.raises(SFAError, match="removing `depth`: end this thread's"):
            bank.remove("depth")
        with pytest.raises(SFAError, match="adding `again`: end this thread's"):
            bank.add("again", folders["depth"], depth_model())


def test_a_failing_forward_lets_go(bank, expected):
    with pytest.raises(RuntimeError, match="channels"):
        bank.run("depth", PIXELS[:, :2])
    found = in_thread(lambda: output(bank, "segmentation"))
    assert torch.equal(found, expected["segmentation"])


def test_blocks_that_end_out_of_order_are_named(bank, expected):
    first, second = bank.activate("depth"), bank.activate("segmentation")
    first.__enter__()
    second.__enter__()
    with pytest.raises(SFAError, match="reverse order"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(in_thread(lambda: output(bank, "depth")), expected["depth"])


# --- bad input ---------------------------------------------------------------------------------


def test_a_removed_task_is_gone_and_the_others_are_not(bank, expected):
    bank.activate("depth")
    bank.remove("depth")
    assert bank.active is None
    for use in (lambda: bank["depth"], lambda: bank.run("depth"), lambda: bank.remove("depth")):
        with pytest.raises(SFAError, match="no task `depth`"):
            use()
    assert torch.equal(output(bank, "segmentation"), expected["segmentation"])


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training", "forward", "sfa_"])
def test_a_name_that_peft_cannot_use_is_refused(bank, folders, name):
    with pytest.raises(SFAError, match="cannot name a task"):
        bank.add(name, folders["depth"], depth_model())


def test_a_name_or_model_that_is_taken_is_refused(bank, folders):
    with pytest.raises(SFAError, match="`depth` is in the bank already"):
        bank.add("depth", folders["depth"], depth_model())
    model = bank["depth"].model.get_base_model()
    with pytest.raises(SFAError, match="the model belongs to task `depth`"):
        bank.add("other", folders["depth"], model)


def changed_weight() -> nn.Module:
    model = depth_model()
    with torch.no_grad():
        model.backbone.encoder.layers[0].blocks[0].intermediate.dense.weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed_weight, "`backbone.encoder.*intermediate.dense.weight` holds other values"),
        (lambda: depth_model().bfloat16(), r"torch.bfloat16, the bank's .* torch.float32"),
        (lambda: upernet(embed_dim=32), "another config.*embed_dim=32, the bank's 16"),
        (lambda: nn.Linear(2, 2), "no vision backbone found"),
        (
            lambda: get_peft_model(depth_model(), LoraConfig(target_modules=["query"])),
            "belongs to an adapter already",
        ),
    ],
)
def test_a_model_around_another_backbone_is_refused(bank, folders, expected, make, message):
    with pytest.raises(SFAError, match=message):
        bank.add("other", folders["depth"], make())
    assert "other" not in bank
    for name in NAMES:
        assert torch.equal(output(bank, name), expected[name])


def test_the_backbone_itself_is_no_task_model(bank, folders):
    with pytest.raises(SFAError, match="shared backbone itself"):
        bank.add("other", folders["depth"], bank.backbone)


def test_a_model_without_pretrained_weights_can_be_given_on_request(folders, expected):
    bank = make_bank(folders, ["segmentation"])
    random = depth_model()
    with torch.no_grad():
        for parameter in random.backbone.parameters():
            parameter.normal_()
    bank.add("depth", folders["depth"], random, check_weights=False)
    assert torch.equal(output(bank, "depth"), expected["depth"])


def test_a_model_built_around_the_banks_backbone_is_taken_as_it_is(folders, expected):
    bank = make_bank(folders, ["segmentation"])
    model = depth_model()
    model.backbone = bank.backbone
    bank.add("depth", folders["depth"], model)
    assert torch.equal(output(bank, "depth"), expected["depth"])


def damage(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("sfa_pool"))
    tensors[key] = tensors[key] * float("nan")
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize("others", [[], NAMES[:1]])
def test_a_damaged_adapter_leaves_bank_and_backbone_alone(folders, expected, tmp_path, others):
    bank = make_bank(folders, others)
    model = depth_model()
    own = model.backbone
    before = copy.deepcopy(bank.backbone.state_dict())
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        bank.add("depth", damage(folders["depth"], tmp_path / "damaged"), model)
    after = bank.backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert bank.list() == others
    assert model.backbone is own
    bank.add("depth", folders["depth"], model)  # the same model serves a second try
    for name in [*others, "depth"]:
        assert torch.equal(output(bank, name), expected[name])


def test_an_adapter_of_another_method_or_none_is_named(bank, tmp_path):
    get_peft_model(depth_model(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(SFAError, match="a LORA adapter"):
        bank.add("lora", tmp_path, depth_model())
    with pytest.raises(SFAError, match="no adapter can be read"):
        bank.add("none", tmp_path / "nowhere", depth_model())


def test_a_copied_part_of_the_backbone_cannot_be_shared(tmp_path, folders):
    config = SFAConfig(budget=0.2, score="random", modules_to_save=["head.head", "embeddings.norm"])
    get_peft_model(depth_model(), config).save_pretrained(tmp_path)
    bank = make_bank(folders, NAMES[:1])
    with pytest.raises(SFAError, match=r"names `embeddings.norm` of the backbone"):
        bank.add("depth", tmp_path, depth_model())
    assert not any("modules_to_save" in n for n, _ in bank.backbone.named_modules())


def test_a_bank_needs_a_plain_backbone(bank):
    with pytest.raises(SFAError, match="backbone: .* belongs to an adapter already"):
        TaskBank(bank.backbone)
