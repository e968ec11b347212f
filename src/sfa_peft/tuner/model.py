# SPDX-License-Identifier: Apache-2.0
"""`SFAModel`: what PEFT calls to put Selective Feature Adapters into a model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn

from ..config import SFAConfig
from ..errors import SFAError, SFAWarning, TargetError
from ..selection.data_free import select_without_data
from ..sparse.pool import Pool
from . import compiled
from .chain import attach_chain, check_same_chain, put_on_chain
from .layer import SFALayer, adapter_layers, check_name, find_pool
from .model_switching import SwitchingModel
from .plan import Plan, make_plan
from .reading import SavedAdapter, fill_pool, read_chain, read_saved, reuse
from .report import card_facts
from .saving import check_base, in_pool_type, pack_state, settle, unpack_state
from .targets import is_excluded
from .upstream.checkpointing import prepare_checkpointing
from .upstream.fits import check_fits
from .upstream.heads import check_heads, settle_heads, unmatched_heads
from .weighted import LINEAR, add_weighted

#: torch's own allocator aligns tensors to this many bytes.
_ALIGNMENT = 64


class SFAModel(SwitchingModel):
    """A model with Selective Feature Adapters (https://arxiv.org/abs/2310.01843).

    Made by `peft.get_peft_model(model, SFAConfig(...))`; arguments as in every PEFT tuner.
    """

    prefix = "sfa_"
    tuner_layer_cls = SFALayer
    # Empty: layers are found by role, see `plan`. Declared as PEFT declares it.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    # --- injection -----------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # `_prepare_model` finds the layers: it gets the model

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        check_name(self._name_to_add, model)
        _maybe_include_all_linear_layers(peft_config, model)
        self._reused: SavedAdapter | None = None
        if peft_config.selection_from is not None and peft_config.resolved is None:
            source, strict = peft_config.selection_from, peft_config.check_base
            self._reused = read_saved(model, source, strict=strict)
        reused = reuse(self._reused, peft_config) if self._reused else None
        strict, folder = peft_config.check_base, peft_config.notes.folder
        self._chain = read_chain(model, peft_config, folder, strict=strict)
        check_same_chain(self._reused, self._chain, peft_config)
        self._plan = put_on_chain(make_plan(model, peft_config, reused), self._chain, peft_config)
        check_heads(model, peft_config, self._plan.targets)
        check_base(model, self._name_to_add, self._plan, strict=peft_config.check_base)
        self._pool: Pool | None = None

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # pyright: ignore
        if key in self._plan.earlier:
            return True
        # PEFT wants to hear of excluded layers apart from those that do not match.
        excluded = is_excluded(peft_config, key)
        return key in self._plan.targets if excluded is None else excluded

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Put one adapter into the model (called by PEFT).

        Layers come from the config, not from `state_dict`: a layer that only has selected weights
        leaves no key of its own there.
        """
        config = settle_heads(model, self.peft_config[adapter_name])  # pyright: ignore
        self.peft_config[adapter_name] = config
        self._name_to_add = adapter_name
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict=None
        )
        attach_chain(model, adapter_name, self._chain)
        self._chain = ()
        compiled.install(model)
        prepare_checkpointing(model)
        plan, pool = self._plan, self._pool
        _check_order(pool, plan)
        resolved = plan.to_resolved()
        for layer in adapter_layers(model, adapter_name):
            layer.resolved[adapter_name] = resolved
        _warn_of_frozen_head(model, plan, config)
        if pool is None:
            return
        if self._reused is not None:
            selection, self._reused = self._reused.selection, None
            if not pool.values.is_meta:
                fill_pool(pool, selection, with_values=config.selection_values == "trained")
        elif not plan.loaded and not config.selects_while_training:
            select_without_data(pool, config)
        if not config.init_weights:
            nn.init.normal_(pool.values, std=0.5)
            if pool.is_empty:
                select_without_data(pool, SFAConfig(score="random"))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan = self._plan.targets[current_key]
        if isinstance(target, BaseTunerLayer) and not isinstance(target, SFALayer):
            raise TargetError(
                f"`{current_key}` is already wrapped by {type(target).__name__}; SFA changes the "
                "layer's own weight and cannot share it with another tuner. Unload the other one."
            )
        layer = target
        if not isinstance(layer, SFALayer):
            layer = SFALayer(
                target, name=plan.name, role=plan.role, block=plan.block, stage=plan.stage
            )
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trained yet
            layer._active_adapter = self.active_adapters
        if plan.parameters and self._pool is None:
            self._pool = Pool(
                adapter_name,
                needs_selector=peft_config.selects_while_training,
                num_weights=self._plan.budget.eligible,
                lr_ratio=peft_config.internal_lr_ratio,
                decay_weight=peft_config.weight_decay_on == "weight",
                config=peft_config,
            )
            if self._plan.saved is not None and self._plan.saved.packed is not None:
                self._pool.settle = settle
        layer.update_layer(
            adapter_name,
            peft_config,
            path=plan.name,
            pool=self._pool,
            pool_size=self._plan.budget.internal,
            packed_size=self._plan.saved.packed if self._plan.saved else None,
            parameters=list(plan.parameters),
            width=plan.width,
        )
        old_name = next((a for a, b in self._plan.renamed.items() if b == current_key), None)
        if old_name is not None:
            layer.saved_names[adapter_name] = old_name
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # detectors tie heads to one another, but embed no words
            return []

    def _inject_parameters(self, *_args: Any, **_kwargs: Any) -> list[str]:
        # PEFT would wrap what `target_parameters` names once more; their layers are wrapped.
        return [f"{t.name}.{p}" for t in self._plan.targets.values() for p in t.parameters]

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = LINEAR,
        **options: Any,
    ) -> None:
        """Add an adapter whose sparse change is the weighted sum of those of others.

        Its selection is the union of theirs. A module that one of them saves whole is copied.

        Args:
            adapters: Names of adapters of this model, without external adapters (`rho=0`).
            weights: The factor of each.
            adapter_name: Name of the new adapter, which is not made active.
            combination_type: "linear", as PEFT calls the weighted sum.
            options: Those that PEFT has for the other types are refused as these are.

        Raises:
            SFAError: If the arguments are wrong, or the adapters cannot be summed: external
                adapters, a module that several save whole, a change on top of an earlier adapter.
        """
        add_weighted(self, adapters, weights, adapter_name, combination_type, options)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SFAError(
                "adapter_names: one batch cannot mix SFA adapters, because they change the weights "
                "themselves. Group the requests by adapter and call set_adapter for each group."
            )
        yield

    # --- files ---------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        pool = find_pool(model, adapter_name)
        if pool is not None and pool.is_empty and not pool.values.is_meta:
            warnings.warn(
                f"Adapter `{adapter_name}` is saved with an empty selection: no pretrained weight "
                "was selected. Was the model trained with SFACallback or SFASelector?",
                SFAWarning,
                stacklevel=3,
            )
        state = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        # On the layers and not on the config, which may serve several models; it is saved next.
        resolved = adapter_layers(model, adapter_name)[0].resolved[adapter_name]
        if pool is not None:
            resolved = pack_state(pool, config, resolved, state)
        facts = card_facts(model, config, adapter_name)
        config.remember(resolved=resolved.to_dict(), facts=facts)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        layers = adapter_layers(model, adapter_name)
        state_dict = unpack_state(layers, adapter_name, state_dict, strict=config.check_base)
        # Tensors that a loader takes over as they lie in the file sit at any address, and kernels
        # round differently there: bits are equal, outputs would not be.
        state_dict = {
            k: v if v.data_ptr() % _ALIGNMENT == 0 else v.clone() for k, v in state_dict.items()
        }
        state_dict = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_fits(model, adapter_name, state_dict)
        return in_pool_type(find_pool(model, adapter_name), state_dict)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP would send every buffer from rank 0 before each forward; positions change only in a
        # pick, which all ranks make alike. Names are those inside the PeftModel around this tuner.
        return [f"base_model.{n}" for n, _ in self.named_buffers() if ".sfa_slots." in n]


