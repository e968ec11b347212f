# SPDX-License-Identifier: Apache-2.0
"""What all methods of others have in common: where they go, and how large they may be."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from posixpath import commonpath
from typing import Any

from torch import Tensor, nn

from sfa_peft import Backbone, BudgetError, role_modules

LARGEST = 2**16


@dataclass(frozen=True)
class Peer:
    """A method that freezes a backbone and trains something in it.

    Attributes:
        title: Its name for people.
        add: Freezes a backbone and puts the method into it at a size; changes it in place.
        parameters: What is trained then, without changing the backbone; grows with the size.
        smallest: What size 1 is called; None where the method has one size only.
        most: Largest size that makes sense in a backbone.
        is_new: Whether what is trained are new layers, with a rate of their own if asked for.
    """

    title: str
    add: Callable[[Backbone, int], None]
    parameters: Callable[[Backbone, int], int]
    smallest: str | None = None
    most: Callable[[Backbone], int] = lambda _: LARGEST
    is_new: bool = True


@dataclass(frozen=True)
class Block:
    """A transformer block.

    Attributes:
        module: The block.
        features: Channels of what it adds to.
    """

    module: nn.Module
    features: int


def find_blocks(backbone: Backbone) -> list[Block]:
    """Return the blocks of a backbone in call order: what the roles of its linears lie in."""
    paths, features = {}, {}
    for entry in role_modules(backbone):
        path = inside(backbone, entry.name).replace(".", "/")
        paths[entry.block] = commonpath((paths.get(entry.block, path), path))
        if entry.role == "mlp_out":
            layer = backbone.module.get_submodule(path.replace("/", "."))
            features[entry.block] = layer.out_features
    return [
        Block(backbone.module.get_submodule(path.replace("/", ".")), features[number])
        for number, path in paths.items()
    ]


def inside(backbone: Backbone, path: str) -> str:
    """Return a path in a model as one in its backbone."""
    return path.removeprefix(f"{backbone.name}.")


def attach(place: nn.Module, name: str, part: nn.Module) -> None:
    """Make a new part a child of the layer or block that it belongs to, and like it."""
    near = next(place.parameters())
    place.add_module(name, part.to(near.device, near.dtype).train(place.training))


def changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return what a block puts out, a tensor or a tuple that begins with it, with it changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)


def widest(backbone: Backbone) -> int:
    """Return the channels of the widest block: no bottleneck is wider than its layer."""
    return max(block.features for block in find_blocks(backbone))


def allowed(backbone: Backbone, budget: float) -> Fraction:
    """Return how many parameters a share of a backbone is."""
    return Fraction(str(budget)) * sum(p.numel() for p in backbone.module.parameters())


def largest(
    cost: Callable[[int], int],
    backbone: Backbone,
    budget: float,
    smallest: str,
    most: int = LARGEST,
) -> int:
    """Return the largest size whose cost, which grows with it, stays within the budget.

    Args:
        cost: Trained parameters of a size from 1 on.
        backbone: The backbone as it was pretrained.
        budget: Share of its parameters.
        smallest: What size 1 is called.
        most: Largest size to try.

    Raises:
        BudgetError: If size 1 is too large.
    """
    limit = allowed(backbone, budget)
    found = bisect_right(range(1, most + 1), limit, key=cost)
    if found == 0:
        total = sum(p.numel() for p in backbone.module.parameters())
        raise BudgetError(
            f"budget={budget} of {total} parameters: {smallest} already has {cost(1)}. The "
            f"smallest budget that works is {-(-cost(1) * 10**6 // total) / 10**6}"
        )
    return found


def size_of(peer: Peer, backbone: Backbone, budget: float, asked: int | None = None) -> int:
    """Return the size of a method: the largest within the budget, or that asked for.

    Raises:
        BudgetError: If the size is asked for and too large, or not even 1 is small enough.
    """
    if peer.smallest is None:
        return 1
    most = largest(
        lambda size: peer.parameters(backbone, size),
        backbone,
        budget,
        peer.smallest,
        most=peer.most(backbone),
    )
    if asked is not None and not 1 <= asked <= most:
        raise BudgetError(
            f"--adapter_dim {asked}: --budget {budget} allows {peer.title} 1 to {most}"
        )
    return most if asked is None else asked
