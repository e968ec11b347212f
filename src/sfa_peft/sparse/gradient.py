# SPDX-License-Identifier: Apache-2.0
"""How a weight's gradient reaches the values of a sparse change: two small autograd functions.

No weight is ever copied: `LiveWeight` passes it on as an alias, and its backward gathers entries
from the dense gradient of one layer at a time. `Cut` joins what the layers gathered.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SFAError
from .delta import Spans, span_length


class Cut(torch.autograd.Function):
    """Cut the pool into one slice per layer; backward joins the layers' gradients.

    The slices carry no data (live weights hold the values): a slice is one element, expanded. No
    tensor is saved, so one cut serves any number of forwards and backwards.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, spans: list[Spans]) -> tuple[Tensor, ...]:
        """Return one stand-in per weight, of the length of its slice."""
        ctx.spans, ctx.shape = spans, values.shape
        ctx.options = {"dtype": values.dtype, "device": values.device}
        ctx.set_materialize_grads(False)
        sizes = [span_length(layer) for layer in spans]
        return tuple(
            values.new_zeros(1).expand(size) if size else values.new_zeros(0) for size in sizes
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:  # pyright: ignore
        """Return the gradient of all values."""
        pieces: list[tuple[int, Tensor]] = []
        for spans, grad in zip(ctx.spans, grads, strict=True):
            if spans:
                own = torch.zeros(span_length(spans), **ctx.options) if grad is None else grad
                parts = own.split([b - a for a, b in spans])
                pieces += [(a, part) for (a, _), part in zip(spans, parts, strict=True)]
        pieces.sort(key=lambda piece: piece[0])  # slots are dealt out without gaps
        assigned = sum(part.numel() for _, part in pieces)
        rest = torch.zeros(ctx.shape[0] - assigned, **ctx.options)
        joined = torch.cat([*(part for _, part in pieces), rest])
        return joined, None


class Observer:
    """What is shown the dense gradient of a weight, in eager and in compiled backwards.

    Args:
        function: Called with each gradient.
    """

    def __init__(self, function: Callable[[Tensor], None]) -> None:
        self.function = function
        self.handle = next(_handles)  # a graph can hold a number, but no object
        _OBSERVERS[self.handle] = self

    def __call__(self, gradient: Tensor) -> None:
        """Show a gradient.

        Raises:
            SFAError: While a CUDA graph is recorded, which would not show it when it is played.
        """
        if gradient.is_cuda and torch.cuda.is_current_stream_capturing():
            raise SFAError(
                "A backward that adds to the scores of a selection is being recorded as a CUDA "
                "graph, which would leave out all scores but those of the recording. Record after "
                "the last pick; or use torch.compile without a mode, or from torch 2.9 on with any."
            )
        self.function(gradient)


_handles = itertools.count()
_OBSERVERS: weakref.WeakValueDictionary[int, Observer] = weakref.WeakValueDictionary()


#: Not to become part of a CUDA graph, which calls the observer while it is recorded, and never when
#: it is played. Older releases of torch cannot be told; there the observer refuses.
_TAGS: Any = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    _TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)}  # pyright: ignore


@torch.library.custom_op("sfa_peft::hand_over", mutates_args=(), **_TAGS)
def hand_over(gradient: Tensor, indices: Tensor, handle: int) -> Tensor:
    """Show a gradient to an observer and return its entries at flat positions: one graph node."""
    observer = _OBSERVERS.get(handle)
    if observer is not None:
        observer(gradient)
    return gradient.reshape(-1).index_select(0, indices)


@hand_over.register_fake
def _(gradient: Tensor, indices: Tensor, handle: int) -> Tensor:
    return gradient.new_empty(indices.shape)


class Tap(NamedTuple):
    """What one adapter wants from a weight's gradient."""

    indices: Tensor  # flat positions in the weight, int32, in the order of the adapter's slots
    observer: Observer | None  # gets the dense gradient (scores)


class LiveWeight(torch.autograd.Function):
    """Pass a weight on as an alias; on the way back hand its gradient to adapters.

    Backward sees the dense gradient of one layer, gives it to observers, and returns its entries at
    each adapter's indices as the gradient of that adapter's slice. It is freed right after.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, taps: Sequence[Tap], *slices: Tensor) -> Tensor:
        """Return an alias of the weight that depends on the slices."""
        ctx.taps = taps
        ctx.kinds = [(s.device, s.dtype) for s in slices]
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gathered gradient of each slice."""
        flat = grad.reshape(-1)
        slice_grads = []
        for tap, kind in zip(ctx.taps, ctx.kinds, strict=True):
            if torch.compiler.is_compiling() and tap.observer is not None:
                gathered = hand_over(grad, tap.indices, tap.observer.handle)
            else:
                if tap.observer is not None:
                    tap.observer(grad)
                gathered = flat.index_select(0, tap.indices)
            slice_grads.append(gathered.to(*kind))  # the pool may be on another device
        return (grad if ctx.needs_input_grad[0] else None, None, *slice_grads)
