# SPDX-License-Identifier: Apache-2.0
"""What records or transforms a forward never records that weights are written."""

import io

import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import SFAConfig, SFAError
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

RHOS = [0, 0.5]
FORMS = ["loaded", "merged", "set to eval after training"]


def x_of(rows=5):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(1))


def config(rho):
    return SFAConfig(
        budget=0.5,
        rho=rho,
        score="random",
        target_modules=["first", "second"],
        external_modules=["second"] if rho else None,
    )


def trained(rho):
    torch.manual_seed(0)
    model = get_peft_model(MLP(), config(rho))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sfa_" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(params=[(rho, form) for rho in RHOS for form in FORMS], ids=str)
def case(request, tmp_path):
    """A model in which no forward has run yet, its inputs, and what it must give."""
    rho, form = request.param
    model = trained(rho)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.eval()(x_of())
    if form == "set to eval after training":
        return trained(rho).train().eval(), x_of(), expected
    model = PeftModel.from_pretrained(MLP(), tmp_path)
    if form == "merged":
        model.merge_adapter()
    return model, x_of(), expected


def test_the_change_is_there_to_be_recorded(case):
    model, x, expected = case
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(x), expected, atol=0.05)


def test_jit_trace(case):
    model, x, expected = case
    traced = torch.jit.trace(model, x, check_trace=False)
    for _ in range(3):
        assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("rho", RHOS)
def test_jit_trace_of_a_change_that_no_forward_has_written(rho):
    model = trained(rho).eval()
    with torch.no_grad():
        find_pool(model, "default").values.mul_(2)  # written by the recorded forward, unrecorded
        traced = torch.jit.trace(model, x_of(), check_trace=False)
        assert torch.equal(traced(x_of()), model(x_of()))


@pytest.mark.parametrize("strict", [False, True])
def test_export(case, strict):
    model, x, expected = case
    module = torch.export.export(model, (x,), strict=strict).module()
    for _ in range(2):
        assert torch.equal(module(x), expected)


def test_export_of_a_change_that_is_not_written_is_refused():
    model = trained(0).train()
    with pytest.raises(SFAError, match=r"Call model\.eval\(\) right before"):
        torch.export.export(model, (x_of(),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(case, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x, expected = case
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = [tensor.name for tensor in session.get_inputs()]
    for _ in range(2):
        (found,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


def test_a_gradient_by_torch_func(case):
    model, x, _ = case
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    found = torch.func.grad(loss, argnums=1)(parameters, x)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    assert torch.equal(found, leaf.grad)


@pytest.mark.parametrize("rho", RHOS)
def test_the_gradient_of_values_by_torch_func_is_that_of_a_backward(rho):
    model = trained(rho).eval()
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x_of(),)).square().sum()

    found = torch.func.grad(loss)({n: p.detach() for n, p in wanted.items()})
    model(x_of()).square().sum().backward()
    for name, parameter in wanted.items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_vmap(case):
    model, x, expected = case
    with torch.no_grad():
        found = torch.func.vmap(model)(x[:, None])[:, 0]
    torch.testing.assert_close(found, expected)


def test_a_recorded_graph_is_plain_where_nothing_but_weights_is_changed(tmp_path):
    trained(0).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(MLP(), tmp_path)
    graph = torch.export.export(model, (x_of(),)).graph
    bare = torch.export.export(MLP().eval(), (x_of(),)).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [
        n.target for n in bare.nodes if n.op == "call_function"
    ]
