# SPDX-License-Identifier: Apache-2.0
"""The model of `cost.py`, made ready for each method. Random weights: cost does not ask for better.

All methods share backbone, head, loss and optimizer; peers wrap the very layers that SFA adapts.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any

import torch
from cost_cases import BACKBONES, window_of
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from selections import Measured, fill
from torch import Tensor, nn
from transformers import Swinv2Backbone, Swinv2Config

from sfa_peft import SFAConfig, SFASelector, find_backbone, role_modules

#: Rounds of a run, and the steps of one (the paper's s): the run that is looked at in the middle.
ROUNDS = 20
SELECTION_STEPS = 2000
#: Classes of the head.
NUM_LABELS = 20


class NotAvailable(Exception):
    """A row asks for something that the method, or its installed version, does not have."""


class Task(nn.Module):
    """A backbone and the smallest dense head: a 1x1 convolution on its last map."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(features, NUM_LABELS, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the loss: the mean square of the logits, which needs no labels."""
        logits = self.head(self.backbone(pixel_values).feature_maps[-1])
        return logits.float().square().mean()


def make_task(backbone: str, resolution: int, dtype: torch.dtype, device: str) -> Task:
    """Return the task model, all of it in `dtype` (no autocast)."""
    embed_dim, depths, num_heads = BACKBONES[backbone]
    torch.manual_seed(0)
    config = Swinv2Config(
        image_size=resolution,
        patch_size=4,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        window_size=window_of(resolution),
        drop_path_rate=0.0,  # dropped paths would make steps of unequal work
        out_features=[f"stage{len(depths)}"],
    )
    task = Task(Swinv2Backbone(config), embed_dim * 2 ** (len(depths) - 1))
    return task.to(device=device, dtype=dtype)


def prepare(task: Task, case: dict[str, Any]) -> nn.Module:
    """Return the task model made ready for the case's method.

    Raises:
        NotAvailable: If `SFAConfig` lacks an option of the case, or SHiRA refuses the budget.
    """
    method, budget = case["method"], case["budget"]
    if method in ("frozen", "full"):
        task.backbone.requires_grad_(method == "full")
        return task
    if method in ("lora", "lora_r16", "shira", "super_tuning"):
        return get_peft_model(task, _peer_config(task, method, budget))
    missing = set(case["options"]) - {f.name for f in fields(SFAConfig)}
    if missing:
        raise NotAvailable(f"SFAConfig has no field {', '.join(sorted(missing))}")
    steps = 1 if case["phase"] == "pick" else SELECTION_STEPS
    config = SFAConfig(
        budget=budget,
        modules_to_save=["head"],
        selection_steps=steps,
        select_until=1,
        **case["options"],
    )
    return get_peft_model(task, config)


def trained_parameters(model: nn.Module) -> int:
    """Return how many parameters are trained outside the head."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and "head" not in name.split(".")
    )


def _peer_config(task: Task, method: str, budget: float) -> Any:
    """Return a peer's configuration that trains as much of the backbone as SFA may."""
    backbone = find_backbone(task)
    if backbone is None:
        raise RuntimeError("the benchmark's own model has no backbone that sfa_peft knows")
    names = [role.name for role in role_modules(backbone)]
    if method == "lora_r16":
        return LoraConfig(r=16, target_modules=names, modules_to_save=["head"])
    shapes = [task.get_submodule(name).weight.shape for name in names]
    wanted = budget * sum(p.numel() for p in backbone.module.parameters())
    common: dict[str, Any] = {"target_modules": names, "modules_to_save": ["head"]}
    if method == "super_tuning":
        eligible = sum(rows * columns for rows, columns in shapes)
        return SupertuningConfig(sparsity=max(0.0, 1 - wanted / eligible), **common)
    # Both spend rank x (rows + columns) on a layer and know no fractions of a rank.
    rank = max(1, round(wanted / sum(rows + columns for rows, columns in shapes)))
    if method == "shira":
        largest = min(rows * columns // (rows + columns) for rows, columns in shapes)
        if rank > largest:
            raise NotAvailable(f"needs rank {rank}, but a layer here allows SHiRA {largest}")
        return ShiraConfig(r=rank, random_seed=0, **common)
    return LoraConfig(r=rank, **common)


def make_selector(
    model: nn.Module, phase: str, total_steps: int, measured: list[Measured] | None
) -> SFASelector:
    """Return the selector of a run that is in the given phase.

    "scoring" and "after" are runs resumed in the middle and after the last pick: what every step
    of a long run does (scores, entries of several picks, corrections of late ones), without the
    run. So no earlier phase raises the peak either.

    Args:
        model: A model with a fresh SFA adapter.
        phase: "scoring", "after" or "pick".
        total_steps: Length of the run for "pick", which starts at its beginning.
        measured: What the selected positions shall be like; None for uniform ones.
    """
    if phase == "pick":
        return SFASelector(model, total_steps=total_steps)
    fresh = SFASelector(model, total_steps=ROUNDS * SELECTION_STEPS)
    schedule, pool = fresh.schedule, fresh.pool
    if schedule is None or pool is None:
        return fresh  # external adapters only
    picks = schedule.num_picks if phase == "after" else schedule.num_picks // 2
    ends = [schedule.selected_after(i * SELECTION_STEPS) for i in range(picks + 1)]
    state = fresh.state_dict()
    fresh.discard()
    sums = {} if phase == "after" else state["sums"]  # zeros yet
    sums = {name: torch.zeros(s.shape, dtype=s.dtype) for name, s in sums.items()}  # on the CPU
    state |= {
        "update_steps": picks * SELECTION_STEPS,
        "sums": sums,
        "num_added": dict.fromkeys(sums, 0),
        "joined": [(a, b, i * SELECTION_STEPS) for i, (a, b) in enumerate(pairwise(ends), 1)],
    }
    fill(pool, ends, measured=measured)
    state["pool"] = pool.state_dict()
    resumed = SFASelector(model)
    resumed.load_state_dict(state)
    return resumed
