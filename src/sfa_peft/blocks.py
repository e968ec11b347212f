# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks by the names in them: roles of linears, stages, and which blocks see an image.

Nothing here asks for a config, so it holds for models of any package. A block is what has a number
for a name and, in it, linears that are named by their role.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

ROLES = ("attn_in", "attn_out", "mlp_in", "mlp_out")

# What follows a block's number in the path. The alternatives are the spellings of transformers 4
# and 5 and of timm; ConvNeXt has no attention, its depthwise convolution plays that part.
_ROLE_PATTERNS = {
    "attn_in": r"(?:attention|attn|self_attn)\.(?:(?:self|attention)\.)?"
    r"(?:query|key|value|qkv|qk|kv|[qkv](?:_proj)?)|modulation\.(?:projection_in|f)",
    "attn_out": r"(?:attention|attn|self_attn)\.(?:output\.dense|o_proj|out_proj|proj)"
    r"|modulation\.(?:projection_out|proj)",
    "mlp_in": r"mlp\.(?:fc1|fc1_[gx]|dense1|lin1|up_proj|gate_proj|weights_in|w12)"
    r"|intermediate\.dense|(?:pwconv|pointwise_conv)1",
    "mlp_out": r"mlp\.(?:fc2|dense2|lin2|down_proj|weights_out|w3)|output\.dense"
    r"|(?:pwconv|pointwise_conv)2",
}
# The number directly before the role is what keeps pooling heads (SigLIP's `head.mlp.fc1`) out.
_ROLE_PATH = re.compile(
    r"(?P<block>(?:.*\.)?\d+)\.(?:"
    + "|".join(f"(?P<{role}>{_ROLE_PATTERNS[role]})" for role in ROLES)
    + ")"
)
#: A part of a path with a number: `3`, or `layers_3` where timm has made a list flat, or `block3`.
_NUMBERED = re.compile(
    r"(?P<word>|(?:\w*_)?(?:stage|layer|level|block)s?(?P<gap>_?))(?P<number>\d+)"
)
#: Most channels of an image: colours, with transparency or depth.
_IMAGE_CHANNELS = 4


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
    return None if match is None else stage_of_block(match["block"])


def stage_of_block(block: str) -> int:
    """Read the stage from a block's path: the number of what is called so, or of what holds it."""
    stage, by_name = 0, False
    parts = block.split(".")
    for before, part in zip(["", *parts], parts[:-1], strict=False):
        match = _NUMBERED.fullmatch(part)
        if match is not None and not by_name:
            word = match["word"] or before
            by_name = "stage" in word or "level" in word
            # `block1` is the first of its kind, as is `layers_0`.
            stage = int(match["number"]) - bool(match["word"] and not match["gap"])
    return max(stage, 0)


def match_roles(module: nn.Module) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield the path of each role linear in a module, and how the names in it match.

    A block that PEFT trains as a copy is among them, so that the ordinals of others do not depend
    on it; it matches without the name of the copy.
    """
    for path, child in walk(module):
        match = _ROLE_PATH.fullmatch(path.replace(".original_module", ""))
        if match is not None and is_linear(innermost(child)):
            yield path, match


@dataclass(frozen=True)
class Row:
    """Blocks of one model whose paths differ in numbers only.

    Attributes:
        name: Their path, with ``#`` for each number.
        blocks: Path of each, in module order.
        layers: Names in a block of its role linears, of all of them together.
        whole: Whether each block has the linears of attention and MLP, or of an MLP and no others.
        root: Path of the smallest module that holds them and, before them, a convolution of the
            image; None where there is none.
    """

    name: str
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    whole: bool
    root: str | None

    @property
    def expression(self) -> str:
        """The `target_modules` that take its role linears: one regular expression for paths."""
        path = re.escape(self.name).replace(r"\#", r"\d+")
        return rf"{path}\.({'|'.join(re.escape(name) for name in self.layers)})"


def find_rows(model: nn.Module) -> list[Row]:
    """Return all rows of blocks in a model, in module order."""
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for path, match in match_roles(model):
        if match.string == path:
            block = match["block"]
            own = rows.setdefault(_without_numbers(block), {}).setdefault(block, {})
            own[path] = str(match.lastgroup)
    parts = dict(walk(model)) if rows else {}
    found = []
    for name, blocks in rows.items():
        layers = {path.removeprefix(f"{b}.") for b, own in blocks.items() for path in own}
        whole = all(_is_whole(block, own, parts) for block, own in blocks.items())
        root = _root([*blocks], parts)
        found.append(Row(name, tuple(blocks), tuple(sorted(layers)), whole, root))
    return found


def image_encoder(model: nn.Module) -> Row | None:
    """Return the blocks that read the image, where there is no doubt which they are.

    Blocks above an encoder, of a decoder, have the image's convolution in that encoder, so the
    smallest module is looked for that has it.

    Returns:
        The row, with a `root`; None where none or several fit, or blocks lack a role.
    """
    rows = [row for row in find_rows(model) if row.root is not None]
    rows = [r for r in rows if not any(is_inside(str(o.root), str(r.root)) for o in rows)]
    return rows[0] if len(rows) == 1 and rows[0].whole else None


def _is_whole(block: str, own: Mapping[str, str], parts: Mapping[str, nn.Module]) -> bool:
    roles = set(own.values())
    if roles != set(ROLES[2:]):
        return roles == set(ROLES)
    # What mixes places in a ConvNeXt is no linear; an attention of another name is not left out.
    inside = (path for path in parts if is_inside(path, block))
    return all(path in own for path in inside if is_linear(innermost(parts[path])))


def _root(blocks: Sequence[str], parts: Mapping[str, nn.Module]) -> str | None:
    """Return the `root` of a row; where nothing takes an image's channels, any convolution does."""
    before = itertools.takewhile(lambda path: path != blocks[0], parts)
    inner = {path: innermost(parts[path]) for path in before}
    stems = {p: m.in_channels for p, m in inner.items() if isinstance(m, (nn.Conv2d, nn.Conv3d))}
    stems = {p: n for p, n in stems.items() if n <= _IMAGE_CHANNELS} or stems
    root = blocks[0]
    while root and stems:
        root = root.rpartition(".")[0]
        if any(is_inside(p, root) for p in stems) and all(is_inside(b, root) for b in blocks):
            return root
    return None


def _without_numbers(block: str) -> str:
    parts = block.split(".")
    return ".".join(
        f"{match['word']}#" if (match := _NUMBERED.fullmatch(part)) else part for part in parts
    )


def walk(
    module: nn.Module, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield paths and modules like `named_modules`, without a tuner's layers and PEFT's copies."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield path, module
    if innermost(module) is not module:
        return
    is_copied = isinstance(getattr(module, "original_module", None), nn.Module)
    for name, child in module.named_children():
        if not (is_copied and name == "modules_to_save"):
            yield from walk(child, join(path, name), seen)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or one of each pixel: a convolution of size 1.

    Quantised linear layers need not be an `nn.Linear`.
    """
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return isinstance(module, nn.Linear) or all(isinstance(size, int) for size in sizes)


def innermost(module: nn.Module) -> nn.Module:
    """Unwrap a layer that tuners have wrapped, however often."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def join(prefix: str, path: str) -> str:
    """Return the path of what has one inside a module."""
    return f"{prefix}.{path}" if prefix and path else prefix or path


def is_inside(path: str, outer: str) -> bool:
    """Whether a path leads into a module, and not only to it."""
    return path != outer and (not outer or path.startswith(outer + "."))
