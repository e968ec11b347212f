# SPDX-License-Identifier: Apache-2.0
"""Blocks of code on the pages for readers, and how they run.

A page's Python runs from its first block to its last, in one namespace, as a reader would type it.
Not by a plug-in of pytest that makes a test of each block: workers of xdist would share them out.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PRELUDES = Path(__file__).parent / "preludes"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "decisions"} & {*page.parts}]
#: What a block is about that needs a package which the checks do not install: it is compiled only.
OPTIONAL = {
    "lightning.pytorch": "lightning",
    "timm.": "timm",
    "smp.": "segmentation_models_pytorch",
    "RCNN": "torchvision",
}


class Block(NamedTuple):
    """A fenced block: its language, text, and the line of the page that it starts on."""

    language: str
    text: str
    line: int


def name_of(page: Path) -> str:
    """Return what a page is called in tests: its path without the ending."""
    return page.relative_to(ROOT).with_suffix("").as_posix()


def blocks_of(page: Path, language: str) -> list[Block]:
    """Return the blocks of a page in one language."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    fences = [t for t in tokens if t.type == "fence" and t.info.strip() == language]
    return [Block(language, t.content, t.map[0] + 1) for t in fences if t.map]


def prelude_of(page: Path) -> Path:
    """Return where the names come from that a page only speaks of; it need not exist."""
    return PRELUDES / f"{name_of(page).removeprefix('docs/').replace('/', '_')}.py"


def run_page(page: Path, **names: Any) -> dict[str, Any]:
    """Run a page's Python after its prelude; tracebacks have the lines of the page."""
    prelude, names = prelude_of(page), {"__name__": "__main__", **names}
    if prelude.is_file():
        exec(compile(prelude.read_text(encoding="utf-8"), prelude, "exec"), names)
    for block in blocks_of(page, "python"):
        code = compile("\n" * block.line + block.text, page, "exec")
        needed = [package for word, package in OPTIONAL.items() if word in block.text]
        if all(find_spec(package) for package in needed):
            exec(code, names)
    return names
