# SPDX-License-Identifier: Apache-2.0
"""`Injection`: one adapter being put into a model, from its config to the last layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule
from torch import nn

from ..backbones import outside_backbone
from ..config import SFAConfig
from ..errors import FrozenHeadWarning, TargetError, warn
from ..files.adapter_config import Link
from ..selection.pick import select_without_data
from ..sparse.pool import Pool
from ..sparse.stores import OwnStore
from ..sparse.weight import Weight
from .adapter import Adapter, check_name
from .external import make_projections
from .feature_map import Place, find_place, listen
from .injection_plan import Plan, make_plan
from .layer import SFALayer
from .load_adapter import SavedAdapter, check_base, check_function, read_chain, read_saved, reuse
from .targets import is_excluded, own_modules
from .upstream.task_heads import check_heads, unmatched_heads
from .weight_storage import refuse_cut, refuse_offloaded


class Injection:
    """Plans an adapter (which changes nothing), wraps layers one by one, and ends the work.

    Args:
        model: The model, with or without other adapters.
        name: Name of the adapter.
        config: Its config.

    Raises:
        SFAError: If the name cannot be used, or what `make_plan` or the readers of other adapters
            raise.
    """

    def __init__(self, model: nn.Module, name: str, config: SFAConfig) -> None:
        check_name(name, model)
        self.model, self.config = model, config
        strict = config.check_base
        self.reused = None
        if config.selection_from is not None and config.resolved is None:
            self.reused = read_saved(model, config.selection_from, strict=strict)
        reused = reuse(self.reused, config) if self.reused else None
        self.chain = read_chain(model, config, config.notes.folder, strict=strict)
        check_same_chain(self.reused, self.chain, config)
        self.plan = put_on_chain(make_plan(model, config, reused), self.chain, config)
        own = own_modules(model)
        targets = {path: own[path] for path in self.plan.targets}
        refuse_offloaded(model, targets)
        refuse_cut(targets)
        check_heads(model, config, self.plan.targets)
        self.places = self._find_places()
        check_base(model, name, self.plan, strict=strict)
        taken = (self.reused,) if self.reused and config.selection_values == "trained" else ()
        for saved in (*taken, *self.chain):
            check_function(saved.source, saved.plan, strict=strict)
        check_function(name, self.plan, strict=strict)
        self.adapter = Adapter(name, config, self.plan.record)
        self.adapter.new_paths = dict(self.plan.renamed)

    def _find_places(self) -> dict[str, Place | None]:
        """Return how the tokens of layers with an adapter that asks for it lie in the image."""
        if self.config.external_type != "mona":
            return {}
        backbone = self.plan.backbone
        widths = {path: target for path, target in self.plan.targets.items() if target.width}
        return {p: find_place(self.model, p, t.role, backbone) for p, t in widths.items()}

    def is_target(self, path: str) -> Any:
        """Return whether a layer is wrapped, or PEFT's mark of those that the config excludes."""
        if path in self.plan.earlier:
            return True
        if self.plan.loaded:  # a file's patterns are not evaluated: they might never end
            return path in self.plan.targets or _ExcludedModule()
        # PEFT wants to hear of excluded layers apart from those that do not match.
        excluded = is_excluded(self.config, path)
        return path in self.plan.targets if excluded is None else excluded

    def wrap(self, layer: nn.Module, path: str) -> SFALayer:
        """Return a layer with the adapter added, wrapped now unless it was.

        Raises:
            TargetError: If another tuner has wrapped it.
        """
        target = self.plan.targets[path]
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, SFALayer):
            raise TargetError(
                f"`{path}` is already wrapped by {type(layer).__name__}; SFA changes the "
                "layer's own weight and cannot share it with another tuner. Unload the other one."
            )
        if not isinstance(layer, SFALayer):
            layer = SFALayer(
                layer, name=target.name, role=target.role, block=target.block, stage=target.stage
            )
        layer.update_layer(
            self.adapter,
            path=target.name,
            parameters=list(target.parameters),
            external=self._external(layer.get_base_layer(), path),
        )
        return layer

    def _external(self, layer: nn.Module, path: str) -> tuple[nn.Module, nn.Module] | None:
        """Return the external adapter of a layer, None where it gets none."""
        width, config = self.plan.targets[path].width, self.config
        if not width:
            return None
        return make_projections(
            layer,
            width,
            bias=config.external_bias,
            neutral=config.init_weights,
            kind=config.external_type,
            feature_map=listen(self.places.get(path)),
        )

    def finish(self) -> None:
        """Attach earlier changes, check the order of layers, select what needs no training."""
        attach_chain(self.model, self.adapter.name, self.chain)
        self._check_order()
        self._warn_of_frozen_head()
        pool, config = self.adapter.pool, self.config
        if pool is None:
            return
        if self.reused is not None:
            if not pool.values.is_meta:
                pool.fill(self.reused.deltas, with_values=config.selection_values == "trained")
        elif not self.plan.loaded and not config.selects_while_training:
            select_without_data(pool, config.rules)
        if not config.init_weights:
            nn.init.normal_(pool.values, std=0.5)
            if pool.is_empty:
                select_without_data(pool, SFAConfig(score="random").rules)

    def _check_order(self) -> None:
        """Check that layers were wrapped in the order that stored positions count them in."""
        pool, wanted = self.adapter.pool, [tensor.name for tensor in self.plan.record.tensors]
        if pool is not None and pool.names != wanted:
            pairs = zip(pool.names, wanted, strict=False)
            first = next((a for a, b in pairs if a != b), "one is missing")
            raise TargetError(
                f"The model's layers come in another order than the adapter's (first: `{first}`). "
                "Load it onto the model it was trained on."
            )

    def _warn_of_frozen_head(self) -> None:
        """Say when parameters outside the backbone will not be trained (a forgotten head)."""
        backbone, saved = self.plan.backbone, self.config.modules_to_save or []
        if backbone is None or self.plan.loaded:
            return
        frozen = [
            n
            for n in outside_backbone(self.model, backbone)
            if not any(re.match(rf"(^|.*\.){m}($|\..*)", n) for m in saved)
            and "modules_to_save" not in n
        ]
        if frozen:
            tops = sorted({n.split(".")[0] for n in frozen})
            absent = unmatched_heads(self.model, self.config)
            typo = f" No module has a name that ends in {', '.join(absent)}." if absent else ""
            warn(
                f"{len(frozen)} tensors outside the backbone stay frozen and are not saved (in "
                f"{', '.join(tops)}); batch norm there still drifts in train mode. Name a task "
                f"head in modules_to_save to train and save it.{typo}",
                FrozenHeadWarning,
            )


