# SPDX-License-Identifier: Apache-2.0
"""What the example scripts share: arguments, methods to compare, the Trainer, and reports."""
