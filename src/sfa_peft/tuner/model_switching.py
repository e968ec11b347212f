# SPDX-License-Identifier: Apache-2.0
"""The part of `SFAModel` that changes which adapters act, on all layers together."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..errors import MergeWarning, warn
from ..sparse.writing import together
from . import compiled
from .layer import SFALayer


class SwitchingModel(BaseTuner):
    """A tuner that writes all its layers at once."""

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Put a wrapper in, or on unloading take it (or a `modules_to_save` wrapper) out."""
        if isinstance(child, SFALayer) and not isinstance(new_module, SFALayer):
            new_module = child.unload()
        # PEFT's own version copies `.weight` between the two, which a composite head has not.
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; in eval mode the weights hold them when this returns."""
        with together():
            super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with together():
            super()._enable_adapter_layers(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the active one, another becomes active on all layers."""
        super().delete_adapter(adapter_name)
        for layer in self.model.modules():
            # Each chose among its own adapters, which need not be the others' choice.
            if isinstance(layer, SFALayer) and layer.active_adapters != self.active_adapters:
                layer.set_adapter(self.active_adapters)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Leave the change of adapters in the weights until `unmerge_adapter`."""
        with together():
            super().merge_adapter(*args, **kwargs)

    def unmerge_adapter(self) -> None:
        """Put the original entries back, to the bit."""
        with together():
            super().unmerge_adapter()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        merge = kwargs.get("merge", args[0] if args else True)
        names = kwargs.get("adapter_names") or self.active_adapters
        layers = [m for m in self.model.modules() if isinstance(m, SFALayer)]
        if merge and any(name in m.sfa_down for m in layers for name in names):
            warn(
                "External adapters cannot be folded into weights: they stay in the merged model as "
                "plain modules behind their layers, so saving it needs more than its old class.",
                MergeWarning,
            )
        compiled.remove(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)
