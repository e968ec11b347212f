# SPDX-License-Identifier: Apache-2.0
"""PEFT's test_feature_extraction_models.py on text encoders that are built here."""

from peft_upstream_tests import test_feature_extraction_models as upstream

from tests.conformance.suites.models import ENCODERS, saved
from tests.conformance.suites.rows import METHOD, swap

MODELS = upstream.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST
MODELS[:] = [saved(name, make) for name, make in ENCODERS.items()]
swap(upstream.ALL_CONFIGS, METHOD.feature)

TestPeftFeatureExtractionModel = upstream.TestPeftFeatureExtractionModel
