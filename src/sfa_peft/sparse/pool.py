# SPDX-License-Identifier: Apache-2.0
"""The values of one adapter's sparse change, and which weight each belongs to.

The pool is one flat parameter of the budgeted length. A slot of it is assigned to one entry of one
weight by a pick and stays there, so nothing that sees parameters (optimizer, clipping, DDP) ever
sees a size change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .gradient import Cut
from .optimizer import register
from .spans import Spans, count_assigned, find_spans, span_length

if TYPE_CHECKING:
    from ..tuner.layer import SFALayer
    from .weight import LiveEntries


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
        num_weights: Number of weights that may be selected, of all layers together.
        lr_ratio: Learning rate of the values over that of their optimizer.
        decay_weight: Whether weight decay pulls the weights towards zero, not their change.
        rules: Those that its selection is made by; None where nobody makes one.

    Attributes:
        tensors: (layer, parameter name) of each weight that may be selected from, in the order
            that positions count them in; `names` are their full names.
    """

    def __init__(
        self,
        adapter_name: str,
        *,
        needs_selector: bool,
        num_weights: int,
        lr_ratio: float = 1.0,
        decay_weight: bool = False,
        rules: Any = None,
    ) -> None:
        self.adapter_name = adapter_name
        self.needs_selector = needs_selector
        small = num_weights <= torch.iinfo(torch.int32).max
        self.slots_dtype = torch.int32 if small else torch.int64
        self.lr_ratio, self.decay_weight = lr_ratio, decay_weight
        self.rules = rules
        self.idle_forwards = 0  # training forwards with an unfinished selection and no selector
        self.tensors: list[tuple[SFALayer, str]] = []
        self.names: list[str] = []
        self.starts: list[int] = [0]  # first position of each weight, and the end
        self._layout: tuple[Tensor, int, list[Spans]] | None = None
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._cut: tuple[tuple[Any, ...], Sequence[Tensor], Any] | None = None
        self.settle: Callable[[Pool], None] | None = None  # unpacks a saved selection
        self.driver: object = None  # whoever fills the pool; the latest one does
        self.optimizer_steps = 0  # steps of an optimizer that trains the values
        self.stepped_by_grad_scaler = False
        self.keep_before = False  # whether the values before the next step are wanted
        self.before: Tensor | None = None
        register(self)

    def __getstate__(self) -> dict[str, Any]:
        # Cut tensors belong to a graph and cannot be copied; both caches are made again on demand.
        dropped = {"_layout": None, "_cut": None, "before": None, "driver": None, "_buffers": {}}
        return self.__dict__ | dropped

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register(self)

    def add_tensor(self, layer: SFALayer, parameter: str, name: str) -> int:
        """Append a weight that may be selected from, by its full name; return its ordinal."""
        self.tensors.append((layer, parameter))
        self.names.append(name)
        self.starts.append(self.starts[-1] + layer.parameter(parameter).numel())
        return len(self.tensors) - 1

    @property
    def layers(self) -> list[SFALayer]:
        """Layers with a weight that may be selected from, each once."""
        return list(dict.fromkeys(layer for layer, _ in self.tensors))

    def weight(self, ordinal: int) -> Tensor:
        """Return a weight, with the entries of live adapters in it."""
        layer, parameter = self.tensors[ordinal]
        return layer.parameter(parameter)

    def entries(self, ordinal: int) -> LiveEntries:
        """Return what adapters do to a weight."""
        layer, parameter = self.tensors[ordinal]
        return layer.entries[parameter]

    @property
    def anchor(self) -> SFALayer:
        """The layer that holds values and slots."""
        return self.tensors[0][0]

    @property
    def is_there(self) -> bool:
        """Whether the model still has the adapter."""
        return self.adapter_name in self.anchor.sfa_pool

    @property
    def size(self) -> int:
        """Number of values."""
        return self.anchor.sfa_pool[self.adapter_name].numel()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values."""
        return self.anchor.sfa_pool[self.adapter_name].dtype

    @property
    def values(self) -> nn.Parameter:
        """The change of each assigned weight, (size,), fp32 by default; the trainable part."""
        if self.settle is not None:
            self.settle(self)
        return self.anchor.sfa_pool[self.adapter_name]

    @property
    def slots(self) -> Tensor:
        """Position of each value, (size,); -1 where not assigned yet, only at the end.

        int32, or int64 where there are more positions than that can name (or a file had it).
        """
        if self.settle is not None:
            self.settle(self)
        return cast(Tensor, self.anchor.sfa_slots[self.adapter_name])

    @property
    def packed(self) -> Tensor | None:
        """A saved selection that waits to be unpacked, uint8; None where there is none."""
        packed = self.anchor.sfa_packed
        return cast(Tensor, packed[self.adapter_name]) if self.adapter_name in packed else None

    def drop_packed(self) -> None:
        """Wait for no saved selection any longer."""
        self.settle = None
        if self.packed is not None:
            self.anchor.sfa_packed.pop(self.adapter_name)

    def pretrained(self, ordinal: int) -> Tensor:
        """Return a weight with its original entries (a copy where changes are live in it)."""
        return self.entries(ordinal).pretrained(self.weight(ordinal))

    def foundation(self, ordinal: int) -> Tensor:
        """Return a weight as the adapter finds it: its original entries and earlier changes."""
        entries = self.entries(ordinal)
        if self.adapter_name not in entries.earlier:
            return self.pretrained(ordinal)
        return entries.foundation(self.weight(ordinal), self.adapter_name)

    def scored_weight(self, ordinal: int) -> Tensor:
        """Return a weight as scores see it; entries that are not selected are the foundation's."""
        entries = self.entries(ordinal)
        is_in = self.adapter_name not in entries.earlier or self.adapter_name in entries.live
        return self.weight(ordinal) if is_in else self.foundation(ordinal)

    @property
    def num_assigned(self) -> int:
        """Number of weights selected so far."""
        return count_assigned(self.slots)

    @property
    def is_empty(self) -> bool:
        """Whether no weight is selected yet."""
        return not any(self.layout())

    def is_last_of_empty(self, ordinal: int) -> bool:
        """Whether a weight is the last one while nothing is selected."""
        return ordinal == len(self.tensors) - 1 and self.is_empty

    def layout(self) -> list[Spans]:
        """Return for each weight the (first, last + 1) ranges of slots that belong to it."""
        slots = self.slots
        stamp = version(slots)
        if self._layout is None or self._layout[0] is not slots or self._layout[1] != stamp:
            self._layout = (slots, stamp, find_spans(slots, self.starts))
            self._buffers = {}
        return self._layout[2]

    def room(self, ordinal: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return room for one number per selected entry of a weight.

        All weights share one buffer: many small ones, made in the course of a forward, would lie
        between its activations and keep the allocator from using their memory again.
        """
        counts = [span_length(spans) for spans in self.layout()]
        if (dtype, device) not in self._buffers:
            self._buffers[dtype, device] = torch.empty(sum(counts), dtype=dtype, device=device)
        first = sum(counts[:ordinal])
        return self._buffers[dtype, device][first : first + counts[ordinal]]

    def free_room(self) -> None:
        """Let go of that room, where nobody looks into it any more."""
        self._buffers = {}

    def indices(self, ordinal: int) -> Tensor:
        """Return a weight's selected flat positions, int64, in slot order."""
        slots, spans = self.slots, self.layout()[ordinal]
        if not spans:
            return slots[:0].long()
        return torch.cat([slots[a:b] for a, b in spans]).long() - self.starts[ordinal]

    def count(self, ordinal: int) -> int:
        """Return how many entries of a weight are selected."""
        return span_length(self.layout()[ordinal])

    def assign(self, selected: Sequence[Tensor]) -> None:
        """Give the next free slots to newly selected weights.

        Args:
            selected: For each weight flat positions, int64, strictly increasing.
        """
        slots, first = self.slots, self.num_assigned
        positions = [
            s.to(slots.device) + start for s, start in zip(selected, self.starts, strict=False)
        ]
        joined = torch.cat(positions)
        with torch.no_grad():
            slots[first : first + joined.numel()] = joined

    def state_dict(self) -> dict[str, Tensor]:
        """Return values and slots as they are, which a packed file does not keep.

        It orders entries by position and not by pick, and has no bits below a weight's own.
        """
        return {"values": self.values.detach().clone(), "slots": self.slots.clone()}

    def fits(self, state: dict[str, Tensor]) -> bool:
        """Whether a state is of the entries that are selected here, in whatever order."""
        slots = state["slots"].to(self.slots)
        return slots.shape == self.slots.shape and torch.equal(
            slots.sort().values, self.slots.sort().values
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        with torch.no_grad():
            self.slots.copy_(state["slots"])
            self.values.copy_(state["values"])

    def slices(self) -> Sequence[Tensor]:
        """Return for each weight a stand-in for its slice of values, wired to their gradient."""
        values, spans = self.values, self.layout()
        key = (id(values), values.dtype, values.device, values.requires_grad, id(spans))
        if self._cut is None or self._cut[0] != key:
            with torch.inference_mode(False), torch.enable_grad():
                # The parameter and the spans are kept alive by the cut, so their ids stay theirs.
                self._cut = (key, Cut.apply(values, spans), (values, spans))
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

    def originals(self) -> Tensor:
        """Return the entry that each value is added to, in its dtype; 0 where not assigned."""
        values = self.values
        found = torch.zeros_like(values, requires_grad=False)
        for ordinal, spans in enumerate(self.layout()):
            if spans:
                entries, weight = self.entries(ordinal), self.weight(ordinal)
                undo = entries.originals_at(weight, self.adapter_name)
                if self.adapter_name in entries.earlier:
                    undo = self.foundation(ordinal).view(-1)[self.indices(ordinal).to(undo.device)]
                parts = undo.to(found).split([b - a for a, b in spans])
                for (a, b), part in zip(spans, parts, strict=True):
                    found[a:b] = part
        return found

    def is_trained_by(self, optimizer: Any) -> bool:
        """Whether the values are among an optimizer's parameters (no, once they are deleted)."""
        return self.group_of(optimizer) is not None

    def group_of(self, optimizer: Any) -> dict[str, Any] | None:
        """Return the optimizer's parameter group that holds the values, None where it has none."""
        if not self.tensors or not self.is_there:
            return None
        values = self.values
        for group in optimizer.param_groups:
            if any(p is values for p in group["params"]):
                return group
        return None

    def withdraw(self) -> None:
        """Put the pretrained entries back into the weights, but for merged layers."""
        for layer in self.layers:
            if not layer.merged:
                layer.withdraw()
