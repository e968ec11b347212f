# SPDX-License-Identifier: Apache-2.0
"""The methods that take PEFT's tests: SFA with its rows, and PEFT's SHiRA with PEFT's rows.

A score that needs no data selects in `get_peft_model`, because PEFT's tests want every adapter
parameter to move within three steps.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import ShiraConfig

from sfa_peft import SFAConfig

from .expected import COMPOSITE_HEAD, EMBEDDINGS_TUPLE, Expected, NotApplicable

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A config class and its rows in each suite; None: the rows that PEFT's tests have for it."""

    config: type
    vision: list[tuple[str, Kwargs]]
    custom: list[tuple] | None = None
    several_active: list[tuple] | None = None
    decoder: list[tuple] | None = None
    feature: list[tuple] | None = None
    expected_failures: tuple[Expected, ...] = ()
    not_applicable: tuple[NotApplicable, ...] = field(default=())
    #: Tests that load an adapter onto other random weights than it was saved with.
    onto_other_weights: tuple[str, ...] = ()


INTERNAL: Kwargs = {"budget": 0.5, "rho": 0, "score": "random"}
EXTERNAL: Kwargs = {"budget": 0.9, "rho": 1.0}
# Wide enough that not every ReLU of the tiny models is dead.
BOTH: Kwargs = {"budget": 1.0, "rho": 0.9, "score": "random"}

LIN0: Kwargs = {"target_modules": ["lin0"]}
ALSO_OUT: Kwargs = {**LIN0, "external_modules": ["lin0"]}
CONV: Kwargs = {"target_modules": ["conv2d"]}
HEAD: Kwargs = {"modules_to_save": ["lin1"]}
RANDOM_START: Kwargs = {"init_weights": False}

CUSTOM = [
    (name, name.split()[0], SFAConfig, kwargs)
    for name, kwargs in {
        "MLP 1 SFA internal": {"target_modules": "lin0", **INTERNAL},
        "MLP 2 SFA internal": {**LIN0, **INTERNAL},
        "MLP 3 SFA internal": {"target_modules": ["lin1"], **INTERNAL, "budget": 0.1},
        "MLP 4 SFA internal": {"target_modules": ["lin0", "lin1"], **INTERNAL},
        "MLP 5 SFA internal": {**LIN0, **HEAD, **INTERNAL},
        "MLP 6 SFA external": {**ALSO_OUT, **EXTERNAL},
        "MLP 7 SFA both": {**ALSO_OUT, **BOTH, "target_modules": ["lin0", "lin1"]},
        "MLP 8 SFA both": {**ALSO_OUT, **HEAD, **BOTH},
        "Conv2d 1 SFA internal": {**CONV, **INTERNAL},
        "Conv2dGroups 1 SFA internal": {**CONV, **INTERNAL},
        "Conv2d 2 SFA both": {**CONV, "external_modules": ["conv2d"], **BOTH},
    }.items()
]
SAME: Kwargs = {**LIN0, **INTERNAL, **RANDOM_START}
OTHER: Kwargs = {**SAME, "target_modules": ["lin1"], "budget": 0.1}
SAME_BOTH: Kwargs = {**ALSO_OUT, **BOTH, **RANDOM_START}
SEVERAL_ACTIVE = [
    ("SFA same", "sfa", SFAConfig, SAME, {**SAME, "seed": 1}),
    ("SFA different", "sfa", SFAConfig, SAME, OTHER),
    ("SFA same, both parts", "sfa", SFAConfig, SAME_BOTH, {**SAME_BOTH, "seed": 1}),
]

TEXT: Kwargs = {**INTERNAL, **RANDOM_START}
# One list names the layers of all the families: BERT, both DeBERTas.
ENCODER_LAYERS = ["query", "value", "in_proj", "query_proj", "value_proj"]

HEADS = {
    "swinv2_cls": ["classifier"],
    "vit_cls": ["classifier"],
    "segformer_seg": ["decode_head"],
    "upernet_swinv2": ["decode_head", "auxiliary_head"],
    "mask2former_swin": ["class_predictor"],
    "dpt_swinv2_depth": ["head.head"],
}
PARTS: list[Kwargs] = [{"rho": 0, "score": "random"}, {"rho": 1}, {"score": "random"}]

SFA = Method(
    config=SFAConfig,
    custom=CUSTOM,
    several_active=SEVERAL_ACTIVE,
    decoder=[
        (SFAConfig, {**TEXT, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]})
    ],
    feature=[
        (SFAConfig, {**TEXT, "task_type": "FEATURE_EXTRACTION", "target_modules": ENCODER_LAYERS})
    ],
    vision=[
        (model, {"budget": 0.2, **part, "modules_to_save": head})
        for part in PARTS
        for model, head in HEADS.items()
    ],
    expected_failures=(EMBEDDINGS_TUPLE,),
    not_applicable=(
        NotApplicable(
            "test_training_*layer_indexing*",
            "counts tensors, and SFA has one for all layers; PEFT skips it for VeRA, VBLoRA and "
            "UniLora for that reason",
        ),
    ),
    onto_other_weights=(
        "test_loading_model_requires_grad_set_correctly",
        "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
    ),
)
SHIRA = Method(
    config=ShiraConfig,
    vision=[
        # ViT and Swin call them query and value before transformers 5, q_proj and v_proj since.
        (
            model,
            {
                "r": 1,
                "target_modules": ["query", "value", "q_proj", "v_proj"],
                "modules_to_save": head,
            },
        )
        for model, head in HEADS.items()
    ],
    expected_failures=(EMBEDDINGS_TUPLE, *COMPOSITE_HEAD),
)
METHODS = {"sfa": SFA, "shira": SHIRA}
