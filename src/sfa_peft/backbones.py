# SPDX-License-Identifier: Apache-2.0
"""Finds the vision backbone in a task model and names its linears by role, not by raw path.

Invariant: a role module is a linear of a numbered transformer block of the backbone, so neither a
task head, nor a tuner's own layers, nor a copy that PEFT trains in full is ever reported.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .errors import TargetError

ROLES = ("attn_in", "attn_out", "mlp_in", "mlp_out")

SUPPORTED_MODEL_TYPES = frozenset(
    {
        "beit",
        "clip_vision_model",
        "convnext",
        "convnextv2",
        "data2vec-vision",
        "deit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_convnext",
        "dinov3_vit",
        "dpt",
        "eomt",
        "focalnet",
        "glpn",
        "hiera",
        "ijepa",
        "maskformer-swin",
        "pvt",
        "pvt_v2",
        "sam_vision_model",
        "segformer",
        "siglip_vision_model",
        "swin",
        "swinv2",
        "videomae",
        "vit",
        "vit_mae",
        "vit_msn",
        "vitdet",
        "yolos",
    }
)

# What follows a block's number in the path. The alternatives are the spellings of transformers 4
# and 5 (and timm); ConvNeXt has no attention, its depthwise convolution plays that part.
_ROLE_PATTERNS = {
    "attn_in": r"(?:attention|attn|self_attn)\.(?:(?:self|attention)\.)?"
    r"(?:query|key|value|qkv|kv|q|[qkv]_proj)|modulation\.projection_in",
    "attn_out": r"(?:attention|attn|self_attn)\.(?:output\.dense|o_proj|out_proj|proj)"
    r"|modulation\.projection_out",
    "mlp_in": r"mlp\.(?:fc1|dense1|lin1|up_proj|gate_proj|weights_in)|intermediate\.dense"
    r"|(?:pwconv|pointwise_conv)1",
    "mlp_out": r"mlp\.(?:fc2|dense2|lin2|down_proj|weights_out)|output\.dense"
    r"|(?:pwconv|pointwise_conv)2",
}
# The number directly before the role is what keeps pooling heads (SigLIP's `head.mlp.fc1`) out.
_ROLE_PATH = re.compile(
    r"(?P<block>(?:.*\.)?\d+)\.(?:"
    + "|".join(f"(?P<{role}>{_ROLE_PATTERNS[role]})" for role in ROLES)
    + ")"
)


@dataclass(frozen=True)
class Backbone:
    """The part of a task model that roles are looked up in.

    Attributes:
        name: Path inside the model, ``""`` when the model is the backbone.
        module: The backbone itself.
        model_type: ``config.model_type`` of the backbone.
    """

    name: str
    module: nn.Module
    model_type: str


@dataclass(frozen=True)
class RoleModule:
    """A linear of a transformer block, or the wrapper a tuner has put around it.

    Attributes:
        name: Full path inside the task model.
        role: One of ``ROLES``.
        block: Ordinal of the block in call order, from 0, over the whole backbone.
        stage: Hierarchical stage from 0; always 0 for plain vision transformers.
    """

    name: str
    role: str
    block: int
    stage: int


def find_backbone(model: nn.Module) -> Backbone | None:
    """Find the vision backbone of a task model.

    A part inside a Transformers model is preferred to that model itself, since a task model often
    shares its ``model_type`` with the backbone it holds.

    Args:
        model: A task model, a bare backbone, or either of them inside a tuner.

    Returns:
        The first supported backbone in module order, or None when there is none.
    """
    # Transformers 4 keeps the vision tower of CLIP and SigLIP task models as a plain module.
    found = _candidates(model, PreTrainedModel) or _candidates(model, nn.Module)
    if not found:
        return None
    first = found[0]
    if len(found) > 1 and _is_inside(found[1].name, first.name) and _is_outermost(model, first):
        return found[1]
    return first


def role_modules(backbone: Backbone) -> list[RoleModule]:
    """List the role linears of a backbone in module order.

    Args:
        backbone: What `find_backbone` returned.

    Returns:
        One entry per role linear. A wrapped linear (a module with a ``base_layer``) is listed once,
        under the wrapper's own path.
    """
    blocks: dict[str, int] = {}
    found = []
    for path, match in _matches(backbone.module):
        block = blocks.setdefault(match["block"], len(blocks))
        if match.string == path:
            name = _join(backbone.name, path)
            found.append(RoleModule(name, str(match.lastgroup), block, _stage(match["block"])))
    return found


def layer_positions(model: nn.Module) -> dict[str, int]:
    """Return for the path of each module how far up the backbone it stands, in model order.

    A block is one layer, and so is what merges patches between two stages. What precedes the first
    block is at 0; what follows the last one, and whatever lies outside the backbone, at the top.
    A backbone that is not known counts as the whole model, by the names of its blocks.

    Args:
        model: A task model, or a tuner around it.
    """
    backbone = find_backbone(model) or Backbone("", model, "")
    positions, stage, top = {}, None, 0
    for _, match in _matches(backbone.module):
        path = _join(backbone.name, match["block"])
        if path not in positions:
            between = stage is not None and stage != _stage(match["block"])
            stage, top = _stage(match["block"]), top + 1 + between
            positions[path] = top
    waiting, found, block = [*positions], {}, ""
    for path, _ in model.named_modules():
        if waiting and path == waiting[0]:
            block = waiting.pop(0)
        if not (path == backbone.name or _is_inside(path, backbone.name)):
            found[path] = top + 1
        elif block and (path == block or _is_inside(path, block)):
            found[path] = positions[block]
        else:  # one before the next block
            found[path] = positions[waiting[0]] - 1 if waiting else top + 1
    return found


def role_of(path: str) -> str | None:
    """Tell the role a module has by its path alone.

    Args:
        path: Module path with the number of its block, in the names of transformers 4 or 5, or of
            timm (``blocks.3.attn.qkv``).

    Returns:
        One of ``ROLES``, or None when the path is not that of a role linear.
    """
    match = _ROLE_PATH.fullmatch(path)
    return None if match is None else match.lastgroup


def stage_of(path: str) -> int | None:
    """Tell the stage of a role linear by its path alone; None where it is none. See `role_of`."""
    match = _ROLE_PATH.fullmatch(path)
    return None if match is None else _stage(match["block"])


def head_modules(model: nn.Module) -> list[str]:
    """Return the paths of the largest parts with parameters that lie outside the backbone.

    They are what `modules_to_save` of any PEFT config takes to train and save the task head whole.
    PEFT compares ends of paths: RT-DETR's `model.encoder` would mean the backbone's
    `model.backbone.model.encoder` too. There, and of lists, the parts inside are named instead.
    Parts that only share the parameters of others, as some detection heads have, are left out.

    Args:
        model: A task model.

    Raises:
        TargetError: If it has no backbone that is known, or a part cannot be named apart.
    """
    backbone = find_backbone(model)
    if backbone is None:
        raise TargetError(
            "head_modules: no known vision backbone in the model, so what lies outside it is not "
            f"known. Name the head yourself. The model has: {describe_model(model)}"
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found: list[str] = []
    seen: set[int] = set()
    waiting = [] if not backbone.name else [("", model)]
    while waiting:
        path, module = waiting.pop()
        own = {id(p) for p in module.parameters()} - seen
        if path == backbone.name or not own:
            continue
        others = [n for n in names if n != path and n.endswith(path)]
        # PEFT refuses lists.
        divided = isinstance(module, (nn.ModuleList, nn.ModuleDict)) or others
        children = [(_join(path, name), child) for name, child in module.named_children()]
        if _is_inside(backbone.name, path) or (divided and children):
            waiting += reversed(children)
        elif others:
            raise TargetError(
                f"head_modules: PEFT compares ends of names and would take `{others[0]}` for "
                f"`{path}`. Rename that module, and name the head yourself."
            )
        else:
            found.append(path)
            seen |= own
    return found


def suggest_targets(model: nn.Module) -> str | None:
    """Return the `target_modules` that take the role layers of an unknown model.

    Args:
        model: Any module; numbered blocks with the names of Transformers or timm are looked for.

    Returns:
        One regular expression for whole paths, None where no layer is named like that.
    """
    found = set()
    for path, module in _walk(model):
        match = _ROLE_PATH.fullmatch(path)
        if match is not None and isinstance(_innermost(module), (nn.Linear, nn.Conv2d)):
            found.add(path.removeprefix(match["block"] + "."))
    names = "|".join(re.escape(name) for name in sorted(found))
    return rf".*\b\d+\.({names})" if names else None


def describe_model(model: nn.Module) -> str:
    """Describe a model in short, for the error that says it has no supported backbone.

    Args:
        model: Any module.

    Returns:
        The Transformers models in it, parted by ``; ``: path, class, ``model_type`` and the number
        of Linear and Conv2d layers by class (those of inner parts included).
    """
    parts = [(path, m) for path, m in _walk(model) if isinstance(m, PreTrainedModel)]
    lines = [
        f"{path or 'the model'}: {type(m).__name__} (model_type {_model_type(m)!r}), {_layers(m)}"
        for path, m in parts
    ]
    if not lines:
        lines = [f"the model: {type(model).__name__} (no Transformers model), {_layers(model)}"]
    return "; ".join(lines)


def _matches(module: nn.Module) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the path of each role linear, and how the names in it match.

    A block that PEFT trains as a copy is among them, so that the ordinals of others do not depend
    on it; it matches without the name of the copy.
    """
    for path, child in _walk(module):
        match = _ROLE_PATH.fullmatch(path.replace(".original_module", ""))
        if match is not None and _is_linear(_innermost(child)):
            yield path, match


