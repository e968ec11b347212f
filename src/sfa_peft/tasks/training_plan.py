# SPDX-License-Identifier: Apache-2.0
"""What training would take, before it: widths, counts and memory, from a config without weights.

The model is on the meta device, so that nothing is loaded or computed. Activations are counted, not
guessed: a forward runs there, and what autograd keeps for the backward is added up.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModel

from ..config import SFAConfig
from ..errors import SFAError
from ..sparse.pool import Pool
from ..tuner.adapted_layers import find_pool
from ..tuner.report import BudgetReport, budget_report

#: Bytes of an optimizer's state for each byte of a trained parameter.
OPTIMIZERS = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MB = 2**20


@dataclass(frozen=True)
class TrainingPlan:
    """What a budget becomes, and the memory of training.

    Attributes:
        budget: What the budget was solved to.
        weights: Bytes of the pretrained model, and of a head as it is trained.
        adapter: Bytes of external adapters, values and positions, and of what is kept to put the
            pretrained entries back.
        gradients: Bytes of the gradients of all that is trained.
        optimizer: Bytes of the optimizer's state.
        activations: Bytes that a forward keeps for its backward.
        transient: Bytes that a backward takes for a moment: the gradient of one layer's weight, and
            of its input and output.
        scores: Bytes of scores, in the phase in which weights are selected.
    """

    budget: BudgetReport
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    transient: int
    scores: int

    @property
    def after(self) -> int:
        """Bytes at the peak of a step after the last pick."""
        fixed = self.weights + self.adapter + self.gradients + self.optimizer
        return fixed + self.activations + self.transient

    @property
    def scoring(self) -> int:
        """Bytes at the peak of a step that scores."""
        return self.after + self.scores

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it, peaks included."""
        fields = asdict(self)
        fields["budget"] = asdict(self.budget) | {"share": self.budget.share}
        return {**fields, "scoring": self.scoring, "after": self.after}

    def __str__(self) -> str:
        parts = {
            "pretrained weights, head": self.weights,
            "adapter": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "one layer's backward": self.transient,
            "peak after the last pick": self.after,
            "scores": self.scores,
            "peak while selecting": self.scoring,
        }
        rows = [f"{name:<25}{size / _MB:>10,.1f} MB" for name, size in parts.items()]
        return "\n".join([str(self.budget), "", *rows])


def plan_training(
    model: nn.Module | str,
    config: SFAConfig,
    *,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 1,
    optimizer: str = "adamw",
    dtype: str = "float32",
) -> TrainingPlan:
    """Return what a budget becomes on a model, and the memory that training would take.

    Args:
        model: Folder or Hub id of a model of transformers, of which only the config is read; or a
            model on the meta device, which is wrapped.
        config: Budget and all else.
        image_size: Height and width of images; by default the model's own.
        batch_size: Images in a micro-batch.
        optimizer: "adamw", "sgd_momentum" or "sgd".
        dtype: "float32" or "bfloat16": of weights and activations, without autocast.

    Raises:
        SFAError: If there is no such model, or a name is unknown.
        BudgetError: If the budget cannot be met.
    """
    if optimizer not in OPTIMIZERS or dtype not in DTYPES:
        raise SFAError(
            f"expected optimizer one of {', '.join(OPTIMIZERS)} and dtype one of "
            f"{', '.join(DTYPES)}, got {optimizer!r} and {dtype!r}"
        )
    base = empty_model(model) if isinstance(model, str) else model
    side = getattr(base.config, "image_size", 224)
    size = image_size or (side if isinstance(side, (list, tuple)) else (side, side))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that are missing: it is a plan
        adapted = get_peft_model(base.to(DTYPES[dtype]), config).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        pool = find_pool(adapted, "default")
        for weight in pool.weights if pool is not None else ():
            weight.tensor.requires_grad_()  # its gradient is asked for, to score or to gather
        pixels = torch.empty(batch_size, 3, size[0], size[1], dtype=DTYPES[dtype])
        activations, largest = _activations(adapted, pixels)
    gradients = _nbytes(trained)
    weights, adapter = _weights(adapted, pool)
    return TrainingPlan(
        budget=budget_report(adapted),
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=OPTIMIZERS[optimizer] * gradients,
        activations=activations,
        transient=_largest_weight(pool) + 2 * largest,
        scores=_scores(pool, config),
    )


def empty_model(source: str) -> nn.Module:
    """Return a backbone, or the model if there is no backbone of its kind, on the meta device.

    Args:
        source: Folder or Hub id with a config.

    Raises:
        SFAError: If there is none.
    """
    try:
        config: Any = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise SFAError(f"{source}: no config of a model ({error})") from error
    with torch.device("meta"):
        try:
            return AutoBackbone.from_config(config)
        except (ValueError, AttributeError, KeyError):  # not among those
            return AutoModel.from_config(config)


def _activations(model: nn.Module, pixels: Tensor) -> tuple[int, int]:
    """Return bytes that a forward keeps, and those of the largest tensor among them."""
    held = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in held:
            kept.setdefault(key, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(pixel_values=pixels)
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    del outputs
    return sum(sizes), max(sizes, default=0)


def _weights(model: nn.Module, pool: Pool | None) -> tuple[int, int]:
    """Return bytes of the model without the adapter, and of the adapter."""
    everything = _nbytes([*model.parameters(), *model.buffers()])
    own = [t for n, t in (*model.named_parameters(), *model.named_buffers()) if ".sfa_" in n]
    adapter = _nbytes(own)
    kept = 0
    if pool is not None:  # original entries and where they are, see `sparse.weight`
        kept = pool.size * (pool.weights[0].tensor.itemsize + torch.int32.itemsize)
    return everything - adapter, adapter + kept


def _largest_weight(pool: Pool | None) -> int:
    return 0 if pool is None else max(w.tensor.nbytes for w in pool.weights)


def _scores(pool: Pool | None, config: SFAConfig) -> int:
    if pool is None or not config.selects_while_training:
        return 0
    return sum(w.tensor.numel() for w in pool.weights) * DTYPES[config.score_dtype].itemsize


def _nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum({id(t): t.nbytes for t in tensors}.values())
