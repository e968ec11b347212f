# SPDX-License-Identifier: Apache-2.0
"""SFA's rows for PEFT's own test suites: internal only, external only, and both.

A runner that stages the tests of PEFT's source distribution reads these names; pytest does not
collect this file. A score that needs no data selects in `get_peft_model`, because PEFT's tests
want every adapter parameter to move within three steps.
"""

import os
from typing import Any

from sfa_peft import SFAConfig as CONFIG

# Some of PEFT's tests load an adapter onto other random weights than it was trained on.
os.environ["SFA_CHECK_BASE"] = "0"

INTERNAL: dict[str, Any] = {"budget": 0.5, "rho": 0, "score": "random"}
EXTERNAL: dict[str, Any] = {"budget": 0.9, "rho": 1.0}
# Wide enough that not every ReLU of the tiny models is dead.
BOTH: dict[str, Any] = {"budget": 1.0, "rho": 0.9, "score": "random"}

LIN0: dict[str, Any] = {"target_modules": ["lin0"]}
ALSO_OUT = {**LIN0, "external_modules": ["lin0"]}
CONV: dict[str, Any] = {"target_modules": ["conv2d"]}
HEAD = {"modules_to_save": ["lin1"]}

NAME = "sfa"
CUSTOM = [
    ("MLP 1 SFA internal", "MLP", CONFIG, {"target_modules": "lin0", **INTERNAL}),
    ("MLP 2 SFA internal", "MLP", CONFIG, {**LIN0, **INTERNAL}),
    ("MLP 3 SFA internal", "MLP", CONFIG, {"target_modules": ["lin1"], **INTERNAL, "budget": 0.1}),
    ("MLP 4 SFA internal", "MLP", CONFIG, {"target_modules": ["lin0", "lin1"], **INTERNAL}),
    ("MLP 5 SFA internal", "MLP", CONFIG, {**LIN0, **HEAD, **INTERNAL}),
    ("MLP 6 SFA external", "MLP", CONFIG, {**ALSO_OUT, **EXTERNAL}),
    ("MLP 7 SFA both", "MLP", CONFIG, {**ALSO_OUT, **BOTH, "target_modules": ["lin0", "lin1"]}),
    ("MLP 8 SFA both", "MLP", CONFIG, {**ALSO_OUT, **HEAD, **BOTH}),
    ("Conv2d 1 SFA internal", "Conv2d", CONFIG, {**CONV, **INTERNAL}),
    ("Conv2d 2 SFA both", "Conv2d", CONFIG, {**CONV, "external_modules": ["conv2d"], **BOTH}),
]
RANDOM_START = {"init_weights": False}
MULTI_ACTIVE = [
    (
        "SFA same",
        "sfa",
        CONFIG,
        {**LIN0, **INTERNAL, **RANDOM_START},
        {**LIN0, **INTERNAL, **RANDOM_START, "seed": 1},
    ),
    (
        "SFA different",
        "sfa",
        CONFIG,
        {**LIN0, **INTERNAL, **RANDOM_START},
        {"target_modules": ["lin1"], **INTERNAL, "budget": 0.1, **RANDOM_START},
    ),
    (
        "SFA same, both parts",
        "sfa",
        CONFIG,
        {**ALSO_OUT, **BOTH, **RANDOM_START},
        {**ALSO_OUT, **BOTH, **RANDOM_START, "seed": 1},
    ),
]
CONFIG_MANDATORY: dict[str, Any] = {}
DECODER_KWARGS = [
    {
        **INTERNAL,
        **RANDOM_START,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj"],
    }
]
FEATURE_KWARGS = [
    {
        **INTERNAL,
        **RANDOM_START,
        "task_type": "FEATURE_EXTRACTION",
        "target_modules": ["query", "value"],
    }
]
HEADS = {
    "swinv2_cls": ["classifier"],
    "vit_cls": ["classifier"],
    "segformer_seg": ["decode_head"],
    "upernet_swinv2": ["decode_head", "auxiliary_head"],
    "mask2former_swin": ["class_predictor"],
    "dpt_swinv2_depth": ["head.head"],
}
VISION = [
    (model, {"budget": 0.2, **part, "modules_to_save": head})
    for part in ({"rho": 0, "score": "random"}, {"rho": 1}, {"score": "random"})
    for model, head in HEADS.items()
]
CAPABILITIES = {"merge": True}
_SHARED = "one pool of values for all layers: PEFT skips its other shared-parameter methods here"
XFAIL = {"test_training*layer_indexing*": _SHARED}
