# SPDX-License-Identifier: Apache-2.0
"""Layers whose weights accelerate keeps elsewhere (CPU, disk) between forwards: they are refused.

Such a layer has its weights while it computes, as new tensors each time. What is written into them
is thrown away, and at any other time there is nothing to write into.
"""

from __future__ import annotations

from collections.abc import Mapping

from accelerate.hooks import AlignDevicesHook
from torch import nn

from ..errors import TargetError


def refuse_offloaded(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weights are offloaded.

    Args:
        root: The model, or a module in which the hooks that do it are looked for.
        layers: The layers by path.

    Raises:
        TargetError: Naming the first one.
    """
    away: set[nn.Module] = set()
    for module in root.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in (hook, *getattr(hook, "hooks", ())):
            if isinstance(part, AlignDevicesHook) and part.offload:
                away.update(module.modules() if part.place_submodules else [module])
    # PEFT takes the hooks away before it loads, and not all weights come back then.
    mapped = {"cpu", "disk"} & {str(place) for place in getattr(root, "hf_device_map", {}).values()}
    for path, layer in layers.items():
        gone = mapped and any(tensor.is_meta for tensor in layer.parameters(recurse=False))
        if layer in away or gone:
            raise TargetError(
                f"`{path}`: accelerate offloads its weights (cpu_offload, disk_offload, or a "
                "device_map with a part on the CPU or disk): between forwards they are not in the "
                "model, so no adapter can be put on them. Load the model without offloading; or "
                "merge the adapter on such a model (merge_and_unload) and offload that one."
            )
