# SPDX-License-Identifier: Apache-2.0
"""Turns a fully fine-tuned checkpoint into an adapter: the largest changes within a budget."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import ConfigError, SFAError
from ..selection.pick import pick, row_sizes
from ..selection.topk import TensorSource
from ..sparse.delta import Delta, change_to
from ..tuner.adapted_layers import find_pool
from ..tuner.injection_plan import make_plan
from ..tuner.upstream.task_heads import settle_heads
from .shared_backbone import refuse_tuned

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class LostTensor:
    """A tensor that fine-tuning changed and that the adapter leaves as it was.

    Attributes:
        name: Its name in the model.
        differing: Number of its entries that differ.
        numel: Number of all its entries.
        norm: Euclidean norm of its change.
    """

    name: str
    differing: int
    numel: int
    norm: float


@dataclass(frozen=True)
class ExtractReport:
    """How much of a checkpoint's change an adapter keeps.

    Attributes:
        selected: Weights in the adapter.
        differing: Weights that may be selected and differ from the base.
        kept: Norm of the kept change over the norm of the change of all weights that may be
            selected, 0 to 1; 1 where nothing changed.
        stages: The same by stage of the backbone (None: no known stage).
        lost: Tensors that differ and belong neither to those weights nor to `modules_to_save`
            (norms, biases, buffers, a head that is not named), the largest change first. The
            adapter does not reproduce them.
    """

    selected: int
    differing: int
    kept: float
    stages: dict[int | None, float]
    lost: tuple[LostTensor, ...]

    @property
    def not_selected(self) -> int:
        """Number of differing weights that might have been selected and were not."""
        return max(self.differing - self.selected, 0)

    def __str__(self) -> str:
        lines = [f"{self.selected:,} weights keep {self.kept:.2%} of the norm of the change"]
        for stage, kept in self.stages.items():
            where = "without a stage" if stage is None else f"stage {stage + 1}"
            lines.append(f"  {where}: {kept:.2%}")
        lines.append(f"differing weights that were not selected: {self.not_selected:,}")
        lines.append(f"tensors that differ and are lost: {len(self.lost)}")
        lines += [
            f"  {t.name}: {t.differing:,} of {t.numel:,}, norm {t.norm:.3g}" for t in self.lost
        ]
        return "\n".join(lines)


def extract(
    model: nn.Module,
    checkpoint: nn.Module | State | str | PathLike[str],
    config: SFAConfig,
    *,
    adapter_name: str = "default",
) -> tuple[PeftModel, ExtractReport]:
    """Make an adapter out of a fully fine-tuned model.

    Of the weights that may be selected those whose change is largest become the adapter's; each
    then holds the checkpoint's value, to the bit where both are of one type. Modules in
    `modules_to_save` are copied whole, with their buffers. All else stays as in the base.

    Args:
        model: The task model with the pretrained backbone; it is wrapped, as by `get_peft_model`.
        checkpoint: The fine-tuned model, its state dict, or the folder that `save_pretrained`
            wrote. Names and shapes must be those of `model`.
        config: Budget, eligible layers, `ranking`, `granularity` and `modules_to_save`. External
            adapters cannot be extracted: `rho` is 0 unless given.
        adapter_name: Name of the adapter.

    Returns:
        The wrapped model and the report; `print` it.

    Raises:
        ConfigError: If the config asks for external adapters or reuses another selection.
        SFAError: If a tensor is missing in the checkpoint, has another shape or is not finite; the
            model is unchanged then.
    """
    refuse_tuned(model, "model")
    config = settle_heads(model, _own_config(config))
    tuned = _read(checkpoint)
    plan = make_plan(model, config)
    base = {n: t.detach() for n, t in model.state_dict().items()}
    stages = {f"{t.name}.{p}": t.stage for t in plan.targets.values() for p in t.parameters}
    changes = {n: _change(n, base, tuned) for n in stages}
    heads = _heads(model, config)
    for name in (n for n in base if n.startswith(heads)):
        _check_shape(name, base, tuned)
    selected = _largest(changes, plan.record.internal, config)
    lost = _lost([n for n in base if n not in changes and not n.startswith(heads)], base, tuned)
    report = _report(stages, changes, selected, lost)
    values = {
        n: _exact(n, indices, changes[n], base, tuned).cpu() for n, indices in selected.items()
    }
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    pool = find_pool(peft_model, adapter_name)
    if pool is not None:
        with torch.no_grad():
            pool.slots.fill_(-1)  # a score without data has selected already
            pool.values.zero_()
        deltas = {n: Delta(indices.cpu(), values[n]) for n, indices in selected.items()}
        pool.fill(deltas, with_values=True)
    _copy_heads(peft_model, adapter_name, tuned)
    return peft_model, report


def _largest(changes: State, quota: int, config: SFAConfig) -> dict[str, Tensor]:
    """Return the positions of the largest changes by tensor."""
    chosen = pick(
        [TensorSource(change) for change in changes.values()],
        quota,
        ranking=config.ranking,
        granularity=config.granularity,
        row_sizes=row_sizes(list(changes.values())),
    )
    return dict(zip(changes, chosen, strict=True))


def _own_config(config: SFAConfig) -> SFAConfig:
    if config.adapter_dim is not None or config.rho not in (None, 0):
        raise ConfigError(
            f"extract: rho={config.rho}, adapter_dim={config.adapter_dim} ask for external "
            "adapters, which a fine-tuned checkpoint does not have. Use rho=0."
        )
    if config.selection_from or config.continue_from or config.resolved is not None:
        raise ConfigError(
            "extract: the config names a saved selection (or continue_from, resolved), but the "
            "checkpoint decides what is selected. Give a fresh SFAConfig."
        )
    config = copy.deepcopy(config)
    config.rho = 0
    return config


def _read(checkpoint: nn.Module | State | str | PathLike[str]) -> State:
    if isinstance(checkpoint, nn.Module):
        refuse_tuned(checkpoint, "checkpoint")
        return checkpoint.state_dict()
    if isinstance(checkpoint, Mapping):
        return checkpoint
    folder = Path(fspath(checkpoint))
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else [folder]
    if not files and (folder / "pytorch_model.bin").is_file():
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    try:
        if not files:
            raise FileNotFoundError("no model*.safetensors and no pytorch_model.bin")
        return {n: t for file in files for n, t in load_file(file).items()}
    except Exception as error:
        raise SFAError(
            f"{folder}: no checkpoint can be read there ({type(error).__name__}: {error}). Give "
            "the folder that save_pretrained wrote, a .safetensors file, a state dict or a model."
        ) from error


def _change(name: str, base: State, tuned: State) -> Tensor:
    """Return tuned - base, float32, on the base's device."""
    _check_shape(name, base, tuned)
    change = tuned[name].to(base[name].device).float() - base[name].float()
    if base[name].is_meta or not bool(torch.isfinite(change).all()):
        raise SFAError(
            f"extract: the change of `{name}` is NaN or infinite, or the model is on the meta "
            "device. Give a sound checkpoint and a model with its weights."
        )
    return change


