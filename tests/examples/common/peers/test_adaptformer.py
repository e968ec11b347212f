# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from tests.examples.common.peers.kit import found, peer, swinv2
from tests.tiny import upernet


def test_a_scaled_branch_is_added_beside_the_mlp() -> None:
    model = upernet()
    peer("adaptformer").add(found(model), 5)
    block = model.backbone.encoder.layers[2].blocks[1]
    adapter = block.output.dense
    torch.manual_seed(0)
    for parameter in (*adapter.down.parameters(), *adapter.up.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 7, adapter.down.in_features)

    with torch.no_grad():
        found_output = block.output(block.intermediate(x))
        hidden = torch.nn.functional.gelu(block.intermediate.dense.base_layer(x))
        mlp = adapter.base_layer(hidden)
        inner = (x @ adapter.down.weight.T + adapter.down.bias).clamp_min(0)
        branch = inner @ adapter.up.weight.T + adapter.up.bias

    assert torch.allclose(found_output, mlp + 0.1 * branch, atol=1e-6)
    assert adapter.down.out_features == 5
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trained
    assert all(".down." in name or ".up." in name for name in trained)


def test_counts_without_biases_are_those_of_table_4() -> None:
    backbone = swinv2("base")
    for width, millions in ((32, 0.770), (64, 1.540), (128, 3.080), (256, 6.095), (512, 11.862)):
        dims = [128 * 2**i for i, depth in enumerate((2, 2, 18, 2)) for _ in range(depth)]
        biases = sum(dim + min(width, dim) for dim in dims)
        count = peer("adaptformer").parameters(backbone, width) - biases
        assert round(count / 1e6, 3) == millions
