# SPDX-License-Identifier: Apache-2.0
"""Saving, loading, switching and merging on the pretended device and on two of them."""

import pytest
import torch
from peft import PeftModel

from sfa_peft import MergeWarning
from tests.pretended.runs import ONE, Run, Stack, adapt, images
from tests.pretended.test_training import split

PLACES = {"one device": lambda base: base.to(ONE), "two devices": split}


def answer(model):
    with torch.no_grad():
        return model.eval()(images(0).to(ONE)).cpu()


@pytest.fixture(params=PLACES)
def place(request):
    return PLACES[request.param]


def test_what_was_trained_is_loaded_switched_and_merged_to_the_bit(place, tmp_path):
    answers = {}
    for name in ("a", "b"):
        run = Run(adapt(place(Stack()), score_dtype="bfloat16" if name == "b" else "float32"))
        run.steps(16 if name == "a" else 10)
        answers[name] = answer(run.model)
        run.model.save_pretrained(tmp_path / name)
    bare = answer(place(Stack()))
    model = PeftModel.from_pretrained(
        place(Stack()), tmp_path / "a", "a", torch_device="cpu"
    ).eval()
    model.load_adapter(tmp_path / "b", "b", torch_device="cpu")
    for name in ("b", "a", "b", "a"):
        model.set_adapter(name)
        assert torch.equal(answer(model), answers[name])
    with model.disable_adapter():
        assert torch.equal(answer(model), bare)
    model.merge_adapter()
    assert torch.equal(answer(model), answers["a"])
    model.unmerge_adapter()
    with pytest.warns(MergeWarning):  # of external adapters, which stay
        assert torch.equal(answer(model.merge_and_unload()), answers["a"])


def test_the_same_file_is_written_from_the_device_and_from_the_cpu(tmp_path):
    files = []
    for where in (ONE, "cpu"):
        run = Run(adapt(Stack()))
        run.steps(10)
        run.model.to(where).save_pretrained(tmp_path / where[:3])
        files.append((tmp_path / where[:3] / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_switching_back_and_forth_waits_for_nothing(device, tmp_path):
    for name in ("a", "b"):
        run = Run(adapt(Stack(), seed=1 if name == "a" else 2, score="random"))
        run.model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(Stack().to(ONE), tmp_path / "a", "a", torch_device="cpu")
    model.eval().load_adapter(tmp_path / "b", "b", torch_device="cpu")
    for name in ("b", "a"):
        model.set_adapter(name)
    with device.watched() as report:
        model.set_adapter("b")
        answer_of = model(images(0).to(ONE, non_blocking=True))
    assert not report.own_waits
    assert answer_of.device == torch.device(ONE)


def test_a_run_goes_on_from_a_selectors_state_on_the_device(device):
    run = Run(adapt(Stack().to(ONE), rho=0), kind=torch.optim.SGD).steps(7)
    state, weights = run.selector.state_dict(), run.model.state_dict()
    again = Run(adapt(Stack().to(ONE), rho=0), kind=torch.optim.SGD)
    again.model.load_state_dict(weights)
    again.selector.load_state_dict(
        {k: v for k, v in state.items() if k != "sums"}
        | {"sums": {k: v.cpu() for k, v in state["sums"].items()}}
    )
    again.num_steps = 7
    run.steps(8), again.steps(8)
    assert torch.equal(run.pool.slots.cpu(), again.pool.slots.cpu())
    assert torch.equal(run.pool.values.detach().cpu(), again.pool.values.detach().cpu())
