# SPDX-License-Identifier: Apache-2.0
"""The metrics of this package as ``evaluate.Metric``, for programs that speak ``evaluate``.

Each module holds one class, which works offline: make it directly or give the path of its file to
``evaluate.load``. Nothing else in the package imports ``evaluate``.
"""
