# SPDX-License-Identifier: Apache-2.0
"""Data of dense prediction: folders read as they are distributed, and augmentation."""
