# SPDX-License-Identifier: Apache-2.0
"""Files out of sparse changes. Knows no model."""
