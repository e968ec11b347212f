# SPDX-License-Identifier: Apache-2.0
"""PEFT's test_custom_models.py: perceptrons and convolutions, with several adapters, and FSDP."""

from peft_upstream_tests import test_custom_models as upstream

from tests.conformance.suites.rows import METHOD, swap

swap(upstream.TEST_CASES, METHOD.custom)
swap(upstream.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, METHOD.several_active)
upstream.ALL_PEFT_CONFIG_CLASSES[:] = [METHOD.config]

# Short lists of classes written into the decorators. SHiRA stands in them, so SFA can.
CLASS_LISTS = (
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_multiple_active_adapters_with_same_modules_to_save_raises",
    "test_multiple_active_adapters_with_overlapping_modules_to_save_raises",
    "test_multiple_active_adapters_with_different_modules_to_save_works",
)
for case in (upstream.TestPeftCustomModel, upstream.TestMultipleActiveAdapters):
    for name in CLASS_LISTS:
        for mark in getattr(vars(case).get(name), "pytestmark", []):
            if mark.name == "parametrize" and mark.args[0] == "config_cls":
                mark.args[1][:] = [METHOD.config]

TestPeftCustomModel = upstream.TestPeftCustomModel
TestMultipleActiveAdapters = upstream.TestMultipleActiveAdapters
TestRequiresGrad = upstream.TestRequiresGrad
TestPeftFsdpStateDict = upstream.TestPeftFsdpStateDict
