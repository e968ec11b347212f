# SPDX-License-Identifier: Apache-2.0
"""PEFT's test_config.py; what it reads from the Hub is an adapter_config.json on disk here."""

import inspect
import json
import tempfile
from pathlib import Path

from peft_upstream_tests import test_config as upstream

from tests.conformance.suites.rows import METHOD, replace_marks

# Any method's file will do: these tests read the fields that all methods share.
LOCAL = Path(tempfile.mkdtemp(prefix="conformance-"))
FIELDS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj"]}
(LOCAL / "adapter_config.json").write_text(json.dumps(FIELDS))
upstream.PEFT_MODELS_TO_TEST[:] = [(str(LOCAL), "main")]

TestPeftConfig = upstream.TestPeftConfig
ROWS = [(METHOD.config, {})]
PAIR = "config_class, mandatory_kwargs"
INDEXED = {"layers_to_transform", "layers_pattern"} <= set(
    inspect.signature(METHOD.config).parameters
)
for argument in (PAIR, PAIR.replace(" ", "")):
    replace_marks(TestPeftConfig, argument, lambda rows: rows is upstream.ALL_CONFIG_CLASSES, ROWS)
    replace_marks(
        TestPeftConfig,
        argument,
        lambda rows: rows is upstream.LAYER_INDEXING_CONFIG_CLASSES,
        ROWS if INDEXED else [],
    )
replace_marks(TestPeftConfig, "config_class", lambda rows: isinstance(rows, list), [METHOD.config])
