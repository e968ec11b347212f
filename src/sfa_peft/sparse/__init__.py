# SPDX-License-Identifier: Apache-2.0
"""A sparse change of weights: positions, values, the weights that carry it, their gradients."""