def _check_order(pool: Pool | None, plan: Plan) -> None:
    """Check that layers were injected in the order that stored positions count them in."""
    wanted = [f"{t.name}.{p}" for t in plan.targets.values() for p in t.parameters]
    if pool is not None and pool.names != wanted:
        pairs = zip(pool.names, wanted, strict=False)
        first = next((a for a, b in pairs if a != b), "one is missing")
        raise TargetError(
            f"The model's layers come in another order than the adapter's (first: `{first}`). "
            "Load it onto the model it was trained on."
        )


def _warn_of_frozen_head(model: nn.Module, plan: Plan, config: SFAConfig) -> None:
    """Say when parameters outside the backbone will not be trained (usually a forgotten head)."""
    if plan.backbone is None or plan.loaded or not plan.backbone.name:
        return
    prefix = plan.backbone.name + "."
    saved = config.modules_to_save or []
    frozen = [
        n
        for n, _ in model.named_parameters()
        if not n.startswith(prefix)
        and not any(re.match(rf"(^|.*\.){m}($|\..*)", n) for m in saved)
        and "modules_to_save" not in n
    ]
    if frozen:
        tops = sorted({n.split(".")[0] for n in frozen})
        absent = unmatched_heads(model, config)
        typo = f" No module has a name that ends in {', '.join(absent)}." if absent else ""
        warnings.warn(
            f"{len(frozen)} tensors outside the backbone stay frozen and are not saved (in "
            f"{', '.join(tops)}); batch norm there still drifts in train mode. Name a task head in "
            f"modules_to_save to train and save it.{typo}",
            SFAWarning,
            stacklevel=3,
        )
