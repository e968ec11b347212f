# SPDX-License-Identifier: Apache-2.0
"""The sparse change of one adapter: a fixed pool of values and how it meets the live weights.

The pool is one flat parameter of the budgeted length. A slot of it is assigned to one weight of one
layer by a pick and stays there, so nothing that sees parameters (optimizer, clipping, DDP) ever
sees a size change. A weight holds `original + value` at assigned entries while it is in use; its
gradient reaches the pool through two small autograd functions, and no weight is ever copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from .layer import SFALayer

Spans = list[tuple[int, int]]


def version(tensor: Tensor) -> int:
    """Return autograd's version counter (inference tensors have none)."""
    return -1 if tensor.is_inference() else tensor._version


class Pool:
    """Values of one adapter and the slots that say where each belongs.

    Values and slots are a Parameter and a buffer of the first eligible layer (the anchor), so that
    they live in the model, also where the tuner around it is not kept.

    Args:
        adapter_name: The adapter.
        needs_selector: Whether slots get assigned while training, by a callback or selector.
    """

    def __init__(self, adapter_name: str, *, needs_selector: bool) -> None:
        self.adapter_name = adapter_name
        self.needs_selector = needs_selector
        self.idle_forwards = 0  # training forwards with nothing selected and no selector
        self.layers: list[SFALayer] = []
        self.names: list[str] = []
        self.starts: list[int] = [0]  # first position of each layer, and the end
        self._layout: tuple[Tensor, int, list[Spans]] | None = None
        self._cut: tuple[tuple[Any, ...], Sequence[Tensor], Any] | None = None
        self.optimizer_steps = 0  # steps of an optimizer that trains the values
        _register(self)

    def __getstate__(self) -> dict[str, Any]:
        # Cut tensors belong to a graph and cannot be copied; both caches are made again on demand.
        return self.__dict__ | {"_layout": None, "_cut": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register(self)

    def add_layer(self, name: str, layer: SFALayer) -> int:
        """Append an eligible layer and return its ordinal."""
        self.layers.append(layer)
        self.names.append(name)
        self.starts.append(self.starts[-1] + layer.base_weight.numel())
        return len(self.layers) - 1

    @property
    def values(self) -> nn.Parameter:
        """The change of each assigned weight, (size,), fp32 by default; the trainable part."""
        return self.layers[0].sfa_pool[self.adapter_name]

    @property
    def slots(self) -> Tensor:
        """Position of each value, int64 (size,); -1 where not assigned yet, only at the end."""
        return cast(Tensor, self.layers[0].sfa_slots[self.adapter_name])

    @property
    def num_assigned(self) -> int:
        """Number of weights selected so far."""
        return _count_assigned(self.slots)

    @property
    def is_empty(self) -> bool:
        """Whether no weight is selected yet."""
        return not any(self.layout())

    def layout(self) -> list[Spans]:
        """Return for each layer the (first, last + 1) ranges of slots that belong to it."""
        slots = self.slots
        stamp = version(slots)
        if self._layout is None or self._layout[0] is not slots or self._layout[1] != stamp:
            self._layout = (slots, stamp, _spans(slots, self.starts))
        return self._layout[2]

    def indices(self, ordinal: int) -> Tensor:
        """Return a layer's selected flat positions in its weight, int64, in slot order."""
        slots, spans = self.slots, self.layout()[ordinal]
        if not spans:
            return slots[:0]
        return torch.cat([slots[a:b] for a, b in spans]) - self.starts[ordinal]

    def count(self, ordinal: int) -> int:
        """Return how many weights of a layer are selected."""
        return span_length(self.layout()[ordinal])

    def assign(self, selected: Sequence[Tensor]) -> None:
        """Give the next free slots to newly selected weights.

        Args:
            selected: For each layer flat positions in its weight, int64, strictly increasing.
        """
        slots, first = self.slots, self.num_assigned
        positions = [
            s.to(slots.device) + start for s, start in zip(selected, self.starts, strict=False)
        ]
        joined = torch.cat(positions)
        with torch.no_grad():
            slots[first : first + joined.numel()] = joined

    def slices(self) -> Sequence[Tensor]:
        """Return for each layer a stand-in for its slice of the values, wired to their gradient."""
        values, spans = self.values, self.layout()
        key = (id(values), values.dtype, values.device, values.requires_grad, id(spans))
        if self._cut is None or self._cut[0] != key:
            with torch.inference_mode(False), torch.enable_grad():
                # The parameter and the spans are kept alive by the cut, so their ids stay theirs.
                self._cut = (key, _Cut.apply(values, spans), (values, spans))
        return self._cut[1]

    def stamp(self) -> tuple[Any, ...]:
        """Return what changes whenever values or slots do.

        Fused optimizers write values without telling autograd, so their steps are counted too.
        """
        values, slots = self.values, self.slots
        return (
            id(values),
            values.data_ptr(),
            version(values),
            self.optimizer_steps,
            id(slots),
            version(slots),
        )

    def is_trained_by(self, optimizer: Any) -> bool:
        """Whether the values are among an optimizer's parameters (no, once they are deleted)."""
        if not self.layers or self.adapter_name not in self.layers[0].sfa_pool:
            return False
        values = self.values
        return any(p is values for group in optimizer.param_groups for p in group["params"])

    def after_optimizer_step(self) -> None:
        """Count a step that changed the values, and put the original entries back."""
        self.optimizer_steps += 1
        for layer in self.layers:
            if not layer.merged:
                layer.withdraw()


def span_length(spans: Spans) -> int:
    """Return the number of slots in a layer's ranges."""
    return sum(b - a for a, b in spans)


def _count_assigned(slots: Tensor) -> int:
    """Count positions that are assigned; none are on the meta device, which holds no values."""
    return 0 if slots.is_meta else int((slots >= 0).sum())


def _spans(slots: Tensor, starts: Sequence[int]) -> list[Spans]:
    """Cut slots (sorted within each pick) at the layers' first positions."""
    spans: list[Spans] = [[] for _ in starts[:-1]]
    used = slots[: _count_assigned(slots)]
    if not used.numel():
        return spans
    breaks = (used[1:] < used[:-1]).nonzero().squeeze(1) + 1  # where a new pick begins
    edges = [0, *breaks.tolist(), used.numel()]
    bounds = torch.tensor(starts, device=slots.device)
    for first, last in pairwise(edges):
        cuts = (torch.searchsorted(used[first:last], bounds) + first).tolist()
        for ordinal, (a, b) in enumerate(pairwise(cuts)):
            if a < b:
                spans[ordinal].append((a, b))
    return spans


class _Cut(torch.autograd.Function):
    """Cut the pool into one slice per layer; backward joins the layers' gradients.

    The slices carry no data (live weights hold the values): a slice is one element, expanded. No
    tensor is saved, so one cut serves any number of forwards and backwards.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, spans: list[Spans]) -> tuple[Tensor, ...]:
        ctx.spans, ctx.shape = spans, values.shape
        ctx.dtype, ctx.device = values.dtype, values.device
        ctx.set_materialize_grads(False)
        sizes = [span_length(layer) for layer in spans]
        return tuple(
            values.new_zeros(1).expand(size) if size else values.new_zeros(0) for size in sizes
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:  # pyright: ignore
        joined = torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device)
        for spans, grad in zip(ctx.spans, grads, strict=True):
            if grad is None:
                continue
            first = 0
            for a, b in spans:
                joined[a:b] = grad[first : first + b - a]
                first += b - a
        return joined, None


class Tap(NamedTuple):
    """What one adapter wants from a weight's gradient."""

    indices: Tensor  # flat positions in the weight, int32, in the order of the adapter's slots
    observer: Callable[[Tensor], None] | None  # gets the dense gradient (scores)


class LiveWeight(torch.autograd.Function):
    """Pass a weight on as an alias; on the way back hand its gradient to adapters.

    Backward sees the dense gradient of one layer, gives it to observers, and returns its entries at
    each adapter's indices as the gradient of that adapter's slice. It is freed right after.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, taps: Sequence[Tap], *slices: Tensor) -> Tensor:
        """Return an alias of the weight that depends on the slices."""
        ctx.taps = taps
        ctx.dtypes = [s.dtype for s in slices]
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """Return the gathered gradient of each slice."""
        flat = grad.reshape(-1)
        slice_grads = []
        for tap, dtype in zip(ctx.taps, ctx.dtypes, strict=True):
            if tap.observer is not None:
                tap.observer(grad)
            slice_grads.append(flat.index_select(0, tap.indices).to(dtype))
        return (grad if ctx.needs_input_grad[0] else None, None, *slice_grads)


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()
_hook_installed = False


def _register(pool: Pool) -> None:
    """After any optimizer's step, weights whose pool it changed go back to the originals.

    So a model's own weights are the pretrained ones whenever a training step is over, whoever
    reads them; the next forward writes the new values.
    """
    global _hook_installed  # noqa: PLW0603 (one hook for the process, like torch's own)
    _POOLS.add(pool)
    if not _hook_installed:
        register_optimizer_step_post_hook(_after_optimizer_step)
        _hook_installed = True


def _after_optimizer_step(optimizer: Any, _args: Any, _kwargs: Any) -> None:
    for pool in list(_POOLS):
        if pool.is_trained_by(optimizer):
            pool.after_optimizer_step()
