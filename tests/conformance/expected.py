# SPDX-License-Identifier: Apache-2.0
"""Failures that are not the method's: bugs of PEFT or transformers, each with its proof.

A proof is a few lines without SFA. It runs before the suite: where the installed versions do not
have the bug any more, the cases must pass.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import ShiraConfig, get_peft_model
from torch import nn
from transformers import Swinv2Config, Swinv2Model


@dataclass(frozen=True)
class Expected:
    """Cases (a glob over pytest's names) that fail as long as `is_present()` shows the bug."""

    cases: str
    reason: str
    is_present: Callable[[], bool]


@dataclass(frozen=True)
class NotApplicable:
    """Cases that PEFT itself leaves out for methods of this kind."""

    cases: str
    reason: str


def hook_wants_a_tensor_where_swinv2_gives_a_tuple() -> bool:
    """`enable_input_require_grads` breaks the forward of SwinV2."""
    shape = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16}
    model = Swinv2Model(Swinv2Config(**shape, depths=[1], num_heads=[2]))
    model.enable_input_require_grads()
    try:
        model(torch.zeros(1, 3, 32, 32))
    except AttributeError as error:
        return "'tuple' object" in str(error)
    return False


def unload_wants_a_weight_where_the_head_has_several() -> bool:
    """`unload` raises if `modules_to_save` names a head that is made of layers."""
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=head))
    config = ShiraConfig(r=1, target_modules=["body"], modules_to_save=["head"])
    try:
        get_peft_model(model, config).unload()
    except AttributeError as error:
        return "no attribute 'weight'" in str(error)
    return False


EMBEDDINGS_TUPLE = Expected(
    "test_common_gradient_checkpointing*swinv2*",
    "transformers: the hook of enable_input_require_grads wants a tensor, SwinV2's patch "
    "embeddings give a tuple",
    hook_wants_a_tensor_where_swinv2_gives_a_tuple,
)
_HEADS = ("segformer_seg", "upernet_swinv2", "dpt_swinv2_depth")
COMPOSITE_HEAD = tuple(
    Expected(
        f"{test}*{check}*{model}*",
        "PEFT: unload wants .weight of a composite head, "
        "https://github.com/huggingface/peft/issues/3114",
        unload_wants_a_weight_where_the_head_has_several,
    )
    for model in _HEADS
    for test, check in (
        ("test_common", "merge_layers_nan"),
        ("test_common", "unload_adapter"),
        ("test_merged_output", ""),
    )
)
