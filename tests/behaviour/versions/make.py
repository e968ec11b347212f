# SPDX-License-Identifier: Apache-2.0
"""Writes, with the installed Transformers, what the other major version must be able to read.

    python -m tests.behaviour.versions.make

For each model type a folder `transformers-<major>/<model type>` with `base` (config and weights as
`save_pretrained` writes them), `adapter` (trained for some steps, with a task head) and
`expected.safetensors` (the outputs and the adapted weights by ordinal). Never write a folder anew
to make a test pass: users have files of both versions.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from sfa_peft import SFAConfig, SFASelector
from sfa_peft.tuner.adapted_layers import find_pool

HERE = Path(__file__).parent
STEPS = 4

_PLAIN = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}
_PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "hidden_sizes": [8, 8],
    "num_attention_heads": [1, 2],
    "patch_sizes": [3, 3],
    "strides": [4, 2],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}

#: By model type: task model, config, options of the config, and the head that is trained whole.
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _PLAIN, "classifier"),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**_PLAIN, "mlp_ratio": 2},
        "classifier",
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        _PYRAMID,
        "decode_head",
    ),
}


def model_class(model_type: str) -> Any:
    """Return the class of a model type's task model."""
    return getattr(transformers, MODELS[model_type][0])


def images() -> Tensor:
    """Return the batch (2, 3, 16, 16) whose outputs are compared."""
    return torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)


def adapted_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights with their changes, and the changed positions, by ordinal of the file."""
    pool: Any = find_pool(model, "default")
    found = {}
    for ordinal, name in enumerate(pool.names):
        changed = pool.weights[ordinal].tensor != pool.weights[ordinal].pretrained()
        found[f"{ordinal}.{'weight' if name.endswith('weight') else 'bias'}"] = pool.weights[
            ordinal
        ].tensor
        found[f"{ordinal}.changed"] = changed
    return {k: v.detach().clone().contiguous() for k, v in found.items()}


def write(model_type: str, folder: Path) -> None:
    """Write base, adapter and expected values of a model type."""
    _, config_class, options, head = MODELS[model_type]
    torch.manual_seed(0)
    base = model_class(model_type)(getattr(transformers, config_class)(**options, num_labels=3))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" not in name:  # larger than at the usual start, so that a mix-up shows
                parameter.normal_(std=0.3)
    base.save_pretrained(folder / "base")
    config = SFAConfig(budget=0.25, selection_steps=1, modules_to_save=[head])
    model = get_peft_model(base, config).train()
    selector = SFASelector(model, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(STEPS):
        model(pixel_values=images()).logits.pow(2).sum().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        outputs = {"logits": model(pixel_values=images()).logits.contiguous()}
    save_file(outputs | adapted_weights(model), folder / "expected.safetensors")
    for card in folder.glob("*/README.md"):
        card.unlink()


if __name__ == "__main__":
    torch.set_num_threads(1)
    major = HERE / f"transformers-{transformers.__version__.partition('.')[0]}"
    shutil.rmtree(major, ignore_errors=True)
    for each in MODELS:
        write(each, major / each)