def _candidates(model: nn.Module, kind: type[nn.Module]) -> list[Backbone]:
    """List the modules of a kind that could be the backbone, in module order."""
    found = []
    for path, module in _walk(model):
        model_type = _model_type(module)
        if (
            isinstance(module, kind)
            and model_type in SUPPORTED_MODEL_TYPES
            and "original_module" not in path.split(".")
            and _takes_pixels(module)
        ):
            candidate = Backbone(path, module, model_type)
            # Patch embeddings carry the backbone's config and take pixels too, but have no roles.
            if role_modules(candidate):
                found.append(candidate)
    return found


def _takes_pixels(module: nn.Module) -> bool:
    """Tell a backbone from its own encoder or a decode head, which may share its config."""
    # The class is asked, since hooks (Accelerate's, for one) replace `forward` on the instance.
    return "pixel_values" in inspect.signature(type(module).forward).parameters


def _model_type(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "model_type", ""))


def _is_outermost(model: nn.Module, backbone: Backbone) -> bool:
    """Tell whether no Transformers model encloses the backbone."""
    return not any(
        isinstance(module, PreTrainedModel)
        and module is not backbone.module
        and _is_inside(backbone.name, path)
        for path, module in _walk(model)
    )


def _walk(
    module: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield paths and modules like `named_modules`, without a tuner's layers and PEFT's copies."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield path, module
    if _innermost(module) is not module:
        return
    is_copied = isinstance(getattr(module, "original_module", None), nn.Module)
    for name, child in module.named_children():
        if not (is_copied and name == "modules_to_save"):
            yield from _walk(child, _join(path, name), seen)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer; quantised ones need not be an `nn.Linear`."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return isinstance(module, nn.Linear) or all(isinstance(size, int) for size in sizes)


def _innermost(module: nn.Module) -> nn.Module:
    """Unwrap a layer that tuners have wrapped, however often."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def _layers(module: nn.Module) -> str:
    """Count the linears and convolutions of a module by class."""
    inner = (_innermost(m) for _, m in _walk(module))
    counts = Counter(type(m).__name__ for m in inner if _is_linear(m) or isinstance(m, nn.Conv2d))
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "no Linear or Conv2d"


def _stage(block: str) -> int:
    """Read the stage from a block's path: the number before the block's own, if there is one."""
    numbers = [int(part) for part in block.split(".") if part.isdigit()]
    return numbers[-2] if len(numbers) > 1 else 0


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def _is_inside(path: str, outer: str) -> bool:
    return path != outer and (not outer or path.startswith(outer + "."))
