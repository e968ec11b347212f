# SPDX-License-Identifier: Apache-2.0
"""The version, for those below the package itself; a checkout has one without being installed."""

from __future__ import annotations

from importlib.metadata import version

__version__ = "0.1.0"


def package_versions(*names: str) -> dict[str, str]:
    """Return the versions of this package, as imported, and of others, as installed."""
    return {"sfa-peft": __version__, **{name: version(name) for name in names}}
