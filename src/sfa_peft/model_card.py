# SPDX-License-Identifier: Apache-2.0
"""What the model card of a saved adapter says about loading it, and about a part of a selection."""

from __future__ import annotations

import os
import re
from pathlib import Path

_USAGE_HEADING = "## Loading this Selective Feature Adapter"
_USAGE = f"""{_USAGE_HEADING}

`import sfa_peft` must come first: it registers the method with PEFT. Without it loading ends in
`KeyError: 'SFA'`.

```python
import sfa_peft  # registers SFA with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/hub-id/of/this/folder")
```
"""
#: Begins the line about a selection that is not whole, as after early stopping.
_PARTLY = "Only a part of the budget was selected when this was saved:"


def add_usage(folder: Path, selected: tuple[int, int] | None = None) -> None:
    """Append to the card in a folder (made if there is none) how to load the adapter.

    Args:
        folder: Of the saved adapter.
        selected: Number of weights selected and to select; where fewer are, the card says so.
    """
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    text = re.sub(f"\n*{re.escape(_PARTLY)}.*\n?", "\n", before)
    if _USAGE_HEADING not in text:
        text = f"{text.rstrip()}\n\n{_USAGE}"
    if selected is not None and selected[0] < selected[1]:
        text = f"{text.rstrip()}\n\n{_PARTLY} {selected[0]:,} of {selected[1]:,} weights.\n"
    if text != before:
        replace_file(card, text)


def replace_file(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: it is never half written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
