# SPDX-License-Identifier: Apache-2.0
"""Task heads of the paper that transformers lacks."""
