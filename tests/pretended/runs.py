# SPDX-License-Identifier: Apache-2.0
"""Training runs that the tests on the pretended device share."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool
from tests.pretended.device import Device, Report

ROUND, TOTAL = 3, 15
ONE, TWO = "pretended:0", "pretended:1"


class Stack(nn.Module):
    """Linear layers, each of which may be on a device of its own."""

    def __init__(self, depth: int = 2, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(_there(x, layer)))
        return self.head(_there(x, self.head))


def _there(x: torch.Tensor, module: nn.Module) -> torch.Tensor:
    weight = next(module.parameters())
    return x.to(weight.device, weight.dtype)


def adapt(base: nn.Module, **options: Any) -> Any:
    settings = {"budget": 0.4, "target_modules": r"layers\.\d+", "modules_to_save": ["head"]}
    settings |= {"selection_steps": ROUND, "select_until": 1, "rho": 0.5}
    settings["external_modules"] = r"layers\.\d+"
    torch.manual_seed(1)
    return get_peft_model(base, SFAConfig(**(settings | options))).train()


def images(step: int, width: int = 16) -> torch.Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(step))


class Run:
    """A model in training; each step can be watched.

    Args:
        model: With an adapter, on its devices.
        optimizer: Options of AdamW.
        scaler: A gradient scaler.
        kind: Of the optimizer.
        selector: One that was made before.
    """

    def __init__(
        self,
        model: Any,
        optimizer: dict[str, Any] | None = None,
        scaler: Any = None,
        kind: Any = torch.optim.AdamW,
        selector: SFASelector | None = None,
    ) -> None:
        self.model, self.scaler = model, scaler
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = kind(trained, lr=1e-2, **(optimizer or {}))
        self.selector = selector or SFASelector(model, total_steps=TOTAL, scaler=scaler)
        self.width = model.get_base_model().layers[0].in_features
        self.num_steps = 0

    @property
    def pool(self) -> Any:
        return find_pool(self.model, "default")

    def step(self) -> bool:
        """Make one update step; return whether it ended with a pick."""
        x = images(self.num_steps, self.width).to(next(self.model.parameters()).device)
        self.num_steps += 1
        loss = (self.model(x).float() - 1).square().mean()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        picked = self.selector.step(self.optimizer)
        self.optimizer.zero_grad()
        return picked

    def steps(self, count: int = TOTAL) -> Run:
        for _ in range(count):
            self.step()
        return self

    def watched(self, device: Device, count: int = TOTAL) -> list[tuple[bool, Report]]:
        """Return for each step whether it picked, and what it did."""
        found = []
        for _ in range(count):
            with device.watched() as report:
                picked = self.step()
            found.append((picked, report))
        return found


def assert_same(one: Run, two: Run, atol: float = 1e-6) -> None:
    assert torch.equal(one.pool.slots.cpu(), two.pool.slots.cpu())
    values = [run.pool.values.detach().cpu() for run in (one, two)]
    torch.testing.assert_close(*values, rtol=0, atol=atol)
