# SPDX-License-Identifier: Apache-2.0
"""What the checks of `gpu_check.py` share: where they run, a small model, and its training."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from cost_models import make_task
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sfa_peft import SFAConfig, SFASelector

ROUND, STEPS, TOTAL = 4, 14, 16


@dataclass(frozen=True)
class Place:
    """Where the checks run.

    Attributes:
        device: "cuda" or "cpu".
    """

    device: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is one."""
        return self.device == "cuda"

    @property
    def name(self) -> str:
        """Name of the card."""
        return torch.cuda.get_device_name() if self.is_gpu else "CPU, tiny"

    def task(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the small model; the same weights each time."""
        return make_task("nano", 64, dtype, self.device)

    def images(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return two images."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, 3, 64, 64, generator=generator).to(self.device, dtype)

    def timed(self, action: Callable[[], object]) -> float:
        """Return the milliseconds of an action, the device's work included."""
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


def adapt(base: nn.Module, **options: Any) -> PeftModel:
    """Return a model with a fresh adapter, in train mode."""
    torch.manual_seed(1)
    settings = {"budget": 0.2, "selection_steps": ROUND, "select_until": 1}
    settings["modules_to_save"] = ["head"]
    return get_peft_model(base, SFAConfig(**(settings | options))).train()


def make_optimizer(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    """Return AdamW for what trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, **options)


def train(
    place: Place,
    model: nn.Module,
    *,
    steps: int = STEPS,
    optimizer: dict[str, Any] | None = None,
    forward: Any = None,
) -> tuple[SFASelector, list[float]]:
    """Train in an own loop; return the selector and the losses."""
    own = make_optimizer(model, **(optimizer or {}))
    selector = SFASelector(model, total_steps=TOTAL)
    x, losses = place.images(next(model.parameters()).dtype), []
    for _ in range(steps):
        loss = (model if forward is None else forward)(x)
        loss.backward()
        own.step()
        selector.step(own)
        own.zero_grad()
        losses.append(loss.detach())
    return selector, [float(loss) for loss in losses]


def answer(place: Place, model: nn.Module) -> Tensor:
    """Return the logits that a model makes of the images, in eval mode."""
    seen: list[Tensor] = []
    head = next(m for name, m in model.named_modules() if name.rpartition(".")[2] == "head")
    handle = head.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        model.eval()(place.images(next(model.parameters()).dtype))
    handle.remove()
    return seen[0]


def save(model: PeftModel) -> str:
    """Save an adapter; return the folder."""
    folder = tempfile.mkdtemp(prefix="gpu_check_")
    model.save_pretrained(folder)
    return folder


def chosen(selector: SFASelector) -> Tensor:
    """Return the selected positions, sorted, on the CPU."""
    return selector.pool.slots[: selector.selected].sort().values.cpu()


def share_of_same(one: Tensor, two: Tensor) -> float:
    """Return which share of one selection is in another of the same size; 0 for other sizes."""
    return float(torch.isin(one, two).float().mean()) if len(one) == len(two) else 0.0


@contextmanager
def one_rank(place: Place) -> Iterator[None]:
    """Be the only process of a group, which talks as several cards would."""
    backend = "cpu:gloo,cuda:nccl" if place.is_gpu else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def cut(model: nn.Module, dtype: torch.dtype | None = None, **policy: Any) -> nn.Module:
    """Cut a model by FSDP2, each stage by itself; compute in `dtype`."""
    if dtype is not None:
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype)
        for name, table in model.named_buffers():  # FSDP2 casts parameters and inputs only
            if name.endswith("relative_coords_table"):
                table.data = table.data.to(dtype)
    for stage in model.get_base_model().backbone.encoder.layers:
        fully_shard(stage, **policy)
    return fully_shard(model, **policy)


def loaded_models(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Return the bare model and saved adapters loaded into it, ready for inference."""
    kinds = {"internal": {"rho": 0.0}, "both": {"rho": 0.5}, "external": {"rho": 1.0}}
    models: dict[str, nn.Module] = {"bare": make()}
    for name, options in kinds.items():
        folder = save(adapt(make(), score="random", budget=0.1, **options))
        models[name] = PeftModel.from_pretrained(make(), folder)
    return {name: model.eval() for name, model in models.items()}


def forward_turns(
    place: Place, models: dict[str, nn.Module], x: Tensor, rounds: int
) -> dict[str, Any]:
    """Return the median milliseconds of a forward of each model, and until the host is free."""
    times: dict[str, list[float]] = {name: [] for name in models}
    host: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(rounds + 2):  # the first two warm up
            for name, model in models.items():

                def forward(name: str = name, model: nn.Module = model) -> None:
                    start = time.perf_counter()
                    model(x)
                    host[name].append(1e3 * (time.perf_counter() - start))

                times[name].append(place.timed(forward))
                if turn < 2:
                    times[name].clear()
                    host[name].clear()
    return {
        name: {
            "ms": median(times[name]),
            "host ms": median(host[name]),
            "to bare": median(a / b for a, b in zip(times[name], times["bare"], strict=True)),
        }
        for name in models
    }


@contextmanager
def counting(place: Place, found: Counter[str]) -> Any:
    """Count, by line of Python, for what torch itself says that the host waits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if place.is_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if place.is_gpu:
                torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    found.update(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in waits)


def counted_waits(place: Place, kind: str) -> dict[str, Any]:
    """Return the waits of steps between picks, of picks, and of the steps behind them.

    Args:
        place: Where it runs.
        kind: "foreach" or "fused", the optimizer; with "fp16" before it under a scaler, whose own
            question in its step is left out.
    """
    is_scaled, fused = "fp16" in kind, "fused" in kind
    model = adapt(place.task())
    optimizer = make_optimizer(model, fused=fused, foreach=not fused)
    scaler = torch.amp.GradScaler(place.device, enabled=is_scaled)
    selector = SFASelector(model, total_steps=TOTAL, scaler=scaler)
    x, found = place.images(), {"between picks": [], "picks": [], "first steps behind": []}
    behind = True  # the first step finds out about the optimizer
    for _ in range(STEPS):
        at: Counter[str] = Counter()
        with torch.autocast(place.device, torch.float16, enabled=is_scaled):
            loss = model(x)
        with counting(place, at):
            scaler.scale(loss).backward()
        with counting(place, at if fused or not is_scaled else Counter()):
            scaler.step(optimizer)
            scaler.update()
        with counting(place, at):
            picked = selector.step(optimizer)
        optimizer.zero_grad()
        key = "picks" if picked else "first steps behind" if behind else "between picks"
        found[key].append(dict(at))
        behind = picked
    return found
