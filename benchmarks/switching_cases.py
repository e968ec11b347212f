# SPDX-License-Identifier: Apache-2.0
"""Models of `switching.py` that hold two tasks, and how each of them goes from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cost_models import Task, prepare
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from selections import fill, load
from torch import Tensor, nn

from sfa_peft import SFALayer
from sfa_peft.tuner.adapted_layers import find_pool

#: Standard deviation of every change of a weight (the weights' own is 0.02).
CHANGE = 1e-3
TASKS = ("a", "b")


class Sparse:
    """SFA: both tasks are adapters, `set_adapter` writes their entries.

    Positions are like those of a trained adapter, or `uniform`: one in each stretch, which touches
    far more cache lines. They lie in the pool as `picks` picks leave them: sorted within each. Both
    adapters are as after loading: for inference.
    """

    def __init__(
        self, task: Task, budget: float, rho: float | None, picks: int, *, uniform: bool = False
    ) -> None:
        case = {"method": "sfa", "phase": "", "budget": budget, "options": {"rho": rho}}
        model = prepare(task, case)
        assert isinstance(model, PeftModel)
        model.peft_config["default"].inference_mode = True
        measured = None if uniform else load(budget, 0.5 if rho is None else rho)
        self.model = model
        model.add_adapter("b", model.peft_config["default"])
        self.names = dict(zip(TASKS, ("default", "b"), strict=True))
        for seed, name in enumerate(self.names.values()):
            pool = find_pool(model, name)
            if pool is not None:
                ends = [pool.size * i // picks for i in range(picks + 1)]
                fill(pool, ends, measured=measured, seed=seed)
                with torch.no_grad():
                    generator = torch.Generator().manual_seed(seed)
                    pool.values.normal_(std=CHANGE, generator=generator)
        for name, parameter in model.named_parameters():
            if "sfa_up" in name:
                nn.init.normal_(parameter, std=CHANGE)
        model.eval()
        self.layers = [m for m in model.modules() if isinstance(m, SFALayer)]
        self.changed = sum(
            pool.values.numel() for pool in [find_pool(model, "b")] if pool is not None
        )

    def switch(self, task: str) -> None:
        """Make a task's weights ready to compute with."""
        self.model.set_adapter(self.names[task])

    def disable(self) -> None:
        """Make the pretrained weights ready to compute with."""
        self.model.base_model.disable_adapter_layers()

    def enable(self, task: str) -> None:
        """Come back from `disable`."""
        self.model.base_model.enable_adapter_layers()
        self.switch(task)

    def is_ready(self) -> bool:
        """Whether the next forward would write nothing any more."""
        weights = [layer.parameter(name) for layer in self.layers for name in layer.weights]
        before = [weight._version for weight in weights]
        for layer in self.layers:
            layer.refresh(layer._effective_adapters())
        return before == [weight._version for weight in weights]

    def extra_bytes(self) -> int:
        """Return the memory of one inactive task for the internal part."""
        found: dict[int, int] = {}  # by address, since some are shared
        name = self.names["a"]
        pool = find_pool(self.model, name)
        for layer in self.layers:
            for weight in layer.weights.values():
                for tensor in weight.kept(name):
                    if tensor.numel():
                        found[tensor.data_ptr()] = tensor.nbytes
        return sum(found.values()) + (pool.values.nbytes + pool.slots.nbytes if pool else 0)


class Merged:
    """A method of PEFT: unmerge one task, activate and merge the other."""

    def __init__(self, task: Task, method: str, budget: float | None) -> None:
        model = prepare(task, {"method": method, "budget": budget, "options": {}, "phase": ""})
        assert isinstance(model, PeftModel)
        self.model = model
        model.add_adapter("b", model.peft_config["default"])
        self.names = dict(zip(TASKS, ("default", "b"), strict=True))
        torch.manual_seed(0)
        for name in self.names.values():
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    _randomise(module, name)
        model.eval()
        self.changed = sum(
            p.numel() for n, p in model.named_parameters() if n.split(".")[-1] == "b"
        ) or sum(p.numel() for n, p in model.named_parameters() if ".b." in n and "lora" in n)
        self.is_merged = False

    def switch(self, task: str) -> None:
        """Make a task's weights ready to compute with."""
        if self.is_merged:
            self.model.unmerge_adapter()
        self.model.set_adapter(self.names[task])
        self.model.merge_adapter()
        self.is_merged = True

    def disable(self) -> None:
        """Make the pretrained weights ready to compute with, as well as can be."""
        self.model.unmerge_adapter()
        self.is_merged = False

    def enable(self, task: str) -> None:
        """Come back from `disable`."""
        self.switch(task)


class Dense:
    """A full checkpoint per task in memory, copied over the model's weights."""

    def __init__(self, task: Task) -> None:
        self.model = task.eval()
        states = [{n: t.clone() for n, t in task.state_dict().items()} for _ in range(3)]
        self.states = dict(zip((*TASKS, "pretrained"), states, strict=True))
        self.changed = sum(p.numel() for p in task.backbone.parameters())

    @torch.no_grad()
    def switch(self, task: str) -> None:
        """Make a task's weights ready to compute with."""
        own = self.model.state_dict()
        for name, tensor in self.states[task].items():
            own[name].copy_(tensor)

    def disable(self) -> None:
        """Make the pretrained weights ready to compute with."""
        self.switch("pretrained")

    def enable(self, task: str) -> None:
        """Come back from `disable`."""
        self.switch(task)


@torch.no_grad()
def _randomise(layer: Any, adapter: str) -> None:
    """Give a layer's adapter a change of the usual size, on every entry it may change."""
    if isinstance(layer, LoraLayer) and adapter in layer.lora_B:
        up = layer.lora_B[adapter].weight
        up.normal_()
        up.mul_(CHANGE / layer.get_delta_weight(adapter).float().std())
        return
    for name in layer.adapter_layer_names:
        container = getattr(layer, name)
        if adapter in container and isinstance(container[adapter], Tensor):
            container[adapter].normal_(std=CHANGE)


def left_changed(method: str, task: Task, budget: float, cycles: int) -> tuple[float, int]:
    """Return which share of touched entries is not what it was after merges and unmerges.

    Returns:
        The share, and how many entries the method touches.
    """
    case = {"method": method, "phase": "", "budget": budget, "options": {}}
    make: dict[str, Callable[[], Any]] = {
        "sfa_internal": lambda: Sparse(task, budget, 0.0, 20),
        "sfa_both": lambda: Sparse(task, budget, 0.5, 20),
    }
    one = make[method]() if method in make else Merged(task, method, case["budget"])
    layers = [m for m in one.model.modules() if isinstance(m, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    with one.model.disable_adapter():  # in eval mode weights hold the active adapter's change
        before = [weight.detach().clone() for weight in weights]
    touched = one.changed
    if method == "lora":
        touched = sum(weight.numel() for weight in weights)
    for _ in range(cycles):
        one.model.merge_adapter()
        one.model.unmerge_adapter()
    pairs = zip(before, weights, strict=True)
    changed = sum(int((a != b.detach()).sum()) for a, b in pairs)
    return changed / touched, touched
