# SPDX-License-Identifier: Apache-2.0
"""What the model card of a saved adapter says about loading it."""

from __future__ import annotations

import os
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


def add_usage(folder: Path) -> None:
    """Append to the card in a folder (made if there is none) how to load the adapter."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if _USAGE_HEADING not in text:
        replace_file(card, text.rstrip() + "\n\n" + _USAGE)


def replace_file(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: it is never half written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
