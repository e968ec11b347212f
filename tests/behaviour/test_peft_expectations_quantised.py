# SPDX-License-Identifier: Apache-2.0
"""Quantised bases: what can work does, what cannot says so before anything is changed.

Real quantisers take part where they are installed; two stand-ins, made like them, always do.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sfa_peft import SFAConfig, SFAWarning, TargetError, budget_report
from sfa_peft.tuner.weight_storage import is_packed
from tests.tiny import images, upernet

WIDE = {"embed_dim": 64}  # blocks of 4-bit codes on a CPU
HEAD = {"modules_to_save": ["decode_head"]}


class Int8Linear(nn.Linear):
    """Codes in `weight`, as in bitsandbytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class PackedLinear(nn.Module):
    """Two codes to a byte in a buffer and no `weight` at all, as in GPTQ and AWQ."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().max() / 7)
        codes = ((weight / self.scale).round() + 8).to(torch.uint8)
        self.register_buffer("qweight", codes[:, ::2] * 16 + codes[:, 1::2])
        self.bias = linear.bias

    def forward(self, x):
        codes = torch.stack([self.qweight // 16, self.qweight % 16], -1).flatten(1)
        return nn.functional.linear(x, (codes.to(x.dtype) - 8) * self.scale, self.bias)


def bnb_8bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def bnb_4bit(linear):
    bnb = pytest.importorskip("bitsandbytes")
    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    layer = bnb.nn.Linear4bit(*sizes, bias=bias)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_int8(linear):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


def hqq_4bit(linear):
    quantize = pytest.importorskip("hqq.core.quantize")
    settings = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    return quantize.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")


QUANTISERS = [Int8Linear, PackedLinear, bnb_8bit, bnb_4bit, torchao_int8, hqq_4bit]


def quantised(quantise):
    """Return the tiny segmentation model with the linears of its blocks quantised."""
    model = upernet(**WIDE)
    blocks = [n for n, _ in model.named_modules() if ".blocks." in n and "position_bias" not in n]
    for name in blocks:
        layer = model.get_submodule(name)
        if type(layer) is nn.Linear:
            model.set_submodule(name, quantise(layer))
    model.requires_grad_(False)
    return model.eval()


def same(one, other, quantise) -> bool:
    """Compare outputs to the bit; bitsandbytes has other 4-bit kernels without gradients."""
    return torch.allclose(one, other, atol=1e-3 if quantise is bnb_4bit else 0, rtol=0)


@pytest.fixture(params=QUANTISERS, ids=lambda q: q.__name__)
def quantise(request):
    return request.param


@pytest.mark.parametrize("options", [{}, {"rho": 0}, {"rho": 0, "score": "magnitude"}])
def test_a_selection_inside_packed_weights_is_refused_before_the_model_is_touched(
    quantise, options
):
    model = quantised(quantise)
    with pytest.raises(TargetError, match=r"query` \(\w+\) holds a packed .*rho=1"):
        get_peft_model(model, SFAConfig(**options, **HEAD))
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


def test_external_adapters_train_save_load_and_merge_on_a_quantised_base(quantise, tmp_path):
    batch = images()
    expected = quantised(quantise)(batch["pixel_values"]).logits
    model = get_peft_model(quantised(quantise), SFAConfig(rho=1, **HEAD)).eval()
    assert same(model(batch["pixel_values"]).logits, expected, quantise)
    plain = get_peft_model(upernet(**WIDE), SFAConfig(rho=1, **HEAD))
    # The budget is a share of weights, not of bytes.
    assert budget_report(model).backbone == budget_report(plain).backbone
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert any(".sfa_up." in n for n in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=10)
    model(**batch).loss.backward()
    optimizer.step()
    after = model(batch["pixel_values"]).logits
    assert not same(after, expected, quantise)
    with model.disable_adapter():
        assert same(model(batch["pixel_values"]).logits, expected, quantise)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(quantise), tmp_path).eval()
    assert same(loaded(batch["pixel_values"]).logits, after, quantise)
    with pytest.warns(SFAWarning, match="External adapters cannot be folded"):
        merged = loaded.merge_and_unload()
    assert same(merged(batch["pixel_values"]).logits, after, quantise)


def test_selected_weights_of_plain_layers_go_with_external_adapters_on_packed_ones():
    config = SFAConfig(
        rho=0.5,
        score="magnitude",
        target_modules=["downsample.reduction"],
        external_modules=["output.dense"],
        **HEAD,
    )
    model = get_peft_model(quantised(Int8Linear), config)
    report = budget_report(model)
    assert report.external > 0
    assert report.internal == report.selected > 0
    model(**images()).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if ".sfa_up." in n or ".sfa_pool." in n]
    assert grads
    assert all(bool(g.any()) for g in grads)


def test_codes_are_told_from_weights():
    assert is_packed(torch.zeros(2, dtype=torch.uint8))
    assert is_packed(torch.zeros(2, dtype=torch.float8_e4m3fn))
    assert not any(is_packed(torch.zeros(2, dtype=d)) for d in (torch.float32, torch.bfloat16))
