# SPDX-License-Identifier: Apache-2.0
"""What torch's default dtype is must not matter: everything is done twice, with another one."""

import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.tasks import combine, extract
from tests.tiny import MLP

LAYERS = ["first", "second"]
HEAD = {"modules_to_save": ["head"]}


@contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def inputs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 12, generator=generator, dtype=torch.float32)


def config(**changes):
    options = {"budget": 0.4, "target_modules": LAYERS, "external_modules": ["second"]}
    return SFAConfig(**(options | HEAD | changes))


def train(model, kind, steps=6):
    selector = SFASelector(model, total_steps=steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(inputs().to(kind)).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return model


def trained_and_saved(base, folder, **changes):
    torch.manual_seed(0)
    kind = base.first.weight.dtype
    model = train(get_peft_model(copy.deepcopy(base), config(selection_steps=2, **changes)), kind)
    model.save_pretrained(folder)
    return [model, PeftModel.from_pretrained(copy.deepcopy(base), folder)]


def reused(base, folder, **changes):
    trained_and_saved(base, folder / "first")
    return trained_and_saved(base, folder / "second", **changes)


def tuned_copy(base):
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in tuned.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu")
            p.add_(0.1 * noise.to(p.dtype))
    return tuned


WAYS = {
    "trained": trained_and_saved,
    "random": lambda base, folder: trained_and_saved(base, folder, score="random"),
    "rows": lambda base, folder: trained_and_saved(base, folder, granularity="row"),
    "ranked by layer": lambda base, folder: trained_and_saved(base, folder, ranking="layer"),
    "difference": lambda base, folder: trained_and_saved(base, folder, score="weight_difference"),
    "16-bit scores": lambda base, folder: trained_and_saved(base, folder, score_dtype="bfloat16"),
    "16-bit file": lambda base, folder: trained_and_saved(base, folder, saved_values="bfloat16"),
    "8-bit file": lambda base, folder: trained_and_saved(base, folder, saved_values="int8"),
    "selection reused": lambda base, folder: reused(
        base, folder, selection_from=folder / "first", selection_values="trained"
    ),
    "continued": lambda base, folder: reused(base, folder, continue_from=folder / "first"),
    "extracted": lambda base, _: [
        extract(base, tuned_copy(base), config(external_modules=None))[0]
    ],
}


def combined(base, folder):
    for seed, name in enumerate("xy"):
        trained_and_saved(base, folder / name, rho=0, score="random", seed=seed)
    model, _ = combine(copy.deepcopy(base), [folder / n for n in "xy"], weights=[0.3, 0.7])
    model.save_pretrained(folder / "xy")
    return [model, PeftModel.from_pretrained(copy.deepcopy(base), folder / "xy" / "combined")]


WAYS["combined"] = combined


def tensors_of(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.rglob("adapter_model.safetensors"))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def live(way, kind, dtype, folder):
    base = MLP().to(kind)
    with default(dtype):
        models = WAYS[way](base, folder)
        outputs = [model.eval()(inputs().to(kind)).detach() for model in models]
    return models, outputs, tensors_of(folder)


def assert_same_life(found, expected):
    for mine, theirs in zip(found[0], expected[0], strict=True):
        ours = dict(theirs.state_dict())
        assert mine.state_dict().keys() == ours.keys()
        for name, tensor in mine.state_dict().items():
            assert (tensor.dtype, tensor.device) == (ours[name].dtype, ours[name].device), name
            assert torch.equal(tensor, ours[name]), name
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert torch.equal(mine, theirs)
    assert found[2] == expected[2]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_a_whole_life_is_the_same_under_any_default_dtype(way, dtype, kind, tmp_path):
    expected = live(way, kind, torch.float32, tmp_path / "usual")
    assert_same_life(live(way, kind, dtype, tmp_path / "other"), expected)


def made_without_data(base, folder):
    options = {"score": "random", "init_weights": False}
    folder.mkdir()
    for name, more in {"x": {}, "y": {"granularity": "row"}, "z": {"rho": 0, "seed": 1}}.items():
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), config(**(options | more)))
        model.save_pretrained(folder / name)
    models = [PeftModel.from_pretrained(copy.deepcopy(base), folder / n) for n in "xyz"]
    reused = config(selection_from=folder / "x", selection_values="trained")
    models.append(get_peft_model(copy.deepcopy(base), reused))
    continued = config(continue_from=folder / "z", score="magnitude")
    models.append(get_peft_model(copy.deepcopy(base), continued))
    adapters, weights = [folder / "z", folder / "x"], [0.3, 0.7]
    models.append(combine(copy.deepcopy(base), adapters, weights=weights, keep=folder / "x")[0])
    models.append(extract(copy.deepcopy(base), tuned_copy(base), config(external_modules=None))[0])
    return models


WAYS["made without data"] = made_without_data


def test_a_default_device_does_not_matter_to_a_model_that_has_one(tmp_path):
    """Such as inside `with torch.device("cuda")`; meta stands for it on machines without one."""
    way = "made without data"
    expected = live(way, torch.float32, torch.float32, tmp_path / "usual")
    base = MLP()
    batch = inputs()
    with torch.device("meta"):
        models = made_without_data(base, tmp_path / "other")
    outputs = [model.eval()(batch).detach() for model in models]
    assert_same_life((models, outputs, tensors_of(tmp_path / "other")), expected)
