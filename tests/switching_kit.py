# SPDX-License-Identifier: Apache-2.0
"""Models with several adapters, and a user who switches, trains and changes them in any order."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from sfa_peft import SFAConfig, SFALayer
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP, images, upernet

NAMES = ("one", "two", "three")


class Small(nn.Module):
    """An MLP with a composite head, as segmentation models have."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP()
        self.top = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))

    def forward(self, x):
        return self.top(self.body(x))


class Kit:
    """A model, adapters for it, and inputs."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype

    def bare(self) -> nn.Module:
        torch.manual_seed(0)
        return (upernet() if self.kind == "upernet" else Small()).eval().to(self.dtype)

    def config(self, name: str) -> SFAConfig:
        seed = NAMES.index(name)
        common = {"score": "random", "seed": seed, "init_weights": False}
        if self.kind == "upernet":
            return SFAConfig(budget=0.2, modules_to_save=["decode_head"], **common)
        if self.kind == "head":
            return SFAConfig(
                budget=0.5,
                rho=0.4,
                target_modules=["first", "second"],
                external_modules=["second"],
                modules_to_save=["top"],
                **common,
            )
        return SFAConfig(budget=0.5, rho=0, target_modules=["first", "second"], **common)

    def add(self, model, name: str) -> None:
        torch.manual_seed(NAMES.index(name))
        model.add_adapter(name, self.config(name))
        self.scatter_picks(model, name)

    def scatter_picks(self, model, name: str) -> None:
        """Lay the selection out as four picks would have: not in the order of the weights."""
        pool = find_pool(model, name)
        generator = torch.Generator().manual_seed(NAMES.index(name))
        mixed = pool.slots[torch.randperm(len(pool.slots), generator=generator)]
        slots = torch.cat([part.sort().values for part in mixed.chunk(4)])
        pool.load_state_dict({"values": pool.values.detach(), "slots": slots})

    def start(self):
        torch.manual_seed(0)
        model = get_peft_model(self.bare(), self.config("one"), adapter_name="one")
        self.scatter_picks(model, "one")
        self.add(model, "two")
        return model.eval()

    def fresh(self, model, names: list[str], cast: torch.dtype | None = None):
        """Return a new model with adapters as they would come from their files."""
        new = get_peft_model(self.bare(), self.config(names[0]), adapter_name=names[0])
        for name in names[1:]:
            new.add_adapter(name, self.config(name))
        for name in names:
            state = get_peft_model_state_dict(model, adapter_name=name)
            set_peft_model_state_dict(new, copy.deepcopy(state), adapter_name=name)
        if len(names) > 1:
            for name in names:  # a file keeps what each adapter leads to, but not its last bits
                find_pool(new, name).load_state_dict(find_pool(model, name).state_dict())
            new.base_model.set_adapter(names)
        return new.eval().to(cast)

    def batch(self, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
        if self.kind == "upernet":
            return images(seed=seed)["pixel_values"].to(dtype)
        return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)).to(dtype)


def output(model, batch):
    with torch.no_grad():
        out = model(batch)
    return getattr(out, "logits", out)


def layers_of(model) -> list[SFALayer]:
    return [m for m in model.modules() if isinstance(m, SFALayer)]


def weights_of(model) -> list[torch.Tensor]:
    return [
        layer.parameter(n).detach().clone() for layer in layers_of(model) for n in layer.weights
    ]


def assert_equal(ours, others) -> None:
    assert len(ours) == len(others)
    assert all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


class Session:
    """A user who does things in any order, as far as PEFT allows."""

    def __init__(self, kit: Kit) -> None:
        self.kit, self.model, self.dtype = kit, kit.start(), kit.dtype
        self.cast: torch.dtype | None = None  # of adapters too, whose values start in float32

    @property
    def is_merged(self) -> bool:
        return any(layer.merged for layer in layers_of(self.model))

    @property
    def has_heads(self) -> bool:
        return self.kit.kind != "mlp"

    def do(self, action: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's own, of merged and deleted adapters
            getattr(self, action)()

    def one(self) -> None:
        self.model.set_adapter(next(iter(self.model.peft_config)))

    def other(self) -> None:
        self.model.set_adapter(list(self.model.peft_config)[-1])

    def both(self) -> None:
        if not self.has_heads:  # PEFT lets only one head act
            self.model.base_model.set_adapter(list(self.model.peft_config))

    def forward(self) -> None:
        output(self.model, self.kit.batch(self.dtype))

    def forward_with_graph(self) -> None:
        self.model(self.kit.batch(self.dtype))

    def train_mode(self) -> None:
        self.model.train()

    def eval_mode(self) -> None:
        self.model.eval()

    def disabled(self) -> None:
        with self.model.disable_adapter():
            self.forward()

    def disabled_switch(self) -> None:
        if not self.is_merged:
            with self.model.disable_adapter():
                self.other()

    def merge(self) -> None:
        if not self.is_merged:
            self.model.merge_adapter()

    def unmerge(self) -> None:
        if self.is_merged:
            self.model.unmerge_adapter()

    def train(self) -> None:
        self.unmerge()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        out = self.model(self.kit.batch(self.dtype, seed=5))
        getattr(out, "logits", out).float().square().sum().backward()
        optimizer.step()
        self.model.zero_grad()

    def delete_active(self) -> None:
        if len(self.model.peft_config) > 1:
            self.unmerge()
            self.model.delete_adapter(self.model.active_adapters[0])
            if self.model.active_adapter not in self.model.peft_config:
                # PEFT's wrapper goes on with the deleted name where two were active below it.
                self.model.set_adapter(next(iter(self.model.peft_config)))

    def add(self) -> None:
        free = [name for name in NAMES if name not in self.model.peft_config]
        if free and not self.is_merged:
            self.kit.add(self.model, free[0])
            self.model.to(self.cast)

    def load(self) -> None:
        """Load an adapter's values into the one that is there."""
        name = next(iter(self.model.peft_config))
        state = get_peft_model_state_dict(self.model, adapter_name=name)
        state = {k: t.flip(0) if k.endswith("sfa_pool") else t.clone() for k, t in state.items()}
        set_peft_model_state_dict(self.model, state, adapter_name=name)

    def to_bfloat16(self) -> None:
        self.dtype = self.cast = torch.bfloat16
        self.model.to(self.cast)

    def copied(self) -> None:
        self.model = copy.deepcopy(self.model)


ACTIONS = sorted(name for name in vars(Session) if name[0] != "_" and name != "do")
ACTIONS = [name for name in ACTIONS if name not in ("is_merged", "has_heads")]
