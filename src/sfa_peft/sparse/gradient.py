# SPDX-License-Identifier: Apache-2.0
"""How a weight's gradient reaches the values of a sparse change: small autograd functions.

No weight is ever copied: `LiveWeight` passes it on as an alias, and its backward gathers entries
from the dense gradient of one layer at a time. Where nobody looks at the dense gradient,
`SparseLinear` computes only the rows and columns of it that hold entries. `Cut` joins what the
layers gathered.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as any_global_hook

from ..errors import SFAError
from .delta import Spans, span_length

_F = TypeVar("_F", bound=Callable[..., Any])


def eager(function: _F) -> _F:
    """Keep a function out of graphs that torch.compile makes."""
    outside = torch.compiler.disable(function)  # costs time where nothing is compiled, too

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (outside if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return cast(_F, call)


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
TAGS: Any = {}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)}  # pyright: ignore


@torch.library.custom_op("sfa_peft::hand_over", mutates_args=(), **TAGS)
def hand_over(gradient: Tensor, indices: Tensor, handle: int) -> Tensor:
    """Show a gradient to an observer and return its entries at flat positions: one graph node."""
    observer = _OBSERVERS.get(handle)
    if observer is not None:
        observer(gradient)
    return gradient.reshape(-1).index_select(0, indices)


@hand_over.register_fake
def _(gradient: Tensor, indices: Tensor, handle: int) -> Tensor:
    return gradient.new_empty(indices.shape)


#: Rows or columns are left out of a product if at most this share of them is needed: fewer than
#: that are not worth the copy of the needed ones.
WORTH = 0.75
#: The same for columns of an input that several layers have: each keeps a copy of its own.
WORTH_OF_SHARED = 0.4


class Support(NamedTuple):
    """The rows and columns of a matrix that hold what an adapter wants, as a block of it."""

    rows: Tensor | None  # int64, increasing; None for all
    columns: Tensor | None
    places: Tensor  # int32, flat positions in the block, in the order of the adapter's slots


def find_support(indices: Tensor, shape: torch.Size, columns_worth: float = WORTH) -> Support:
    """Return the block of a matrix that holds entries.

    Args:
        indices: Flat positions of the entries in the matrix, int32 or int64 (n,).
        shape: Of the matrix.
        columns_worth: Up to which share of needed columns the others are left out.
    """
    row, column = indices // shape[1], indices % shape[1]
    rows, row = _needed(row, shape[0], WORTH)
    columns, column = _needed(column, shape[1], columns_worth)
    width = shape[1] if columns is None else columns.numel()
    return Support(rows, columns, (row * width + column).to(indices.dtype))


def _needed(numbers: Tensor, size: int, worth: float) -> tuple[Tensor | None, Tensor]:
    """Return the different numbers below `size`, and which of them each is; or None and itself."""
    is_needed = torch.zeros(size, dtype=torch.bool, device=numbers.device)
    is_needed[numbers] = True
    needed = is_needed.nonzero().squeeze(1)
    if needed.numel() > worth * size:
        return None, numbers
    return needed, (is_needed.cumsum(0) - 1)[numbers]


class Tap(NamedTuple):
    """What one adapter wants from a weight's gradient."""

    indices: Tensor  # flat positions in the weight, int32, in the order of the adapter's slots
    observer: Observer | None  # gets the dense gradient (scores)
    support: Support | None = None  # where nothing else of the gradient is wanted


#: Number of a node that runs as soon as it can, as those that accumulate gradients do.
_AT_ONCE = 2**63 - 1


