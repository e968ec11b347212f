# SPDX-License-Identifier: Apache-2.0
"""Rendered scenes with classes, metric depth and instances, drawn from a seed."""
