# SPDX-License-Identifier: Apache-2.0
"""From a saved task to predictions: what a folder says of it, pictures in, results out."""
