# SPDX-License-Identifier: Apache-2.0
"""Which weights become trainable: schedule, scores and top-k. Knows no model class."""
