# SPDX-License-Identifier: Apache-2.0
"""`SFAModel`: what PEFT calls to put Selective Feature Adapters into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.functional import set_adapter
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import Tensor, nn

from ..errors import EmptySelectionWarning, MergeWarning, SFAError, warn
from ..sparse.shards import whole
from ..sparse.write_lock import together
from . import adapted_layers
from .adapted_layers import Switched, find_adapter, refuse_offloaded_weights
from .adapter import pack_state
from .feature_map import forget_unused
from .injection import Injection
from .layer import SFALayer
from .load_adapter import in_pool_type, unpack_state
from .report import card_facts
from .upstream.gradient_checkpointing import prepare_checkpointing
from .upstream.shape_check import check_fits
from .upstream.task_heads import settle_heads
from .weight_storage import cut_alike
from .weighted_adapter import LINEAR, add_weighted

#: torch's own allocator aligns tensors to this many bytes.
_ALIGNMENT = 64


class SFAModel(BaseTuner):
    """A model with Selective Feature Adapters (https://arxiv.org/abs/2310.01843).

    Made by `peft.get_peft_model(model, SFAConfig(...))`; arguments as in every PEFT tuner.
    """

    prefix = "sfa_"
    tuner_layer_cls = SFALayer
    # Empty: layers are found by role, see `plan`. Declared as PEFT declares it.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    # --- injection -----------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # an `Injection` finds the layers: it gets the model

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        if peft_config.resolved is None:  # nor are a file's patterns evaluated here
            super()._check_tied_modules(model, peft_config)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # pyright: ignore
        return self._injection.is_target(key)

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
        _maybe_include_all_linear_layers(config, model)
        self._injection = Injection(model, adapter_name, config)
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict=None
        )
        self._injection.finish()
        del self._injection  # it holds what it read of other adapters
        adapted_layers.install(model)
        prepare_checkpointing(model)

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
        layer = self._injection.wrap(target, current_key)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trained yet
            layer.mark_active(self.active_adapters, inference_mode=peft_config.inference_mode)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a wrapper in, or on unloading take it (or a `modules_to_save` wrapper) out."""
        if isinstance(child, SFALayer) and not isinstance(new_module, SFALayer):
            new_module = child.unload()
        # PEFT's own version copies `.weight` between the two, which a composite head has not.
        setattr(parent, child_name, new_module)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # detectors tie heads to one another, but embed no words
            return []

    def _inject_parameters(self, *_args: Any, **_kwargs: Any) -> list[str]:
        # PEFT would wrap what `target_parameters` names once more; their layers are wrapped.
        return [tensor.name for tensor in self._injection.plan.record.tensors]

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

    # --- training ------------------------------------------------------------------------------

    def update_and_allocate(self, global_step: int) -> None:
        """Count an update step, and let the selection of active adapters grow at a round's end.

        For loops made for PEFT's methods that act while training (AdaLoRA, AdaMSS), in place of a
        `SFASelector`. Such a loop selects what that would, if it gets no `lr_scheduler`::

            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()

        The run's length is `SFAConfig.total_steps`. The selection begins before the first forward
        of the whole model that a backward may follow; a call counts if an optimizer of torch
        stepped since the last one. Where nothing is to be selected while training, it does nothing.

        Args:
            global_step: Not needed, since steps of the optimizer are counted: loops begin at 0 or
                at 1, and call this after each micro-batch or after each step.

        Raises:
            SelectionError: If `total_steps` is not given, `SFASelector` or `SFACallback` makes the
                selection already, or the loss is scaled by a GradScaler.
        """
        for name in self.active_adapters:
            adapter = find_adapter(self.model, name)
            if adapter is not None:
                adapter.count_step()

    # --- which adapters act, on all layers together --------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SFAError(
                "adapter_names: one batch cannot mix SFA adapters, because they change the weights "
                "themselves. Group the requests by adapter and call set_adapter for each group."
            )
        yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; in eval mode the weights hold them when this returns."""
        with together():
            found: Any = Switched(self.model)
            set_adapter(found, adapter_name, inference_mode=inference_mode, layer_cls=SFALayer)
        self.active_adapter = adapter_name

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with together():
            for module in Switched(self.model).modules():
                module.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the active one, another becomes active on all layers."""
        super().delete_adapter(adapter_name)
        for layer in self.model.modules():
            # Each chose among its own adapters, which need not be the others' choice.
            if isinstance(layer, SFALayer) and layer.active_adapters != self.active_adapters:
                layer.set_adapter(self.active_adapters)
        forget_unused(self.model)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Leave the change of adapters in the weights until `unmerge_adapter`."""
        refuse_offloaded_weights(self.model)
        with together():
            super().merge_adapter(*args, **kwargs)

    def unmerge_adapter(self) -> None:
        """Put the original entries back, to the bit."""
        with together():
            super().unmerge_adapter()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        merge = kwargs.get("merge", args[0] if args else True)
        if merge:
            refuse_offloaded_weights(self.model)
        names = kwargs.get("adapter_names") or self.active_adapters
        adapted = [m for m in self.model.modules() if isinstance(m, SFALayer)]
        if merge and any(name in m.sfa_down for m in adapted for name in names):
            warn(
                "External adapters cannot be folded into weights: they stay in the merged model as "
                "plain modules behind their layers. Its save_pretrained is refused, since its old "
                "class has no place for them: save the adapter before, and merge after loading.",
                MergeWarning,
            )
        adapted_layers.remove(self.model)
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        forget_unused(self.model)
        return unloaded

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
        adapter = cast(Any, find_adapter(model, adapter_name))
        pool = adapter.pool
        adapter.look()
        awaits = pool is not None and pool.driver is not None  # its selection is still to come
        if pool is not None and not awaits and pool.is_empty and not pool.values.is_meta:
            warn(
                f"Adapter `{adapter_name}` is saved with an empty selection: no pretrained weight "
                "was selected. Was the model trained with SFACallback or SFASelector?",
                EmptySelectionWarning,
            )
        for key, tensor in state_dict.items():
            if ".sfa_" in key or ".modules_to_save." in key:
                state_dict[key] = whole(tensor)  # PEFT takes heads out of the same dict
        state = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        # The config may serve several models, so it hears of this one now; it is saved next.
        record = pack_state(adapter, state, config.saved_values, state_dict)
        facts = card_facts(model, config, adapter_name)
        config.remember(resolved=record.to_dict(), facts=facts)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        adapter = cast(Any, find_adapter(model, adapter_name))
        state_dict = unpack_state(adapter, state_dict, strict=config.check_base)
        # Tensors that a loader takes over as they lie in the file sit at any address, and kernels
        # round differently there: bits are equal, outputs would not be.
        state_dict = {
            k: v if v.data_ptr() % _ALIGNMENT == 0 else v.clone() for k, v in state_dict.items()
        }
        state_dict = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_fits(model, adapter_name, state_dict)
        return cut_alike(model, in_pool_type(adapter, state_dict))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DDP would send every buffer from rank 0 before each forward; positions change only in a
        # pick, which all ranks make alike. Names are those inside the PeftModel around this tuner.
        return [f"base_model.{n}" for n, _ in self.named_buffers() if ".sfa_slots." in n]
