# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from tests.examples.common.peers.kit import found, peer, swinv2, tiny_vit, vit_base


def test_the_biases_are_trained_and_nothing_else() -> None:
    model = tiny_vit()
    backbone = found(model)

    peer("bitfit").add(backbone, 1)

    inner = dict(backbone.module.named_parameters())
    trained = {name for name, p in inner.items() if p.requires_grad}
    assert trained == {name for name in inner if name.endswith("bias")}
    assert len(trained) == 3 * (4 + 2 + 2) + 2  # of each block, patches and the last norm
    counted = peer("bitfit").parameters(backbone, 1)
    assert counted == sum(inner[name].numel() for name in trained)


def test_counts_are_the_published_ones() -> None:
    vit, swin = vit_base(), swinv2("base")
    # 0.10 M of ViT-B, and 0.2 % of a Swin-B, in the tables of others.
    assert peer("bitfit").parameters(vit, 1) == 102_912
    assert peer("bitfit").parameters(swin, 1) == 134_656
    share = 134_656 / sum(p.numel() for p in swin.module.parameters())
    assert (round(100 * share, 2), round(100 * share, 1)) == (0.15, 0.2)
