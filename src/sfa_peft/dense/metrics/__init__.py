# SPDX-License-Identifier: Apache-2.0
"""Metrics of dense prediction, all of them without a network."""
