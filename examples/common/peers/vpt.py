# SPDX-License-Identifier: Apache-2.0
"""VPT-Deep (https://arxiv.org/abs/2203.12119): learned tokens, others in each block.

They join the image's. What those of one block become is replaced in the next one, so they matter
as keys and values of its attention only. In ViT they stand after the class token. In SwinV2, as in
the authors' Swin, each window gets them all, with no position bias and no mask. They start uniform,
by the fan of the patch embedding. Not the pretrained model before training, since attention is
shared with them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from common.peers.peer import Peer, find_blocks
from sfa_peft import Backbone, TargetError


class PromptedWindows(nn.Module):
    """SwinV2's attention inside of windows, with further keys and values.

    Args:
        attention: The block's own.
        prompts: The tokens, `(P, C)`.
    """

    def __init__(self, attention: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.inner = attention
        self.prompts = nn.Parameter(prompts)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *_others: Any, **_options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new features and the attention.

        Args:
            x: Tokens of all windows, `(B * windows, N, C)`.
            mask: What is added to scores between tokens, `(windows, N, N)`.
        """
        own = self.inner
        queries = self._heads(own.query(x))
        keys = torch.cat((self._shared(own.key, x), self._heads(own.key(x))), dim=2)
        values = torch.cat((self._shared(own.value, x), self._heads(own.value(x))), dim=2)
        cosines = nn.functional.normalize(queries, dim=-1) @ nn.functional.normalize(
            keys, dim=-1
        ).transpose(-2, -1)
        scores = cosines * own.logit_scale.clamp(max=math.log(100)).exp()
        between = nn.functional.pad(self._between_tokens(mask), (len(self.prompts), 0))
        scores = (scores.unflatten(0, (-1, len(between))) + between).flatten(0, 1)
        attention = own.dropout(scores.softmax(dim=-1))
        return (attention @ values).transpose(1, 2).flatten(2), attention

    def _heads(self, x: Tensor) -> Tensor:
        """Return `(B, N, C)` as `(B, heads, N, C / heads)`."""
        return x.unflatten(-1, (self.inner.num_attention_heads, -1)).transpose(1, 2)

    def _shared(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Return keys or values of the prompts for every window."""
        return self._heads(projection(self.prompts)[None]).expand(len(x), -1, -1, -1)

    def _between_tokens(self, mask: Tensor | None) -> Tensor:
        """Return position bias and mask, `(windows or 1, heads, N, N)`."""
        own = self.inner
        table = own.continuous_position_bias_mlp(own.relative_coords_table).flatten(0, 2)
        bias = 16 * table[own.relative_position_index].permute(2, 0, 1).sigmoid()[None]
        # The mask twice, as transformers does.
        return bias if mask is None else bias + 2 * mask[:, None]


class PromptedTokens(nn.Module):
    """ViT's attention with further tokens after the first one.

    Args:
        attention: The block's own.
        norm: What the block normalises its tokens with before it.
        prompts: The tokens, `(P, C)`.
    """

    def __init__(self, attention: nn.Module, norm: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.inner = attention
        self.prompts = nn.Parameter(prompts)
        self._norm = [norm]  # in a list, so that it is not registered as a part a second time

    def forward(self, x: Tensor, *others: Any, **options: Any) -> Any:
        """Return what the attention does with tokens `(B, N, C)`."""
        prompts = self._norm[0](self.prompts).expand(len(x), -1, -1)
        output = self.inner(torch.cat((x[:, :1], prompts, x[:, 1:]), dim=1), *others, **options)
        first, *more = output if isinstance(output, tuple) else (output,)
        kept = torch.cat((first[:, :1], first[:, 1 + len(self.prompts) :]), dim=1)
        return (kept, *more) if isinstance(output, tuple) else kept


def add(backbone: Backbone, count: int) -> None:
    """Give each block of a backbone, whose own weights are frozen, so many prompts.

    Args:
        backbone: What `find_backbone` returns, a SwinV2 or ViT; changed in place.
        count: Prompts of a block (of SwinV2: of each window, the same).

    Raises:
        TargetError: If it is another backbone.
    """
    if backbone.model_type not in ("swinv2", "vit"):
        raise TargetError(f"--method vpt: knows SwinV2 and ViT, got {backbone.model_type}")
    backbone.module.requires_grad_(False)
    patches = backbone.module.embeddings.patch_embeddings.projection
    fan = 3 * math.prod(patches.kernel_size) + patches.out_channels
    limit = math.sqrt(6 / fan)
    for block in find_blocks(backbone):
        start = patches.weight.new_empty(count, block.features).uniform_(-limit, limit)
        attention = block.module.attention
        if backbone.model_type == "swinv2":
            attention.self = PromptedWindows(attention.self, start)
        else:
            norm = block.module.layernorm_before
            block.module.attention = PromptedTokens(attention, norm, start)


def parameters(backbone: Backbone, count: int) -> int:
    """Return the parameters of the prompts of a backbone."""
    return sum(count * block.features for block in find_blocks(backbone))


VPT = Peer("VPT-Deep", add, parameters, "VPT-Deep with one prompt a block")
