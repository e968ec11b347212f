# SPDX-License-Identifier: Apache-2.0
"""Every Python block that a reader sees runs as it is printed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, PRELUDES, ROOT, blocks_of, name_of, prelude_of, run_page

WITH_PYTHON = [page for page in PAGES if blocks_of(page, "python")]
ALONE = ["README", "docs/index", "docs/quickstart"]  # a reader types them first: nothing is hidden


@pytest.mark.filterwarnings("default")  # a reader sees warnings, and goes on
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_a_page_runs_as_it_is_printed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # as in a clone
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        run_page(page, monkeypatch=monkeypatch, stack=stack)


def test_first_pages_hide_nothing_and_every_prelude_has_a_page() -> None:
    found = {path.name for path in PRELUDES.glob("*.py")}
    assert found <= {prelude_of(page).name for page in WITH_PYTHON if name_of(page) not in ALONE}


def test_a_block_that_is_wrong_is_found_on_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\na = 1\n```\n\ntext\n\n```python\nb = a + c\n```\n")
    with pytest.raises(NameError, match="'c'") as error:
        run_page_of(page)
    assert error.traceback[-1].lineno + 1 == 10
    assert Path(error.traceback[-1].path) == page


def run_page_of(page: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.docs.blocks.ROOT", page.parent)
        run_page(page)
