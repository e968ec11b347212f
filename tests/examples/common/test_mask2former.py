# SPDX-License-Identifier: Apache-2.0
"""The Mask2Former head of both scripts starts as that of Mask2Former's own code."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH = 128

Start = Callable[[Tensor], Any]


def torch_linear_bias(fan_in: int) -> Start:
    return lambda bias: nn.init.uniform_(bias, -(fan_in**-0.5), fan_in**-0.5)


def attention_part(rows: slice) -> Start:
    """Return the start of a part of the one projection of torch's attention."""

    def start(weight: Tensor) -> None:
        whole = torch.empty(3 * WIDTH, WIDTH)
        nn.init.xavier_uniform_(whole)
        weight.copy_(whole[rows])

    return start


def grid(bias: Tensor) -> None:
    """Eight heads look in eight directions, 1 to 4 steps far, the same on all levels."""
    angles = torch.arange(8) * torch.pi / 4
    square = torch.stack([angles.cos(), angles.sin()], -1)
    square = square / square.abs().max(-1, keepdim=True).values
    heads = [[[way * far for far in range(1, 5)] for _ in range(3)] for way in square]
    bias.copy_(torch.cat([point for head in heads for level in head for point in level]))


def smallest(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=5**0.5)


def caffe2_xavier(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=1)


# By the end of a name: what facebookresearch/Mask2Former does with that tensor
# (modeling/pixel_decoder/msdeformattn.py and ops/modules/ms_deform_attn.py,
# modeling/transformer_decoder/mask2former_transformer_decoder.py), "xavier_uniform_" unless said.
ORIGINAL: dict[str, Start] = {
    # pixel decoder
    r"input_projections\.\d\.0\.weight": nn.init.xavier_uniform_,
    r"input_projections\.\d\.0\.bias": nn.init.zeros_,
    r"sampling_offsets\.weight": nn.init.zeros_,
    r"sampling_offsets\.bias": grid,
    r"attention_weights\.(weight|bias)": nn.init.zeros_,
    r"(value|output)_proj\.weight": nn.init.xavier_uniform_,
    r"(value|output)_proj\.bias": nn.init.zeros_,
    r"pixel_level_module\.decoder\.level_embed": nn.init.normal_,
    r"mask_projection\.weight": caffe2_xavier,
    r"mask_projection\.bias": nn.init.zeros_,
    r"(adapter|layer)_1\.0\.weight": caffe2_xavier,
    # decoder
    r"self_attn\.q_proj\.weight": attention_part(slice(0, WIDTH)),
    r"self_attn\.k_proj\.weight": attention_part(slice(WIDTH, 2 * WIDTH)),
    r"self_attn\.v_proj\.weight": attention_part(slice(2 * WIDTH, 3 * WIDTH)),
    r"self_attn\.[qkv]_proj\.bias": nn.init.zeros_,
    r"cross_attn\.in_proj_weight": nn.init.xavier_uniform_,
    r"cross_attn\.in_proj_bias": nn.init.zeros_,
    r"attn\.out_proj\.weight": nn.init.xavier_uniform_,
    r"attn\.out_proj\.bias": nn.init.zeros_,
    r"queries_(embedder|features)\.weight": nn.init.normal_,
    r"transformer_module\.level_embed\.weight": nn.init.normal_,
    r"(mask_embedder\.\d\.0|class_predictor)\.weight": smallest,
    r"(mask_embedder\.\d\.0|class_predictor)\.bias": torch_linear_bias(WIDTH),
    # both
    r"layers\.\d\.fc[12]\.weight": nn.init.xavier_uniform_,
    r"layers\.\d\.fc1\.bias": torch_linear_bias(WIDTH),
    r"encoder\.layers\.\d\.fc2\.bias": torch_linear_bias(4 * WIDTH),
    r"transformer_module\.decoder\.layers\.\d\.fc2\.bias": torch_linear_bias(8 * WIDTH),
    r"(layer_?norm|input_projections\.\d\.1|(adapter|layer)_1\.1)\.weight": nn.init.ones_,
    r"(layer_?norm|input_projections\.\d\.1|(adapter|layer)_1\.1)\.bias": nn.init.zeros_,
}


@pytest.mark.parametrize("task", ["semantic_segmentation", "instance_segmentation"])
def test_every_layer_of_the_head_starts_as_the_originals(task: str) -> None:
    script = importlib.import_module(task)
    options = {"hidden_size": WIDTH, "num_queries": 40, "encoder_layers": 1, "decoder_layers": 2}
    args = script.Arguments(**options, eval_size=[64, 64])
    if task == "semantic_segmentation":
        args.head = "mask2former"
    names = [str(i) for i in range(20)]
    model = script.make_model(args, importlib.import_module("common.data").Data([], [], names))
    torch.manual_seed(1)

    parameters = dict(model.named_parameters())
    head = {n: p for n, p in parameters.items() if "pixel_level_module.encoder" not in n}
    assert len(head) > 50
    for name, found in head.items():
        matching = [s for pattern, s in ORIGINAL.items() if re.search(f"{pattern}$", name)]
        assert len(matching) == 1, name
        wanted = torch.empty_like(found)
        with torch.no_grad():
            matching[0](wanted)
        assert_same_distribution(name, found.detach(), wanted)


def assert_same_distribution(name: str, found: Tensor, wanted: Tensor) -> None:
    """Compare constants exactly; of drawn numbers the deviation, and how far the largest are."""
    if wanted.unique().numel() < 20:
        torch.testing.assert_close(found, wanted, msg=name)
        return
    rare = 4 / found.numel() ** 0.5  # four standard errors, or a bit less
    spread = wanted.std().item()
    assert found.mean().item() == pytest.approx(0, abs=rare * spread), name
    assert found.std().item() == pytest.approx(spread, rel=rare), name
    # 1.73 where uniform, well above where normal.
    kinds = [float(x.abs().max() / x.std()) < 2.1 for x in (found, wanted)]
    assert kinds[0] == kinds[1], name


def test_a_start_that_differs_is_seen() -> None:
    torch.manual_seed(0)
    uniform = torch.empty(64, 64)
    nn.init.xavier_uniform_(uniform)
    normal = torch.randn(64, 64) * uniform.std()

    assert_same_distribution("same", uniform, uniform[torch.randperm(64)])
    for other in (normal, uniform * 0.5**0.5, uniform + uniform.std(), torch.zeros(64, 64)):
        with pytest.raises(AssertionError):
            assert_same_distribution("other", other, uniform)
