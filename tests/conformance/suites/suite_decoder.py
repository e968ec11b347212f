# SPDX-License-Identifier: Apache-2.0
"""PEFT's test_decoder_models.py on language models that are built here."""

from peft_upstream_tests import test_decoder_models as upstream

from tests.conformance.suites.models import DECODERS, saved
from tests.conformance.suites.rows import METHOD, swap

upstream.PEFT_DECODER_MODELS_TO_TEST[:] = [saved(name, make) for name, make in DECODERS.items()]
swap(upstream.ALL_CONFIGS, METHOD.decoder)

TestDecoderModels = upstream.TestDecoderModels
