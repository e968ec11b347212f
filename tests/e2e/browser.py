# SPDX-License-Identifier: Apache-2.0
"""Find a headless Chromium, or install one (`python -m tests.e2e.browser`, part of `make e2e`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NAMES = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
DEBIAN_PACKAGE = "chromium-headless-shell"


def find() -> str | None:
    """Return the browser to use: $CHROMIUM, one on the path, or the one Playwright keeps."""
    if named := os.environ.get("CHROMIUM"):
        return named
    if installed := next(filter(None, map(shutil.which, NAMES)), None):
        return installed
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        shells = own.parents[2].glob("chromium_headless_shell-*/*/*headless*shell")
    return next((str(p) for p in [own, *shells] if p.is_file()), None)


def install() -> None:
    """Let Playwright download its browser; where that cannot be reached, ask Debian as root."""
    commands = [[sys.executable, "-m", "playwright", "install", "chromium", "--only-shell"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        commands.append(["apt-get", "update", "-qq"])
        commands.append(["apt-get", "install", "-qq", "--no-install-recommends", DEBIAN_PACKAGE])
    for command in commands:
        print("+", " ".join(command), flush=True)
        subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
        if find():
            return


def main() -> None:
    """Say which browser will be used, after installing one if there is none."""
    if find() is None:
        install()
    browser = find()
    if browser is None:
        raise SystemExit(
            "No Chromium was found and none could be installed. Install one (Debian: apt-get "
            f"install {DEBIAN_PACKAGE}), or give its path: CHROMIUM=/path/to/chromium make e2e"
        )
    print(f"browser: {browser}")


if __name__ == "__main__":
    main()
