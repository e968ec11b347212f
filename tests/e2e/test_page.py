# SPDX-License-Identifier: Apache-2.0
"""The page of `serve_tasks.py` in a real browser, against the server as a user starts it.

Run by `make e2e`, not by `make test`. Screenshots go to out/e2e.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright", reason="needs the extra `e2e`; run `make e2e`")

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.browser import find

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "out" / "e2e"
PATIENCE_MS = 30_000


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the example with no adapters, as the first line of its text says; return its address.

    That trains both tasks, which the example promises to do in a minute on two cores.
    """
    out = tmp_path_factory.mktemp("serve")
    command = [sys.executable, "-u", "examples/serve_tasks.py", "--port", "0"]
    command += ["--output_dir", str(out), "--max_upload_mb", "1"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    lines: list[str] = []
    drain = None
    watchdog = threading.Timer(600, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if match := re.search(r"running on (http://\S+)", line):
                break
        else:
            pytest.fail("the server ended:\n" + "".join(lines[-40:]))
        drain = threading.Thread(target=process.stdout.read, daemon=True)
        drain.start()
        yield match[1]
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(20)
        if drain is not None:
            drain.join(20)
        process.stdout.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = find()
    if path is None:
        pytest.fail("no Chromium; `make e2e` installs one")
    with sync_playwright() as playwright:
        # A browser started by root, as in a container, has no sandbox.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, server: str) -> Iterator[Page]:
    """Open the page; fail on whatever the browser complains about, or asks for elsewhere."""
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    page.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on(
        "request",
        lambda r: (
            None if r.url.startswith((server, "data:", "blob:")) else complaints.append(r.url)
        ),
    )
    page.goto(server)
    yield page
    # The browser itself reports requests that fail, which some tests make on purpose.
    assert not [c for c in complaints if not c.startswith("Failed to load resource")]
    page.close()


def check_results(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Done, at", timeout=PATIENCE_MS)
    for name in ("input", "segmentation", "depth"):
        image = page.locator(f"#{name}")
        expect(image).to_be_visible()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    for name in ("segmentation", "depth"):
        times = page.locator(f"#{name}-times").inner_text()
        assert re.fullmatch(r"switch \d+\.\d ms, forward \d+\.\d ms", times)


def test_a_rendered_scene_is_shown_with_both_results(page):
    expect(page.locator("#memory")).to_contain_text(re.compile(r"backbone 11\.\d MB.*depth"))
    expect(page.locator("#results")).to_be_hidden()
    page.get_by_role("button", name="take a rendered scene").click()
    check_results(page)
    legend = page.locator("#segmentation-legend li")
    assert legend.count() >= 2
    assert page.locator("#depth-legend li").count() == 5
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "scene.png", full_page=True)


def test_the_trained_tasks_find_sky_and_ground(page):
    page.get_by_role("button", name="take a rendered scene").click()
    check_results(page)
    names = page.locator("#segmentation-legend").inner_text()
    assert "sky" in names
    assert "ground" in names


def test_an_upload_keeps_its_shape(page, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (10, 20, 3), dtype=np.uint8)
    Image.fromarray(array).resize((400, 200)).save(tmp_path / "wide.jpg")
    page.locator("#file").set_input_files(tmp_path / "wide.jpg")
    check_results(page)
    expect(page.locator("#status")).to_have_text("Done, at 128 x 64 pixels.")
    assert page.locator("#input").evaluate("image => image.naturalWidth") == 400


def test_what_is_no_picture_shows_an_error_and_a_picture_after_it_clears_that(page, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    page.locator("#file").set_input_files(tmp_path / "text.png")
    status = page.locator("#status.error")
    expect(status).to_contain_text("Error 415: not a picture of a known kind")
    page.get_by_role("button", name="take a rendered scene").click()
    check_results(page)
    expect(page.locator("#status.error")).to_have_count(0)


def test_a_file_that_is_too_large_is_refused_before_it_is_sent(page, tmp_path):
    expect(page.locator("#memory")).to_contain_text("In memory")
    (tmp_path / "large.png").write_bytes(bytes(1_500_000))
    page.locator("#file").set_input_files(tmp_path / "large.png")
    expect(page.locator("#status.error")).to_have_text(
        "The picture is too large: 1.5 MB of at most 1 MB."
    )


def test_a_server_that_is_gone_is_said(page):
    page.route("**/predict", lambda route: route.abort())
    page.get_by_role("button", name="take a rendered scene").click()
    expect(page.locator("#status.error")).to_contain_text("The server cannot be reached")
