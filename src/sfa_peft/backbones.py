# SPDX-License-Identifier: Apache-2.0
"""Finds the vision backbone in a task model and names its linears by role, not by raw path.

Invariant: a role module is a linear of a numbered transformer block of the backbone, so neither a
task head, nor a tuner's own layers, nor a copy that PEFT trains in full is ever reported.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .blocks import (
    image_encoder,
    innermost,
    is_inside,
    is_linear,
    join,
    match_roles,
    stage_of_block,
    walk,
)
from .errors import TargetError

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
#: Families whose model for a task has the head beside the blocks, with no backbone of its own.
_HOLDING_HEADS = frozenset({"eomt"})
#: Names of heads directly below such a module: of EoMT, and the classifiers of timm's models.
_HEAD_NAME = re.compile(
    r"query|upscale_block|mask_head|class_predictor|(?:aux_)?heads?(?:_dist)?|classifier|fc"
)


@dataclass(frozen=True)
class Backbone:
    """The part of a task model that roles are looked up in.

    Attributes:
        name: Path inside the model, ``""`` when the model is the backbone.
        module: The backbone itself.
        model_type: ``config.model_type`` of the backbone; of one without a config its class's name.
        heads: Paths inside the model of what the module holds for a task and is no part of the
            backbone: the classifier of a timm model, the head of an EoMT.
    """

    name: str
    module: nn.Module
    model_type: str
    heads: tuple[str, ...] = ()

    def holds(self, path: str) -> bool:
        """Whether a path inside the model leads to the backbone or a part of it."""
        return _at_or_inside(path, [self.name]) and not _at_or_inside(path, self.heads)


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
    shares its ``model_type`` with the backbone it holds. Where no ``model_type`` is known, blocks
    are looked for by the names in them, behind a convolution of the image.

    Args:
        model: A task model, a bare backbone, or either of them inside a tuner.

    Returns:
        The first supported backbone in module order, else the one that `blocks.image_encoder` sees;
        None when there is none.
    """
    # Transformers 4 keeps the vision tower of CLIP and SigLIP task models as a plain module.
    found = _candidates(model, PreTrainedModel) or _candidates(model, nn.Module)
    if not found:
        return _by_blocks(model)
    first = found[0]
    if len(found) > 1 and is_inside(found[1].name, first.name) and _is_outermost(model, first):
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
    for path, match in match_roles(backbone.module):
        block = blocks.setdefault(match["block"], len(blocks))
        if match.string == path:
            name = join(backbone.name, path)
            found.append(
                RoleModule(name, str(match.lastgroup), block, stage_of_block(match["block"]))
            )
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
    for _, match in match_roles(backbone.module):
        path = join(backbone.name, match["block"])
        if path not in positions:
            between = stage is not None and stage != stage_of_block(match["block"])
            stage, top = stage_of_block(match["block"]), top + 1 + between
            positions[path] = top
    waiting, found, block = [*positions], {}, ""
    for path, _ in model.named_modules():
        if waiting and path == waiting[0]:
            block = waiting.pop(0)
        if not backbone.holds(path):
            found[path] = top + 1
        elif block and (path == block or is_inside(path, block)):
            found[path] = positions[block]
        else:  # one before the next block
            found[path] = positions[waiting[0]] - 1 if waiting else top + 1
    return found


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
    inside = [(path, model.get_submodule(path)) for path in reversed(backbone.heads)]
    return _largest_parts(model, backbone, [("", model)]) or _largest_parts(model, backbone, inside)


def outside_backbone(model: nn.Module, backbone: Backbone) -> list[str]:
    """Return the names of parameters that are no part of the backbone.

    Those of a classifier in it count where there are no others: a head that is put on an encoder
    does not use it.
    """
    names = [name for name, _ in model.named_parameters()]
    others = [name for name in names if not _at_or_inside(name, [backbone.name])]
    return others or [name for name in names if not backbone.holds(name)]


def _largest_parts(
    model: nn.Module, backbone: Backbone, waiting: list[tuple[str, nn.Module]]
) -> list[str]:
    """Return the largest parts of some modules that PEFT can name, without the backbone."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found: list[str] = []
    seen: set[int] = set()
    while waiting:
        path, module = waiting.pop()
        own = {id(p) for p in module.parameters()} - seen
        if path == backbone.name or not own:
            continue
        others = [n for n in names if n != path and n.endswith(path)]
        # PEFT refuses lists.
        divided = isinstance(module, (nn.ModuleList, nn.ModuleDict)) or others
        children = [(join(path, name), child) for name, child in module.named_children()]
        if is_inside(backbone.name, path) or (divided and children):
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


def describe_model(model: nn.Module) -> str:
    """Describe a model in short, for the error that says it has no supported backbone.

    Args:
        model: Any module.

    Returns:
        The Transformers models in it, parted by ``; ``: path, class, ``model_type`` and the number
        of Linear and Conv2d layers by class (those of inner parts included).
    """
    parts = [(path, m) for path, m in walk(model) if isinstance(m, PreTrainedModel)]
    lines = [
        f"{path or 'the model'}: {type(m).__name__} (model_type {_model_type(m)!r}), {_layers(m)}"
        for path, m in parts
    ]
    if not lines:
        lines = [f"the model: {type(model).__name__} (no Transformers model), {_layers(model)}"]
    return "; ".join(lines)


def _by_blocks(model: nn.Module) -> Backbone | None:
    """Return the backbone whose blocks read the image, by names alone."""
    row = image_encoder(model)
    if row is None or row.root is None:
        return None
    name, module = row.root, model.get_submodule(row.root)
    heads = _heads_in(name, module)
    size = sum(1 for _ in module.parameters())
    while name:  # Transformers puts timm's models into one of its own, which has the config
        outer = name.rpartition(".")[0]
        parent = model.get_submodule(outer)
        if not isinstance(parent, PreTrainedModel) or sum(1 for _ in parent.parameters()) > size:
            break
        name, module = outer, parent
    model_type = _model_type(module) or type(module).__name__
    return Backbone(name, module, model_type, heads)


def _heads_in(name: str, module: nn.Module) -> tuple[str, ...]:
    """Return the paths of what a module at some path holds for a task, with parameters."""
    parts = ((n, next(m.parameters(), None)) for n, m in module.named_children())
    return tuple(join(name, n) for n, own in parts if _HEAD_NAME.fullmatch(n) and own is not None)


def _candidates(model: nn.Module, kind: type[nn.Module]) -> list[Backbone]:
    """List the modules of a kind that could be the backbone, in module order."""
    found = []
    for path, module in walk(model):
        model_type = _model_type(module)
        if (
            isinstance(module, kind)
            and model_type in SUPPORTED_MODEL_TYPES
            and "original_module" not in path.split(".")
            and _takes_pixels(module)
        ):
            heads = _heads_in(path, module) if model_type in _HOLDING_HEADS else ()
            candidate = Backbone(path, module, model_type, heads)
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
        and is_inside(backbone.name, path)
        for path, module in walk(model)
    )


def _layers(module: nn.Module) -> str:
    """Count the linears and convolutions of a module by class."""
    inner = (innermost(m) for _, m in walk(module))
    counts = Counter(type(m).__name__ for m in inner if is_linear(m) or isinstance(m, nn.Conv2d))
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "no Linear or Conv2d"


def _at_or_inside(path: str, outer: Iterable[str]) -> bool:
    return any(path == other or is_inside(path, other) for other in outer)