def put_on_chain(plan: Plan, chain: Sequence[SavedAdapter], config: SFAConfig) -> Plan:
    """Return a plan that wraps what earlier adapters change, too.

    Raises:
        TargetError: If `modules_to_save` takes a layer that they change.
    """
    if not chain:
        return plan
    changed = {name.rpartition(".")[0] for saved in chain for name in saved.deltas}
    layers = {n: t for saved in chain for n, t in saved.plan.targets.items() if n in changed}
    for name in layers:
        if any(f".{module}." in f".{name}." for module in config.modules_to_save or ()):
            raise TargetError(
                f"The earlier adapter `{chain[-1].source}` changes `{name}`, which modules_to_save "
                "would train and save whole. Leave that out of modules_to_save."
            )
    last = chain[-1]
    links = plan.record.chain or (*last.plan.record.chain, Link(last.source, last.digest))
    others = {
        n: replace(t, parameters={}, width=0) for n, t in layers.items() if n not in plan.targets
    }
    return replace(
        plan,
        targets=dict(plan.targets) | others,
        record=replace(plan.record, chain=links),
        earlier=frozenset(layers),
    )


def check_same_chain(
    reused: SavedAdapter | None, chain: Sequence[SavedAdapter], config: SFAConfig
) -> None:
    """Check that trained values of a saved selection are changes of the same base.

    Raises:
        TargetError: If they are not.
    """
    if reused is None or config.selection_values != "trained":
        return
    if [a.digest for a in reused.chain] != [a.digest for a in chain]:
        raise TargetError(
            f"selection_from={reused.source!r} with selection_values='trained': those values are "
            f"changes on top of {[a.source for a in reused.chain] or 'the plain backbone'}, here "
            f"the base is {[a.source for a in chain] or 'the plain backbone'}. Give the same "
            "continue_from, or selection_values='zero'."
        )


def attach_chain(model: nn.Module, adapter_name: str, chain: Sequence[SavedAdapter]) -> None:
    """Make earlier changes part of an adapter's base; the layers are wrapped already.

    Later adapters that build on the same earlier one share its pool.
    """
    for saved in chain:
        name = f"earlier {saved.digest[:16]}"  # what weights know it by; no adapter's name
        weights = {tensor: _weight(model, tensor) for tensor in saved.deltas}
        if not any(name in weight.slices for weight in _all_weights(model)):
            starts = [0]
            for weight in weights.values():
                starts.append(starts[-1] + weight.tensor.numel())
            first = next(iter(weights.values()))
            pool = Pool(name, OwnStore(list(saved.deltas.values()), starts, first))
            for tensor, weight in weights.items():
                pool.add(weight, tensor)
        for weight in _all_weights(model):
            if name in weight.slices:
                weight.earlier[adapter_name] = (*weight.earlier.get(adapter_name, ()), name)


def _all_weights(model: nn.Module) -> list[Weight]:
    layers = [m for m in model.modules() if isinstance(m, SFALayer)]
    return [weight for layer in layers for weight in layer.weights.values()]


def _weight(model: nn.Module, tensor: str) -> Weight:
    path, _, parameter = tensor.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, SFALayer):  # wrapped by `put_on_chain`
        raise TargetError(f"`{path}` is not adapted, but an earlier adapter changes it.")
    return layer.carrier(parameter)