class Tapped(NamedTuple):
    """What adapters want from a weight's gradient, and what stands for where it goes."""

    taps: list[Tap]
    stand_ins: list[Tensor]
    alias: Tensor | None = None  # of the weight, wired already

    def with_alias_of(self, weight: Tensor) -> Tapped:
        """Return the same, wired to a weight for as many forwards as wanted."""
        if not self.taps or all(tap.support is not None for tap in self.taps):
            return self
        if any(part.dtype != weight.dtype for part in self.stand_ins):
            return self  # autograd would add what several uses hand back in the weight's dtype
        with torch.enable_grad():
            alias = LiveWeight.apply(weight, self.taps, *self.stand_ins)
        # Backwards go from the latest node to the earliest. This one is older than the forward: it
        # would come last, and the gradients of all weights would wait for it in memory.
        first = getattr(alias.grad_fn, "_set_sequence_nr", None)
        if first is None:  # torch is too old
            return self
        first(_AT_ONCE)
        return self._replace(alias=alias)

    def dense(self) -> Tapped:
        """Return the same for a backward that computes the whole gradient."""
        return Tapped([Tap(tap.indices, tap.observer) for tap in self.taps], self.stand_ins)


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
        # No view for autograd, which would have to be made anew after each write.
        return weight.detach()

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


class SparseLinear(torch.autograd.Function):
    """A linear layer whose weight gets the gradient of an adapter's entries only.

    Other rows and columns of it are never computed, and other columns of the input are not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        needed: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        support: Support,
        slice_: Tensor,
    ) -> Tensor:
        """Return the layer's output; `needed` are the columns of `x` that the support names."""
        # None for all: compilers refuse one tensor in two places.
        ctx.support, ctx.kind = support, (slice_.device, slice_.dtype)
        ctx.save_for_backward(x if needed is None else needed, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gradient of the input, and that of the slice."""
        needed, weight = ctx.saved_tensors
        rows, _, places = ctx.support
        flat = grad.reshape(-1, grad.shape[-1])
        wanted = flat if rows is None else flat.index_select(1, rows)
        block = wanted.t() @ needed.reshape(flat.shape[0], needed.shape[-1])
        own = block.reshape(-1).index_select(0, places).to(*ctx.kind)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None, None, own


def call_tapped(
    layer: nn.Module, tapped: dict[str, Tapped], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Return the output of a layer, some of whose parameters have taps."""
    tapped = {name: found for name, found in tapped.items() if found.taps}
    if not tapped:
        return layer(*args, **kwargs)
    if _is_plain_linear(layer) and len(args) == 1 and not kwargs:
        return _linear(args[0], layer._parameters, tapped)
    # By name: any type of layer and the hooks on it keep working.
    live = {name: _live(getattr(layer, name), found) for name, found in tapped.items()}
    return torch.func.functional_call(layer, live, args, kwargs)


def _live(weight: Tensor, tapped: Tapped) -> Tensor:
    if tapped.alias is not None and not torch.compiler.is_compiling():
        return tapped.alias
    return LiveWeight.apply(weight, tapped.taps, *tapped.stand_ins)


def _is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling a layer is `F.linear` and nothing else: no hooks, no forward of its own."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or len(layer._parameters) != 2:
        return False
    hooks = layer._forward_pre_hooks or layer._forward_hooks
    return not (hooks or layer._backward_pre_hooks or layer._backward_hooks or any_global_hook())


def _linear(x: Tensor, parameters: dict[str, Any], tapped: dict[str, Tapped]) -> Tensor:
    """Return what a plain linear layer does."""
    weight, bias = parameters["weight"], parameters["bias"]
    taps, stand_ins, _ = tapped.get("weight", Tapped([], []))
    is_trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if len(taps) == 1 and taps[0].support is not None and len(tapped) == 1 and not is_trained:
        return _sparse_linear(x, weight, bias, taps[0].support, stand_ins[0])
    live = parameters | {name: _live(parameters[name], found) for name, found in tapped.items()}
    return F.linear(x, live["weight"], live["bias"])


def _sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, support: Support, stand_in: Tensor
) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    columns = support.columns
    # Selected outside of the function, so that a gradient of the gradient reaches the input.
    needed = None if columns is None else x.index_select(-1, columns)
    return SparseLinear.apply(x, needed, weight, bias, support, stand_in)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does: floats that are not double."""
    wide = not tensor.is_floating_point() or tensor.dtype == torch.float64
    return tensor if wide else tensor.to(dtype)