def _check_shape(name: str, base: State, tuned: State) -> None:
    if name not in tuned:
        raise SFAError(
            f"extract: the checkpoint has no tensor `{name}`. Give a checkpoint of the same class "
            f"of model; its tensors are {', '.join(list(tuned)[:3])}, ..."
        )
    if tuned[name].shape != base[name].shape:
        raise SFAError(
            f"extract: `{name}` is {list(tuned[name].shape)} in the checkpoint and "
            f"{list(base[name].shape)} in the model. Build the model with the checkpoint's config."
        )


def _exact(name: str, indices: Tensor, change: Tensor, base: State, tuned: State) -> Tensor:
    """Return changes that lead to the checkpoint's values, to the bit where types are equal."""
    if base[name].dtype != tuned[name].dtype or base[name].dtype.itemsize > torch.float32.itemsize:
        return change.reshape(-1)[indices]
    own, other = base[name].reshape(-1)[indices], tuned[name].to(base[name].device).reshape(-1)
    return change_to(own, other[indices])


def _report(
    stages: Mapping[str, int | None], changes: State, selected: State, lost: Sequence[LostTensor]
) -> ExtractReport:
    kept: dict[int | None, float] = defaultdict(float)
    total: dict[int | None, float] = defaultdict(float)
    for name, change in changes.items():
        total[stages[name]] += _square(change)
        kept[stages[name]] += _square(change.reshape(-1)[selected[name]])
    return ExtractReport(
        selected=sum(indices.numel() for indices in selected.values()),
        differing=sum(int((change != 0).sum()) for change in changes.values()),
        kept=_ratio(sum(kept.values()), sum(total.values())),
        stages={s: _ratio(kept[s], total[s]) for s in sorted(total, key=lambda s: (s is None, s))},
        lost=tuple(lost),
    )


def _lost(names: Iterable[str], base: State, tuned: State) -> list[LostTensor]:
    """Return those of some tensors that differ, the largest change first."""
    found = []
    for name in names:
        if name not in tuned:
            continue
        _check_shape(name, base, tuned)
        own, other = base[name], tuned[name].to(base[name].device)
        differing = int((other != own).sum())
        if differing:
            norm = math.sqrt(_square(other.double() - own.double()))
            found.append(LostTensor(name, differing, own.numel(), norm))
    return sorted(found, key=lambda lost: -lost.norm)


def _heads(model: nn.Module, config: SFAConfig) -> tuple[str, ...]:
    """Return the starts of names of tensors that are saved whole; PEFT compares ends of paths."""
    ends = tuple(config.modules_to_save or ())
    return tuple(f"{name}." for name, _ in model.named_modules() if name.endswith(ends))


def _square(change: Tensor) -> float:
    return float(change.double().square().sum())


def _ratio(kept: float, total: float) -> float:
    return math.sqrt(kept / total) if total else 1.0


def _copy_heads(model: PeftModel, adapter_name: str, tuned: State) -> None:
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save[adapter_name]
            head.load_state_dict({k: tuned[f"{name}.{k}"] for k in head.state_dict()})
