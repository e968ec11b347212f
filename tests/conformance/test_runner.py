# SPDX-License-Identifier: Apache-2.0
import io
import re
import tarfile
from pathlib import Path

import pytest

from tests.conformance import upstream
from tests.conformance.outcomes import (
    Outcomes,
    first_line,
    read_report,
    reasons,
    side_by_side,
    table,
)
from tests.conformance.run import environment, names, show
from tests.conformance.spec import SFA
from tests.versions import pins, verdict

REPORT = """<testsuites><testsuite>
<testcase name="a"/>
<testcase name="b[x]"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase name="c"><error message="boom"/></testcase>
<testcase name="d"><skipped type="pytest.skip" message="no bias"/></testcase>
<testcase name="e"><skipped type="pytest.skip" message="no bias"/></testcase>
<testcase name="f"><skipped type="pytest.xfail" message="a bug"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    return path


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_a_report_is_counted_with_its_reasons(report):
    found = read_report(report)
    assert dict(found.counts) == {"passed": 1, "failed": 2, "skipped": 2, "xfailed": 1}
    assert found.failures == [("b[x]", "assert 1 == 2"), ("c", "boom")]
    assert dict(found.reasons) == {("skipped", "no bias"): 2, ("xfailed", "a bug"): 1}
    assert not found.good


@pytest.mark.parametrize("text", [None, "<testsuites><testca"])
def test_a_missing_or_broken_report_is_a_failure(tmp_path, text):
    path = tmp_path / "report.xml"
    if text is not None:
        path.write_text(text)
    assert not read_report(path).good
    assert read_report(path).failures


def test_a_suite_without_cases_is_not_good_and_says_so():
    empty = Outcomes()
    assert not empty.good
    assert any("no case ran" in text for text in show({"custom": {"sfa": empty}}))


def test_the_table_has_both_methods_and_a_dash_where_one_did_not_run(report):
    text = side_by_side({"custom": {"sfa": read_report(report), "shira": Outcomes()}, "vision": {}})
    head, _, custom, vision = text.splitlines()
    cells = [cell.strip() for cell in custom.strip("|").split("|")]
    assert [cell.strip() for cell in head.strip("|").split("|")][:3] == [
        "suite",
        "sfa passed",
        "sfa failed",
    ]
    assert cells == ["custom", "1", "2", "2", "1", "0", "0", "0", "0"]
    assert vision.count(" - ") == 8


def test_every_skip_has_its_reason_in_the_report(report):
    text = reasons({"custom": {"sfa": read_report(report)}}, "sfa")
    assert text.splitlines() == ["custom: 2 skipped: no bias", "custom: 1 xfailed: a bug"]


def test_a_reason_names_the_model_and_not_its_folder():
    message = "Model /tmp/conformance-models-x3_/vit_cls has none\nmore"
    assert first_line(message) == "Model vit_cls has none"
    assert first_line(None) == first_line(" \n") == "no message"


def test_columns_line_up():
    lines = table(["name", "n"], [["long name", 1], ["x", 1000]]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_the_check_of_the_base_is_on_but_for_tests_that_the_page_names(monkeypatch):
    monkeypatch.setenv("SFA_CHECK_BASE", "0")
    assert "SFA_CHECK_BASE" not in environment("sfa", Path("anywhere"))
    page = Path(__file__).parents[2] / "docs" / "conformance.md"
    section = page.read_text("utf-8").partition("SFA_CHECK_BASE=0")[2].partition("\n## ")[0]
    assert re.findall(r"`(test_\w+)`", section) == list(SFA.onto_other_weights)


def test_an_unknown_suite_is_refused():
    with pytest.raises(Exception, match="'nothing' is none of custom, config"):
        names(("custom", "config"))("custom,nothing")


def test_peft_tests_are_staged_as_a_package(tmp_path):
    source = "from diffusers import StableDiffusionPipeline\nx = 1\n"
    files = {
        "peft-1.2/tests/testing_common.py": source,
        "peft-1.2/tests/conftest.py": "raise RuntimeError",
        "peft-1.2/src/peft/__init__.py": "",
    }
    tarball = archive(tmp_path / "peft-1.2.tar.gz", files)
    upstream.stage_archive(tarball, "1.2", tmp_path / "stage")
    package = tmp_path / "stage" / upstream.PACKAGE
    assert sorted(path.name for path in package.iterdir()) == ["__init__.py", "testing_common.py"]
    assert [path.name for path in (tmp_path / "stage").iterdir()] == [upstream.PACKAGE]


def test_diffusers_is_replaced_only_where_it_is_missing(monkeypatch):
    source = "from diffusers import StableDiffusionPipeline\n"
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None)
    assert "import" not in upstream.without_diffusers(source)
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: object())
    assert upstream.without_diffusers(source) == source


def test_an_archive_without_tests_or_damaged_says_what_to_do(tmp_path):
    empty = archive(tmp_path / "peft-1.2.tar.gz", {"peft-1.2/README.md": ""})
    with pytest.raises(upstream.UpstreamError, match="moved its tests"):
        upstream.stage_archive(empty, "1.2", tmp_path / "stage")
    empty.write_bytes(b"not an archive")
    with pytest.raises(upstream.UpstreamError, match="damaged"):
        upstream.stage_archive(empty, "1.2", tmp_path / "other")


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    class Refused:
        returncode, stderr = 1, "ERROR: no route to host"

    monkeypatch.setattr(upstream.subprocess, "run", lambda *args, **kwargs: Refused)
    with pytest.raises(upstream.UpstreamError, match=r"(?s)Make a package index.*no route"):
        upstream.upstream_tests("1.2", tmp_path / "cache")


def test_tests_in_the_cache_need_no_download(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream.subprocess, "run", None)
    (tmp_path / "peft-1.2").mkdir()
    assert upstream.upstream_tests("1.2", tmp_path) == tmp_path / "peft-1.2"


def test_pins_leave_out_what_follows_transformers():
    lines = "# Python 3.11\ntorch==2.13.0\nhuggingface_hub==2.4.0\nnumpy==2.4.6\n"
    assert list(pins(lines, same_python=True)) == ["torch==2.13.0", "numpy==2.4.6"]
    assert list(pins(lines, same_python=False)) == ["torch==2.13.0"]


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (0, "....\n12 passed, 1 skipped in 3s", "ok, 12 passed"),
        (0, "| custom |", "ok"),
        (1, "3 failed, 12 passed", "FAILED (1)"),
    ],
)
def test_an_exit_status_decides(status, text, expected):
    assert verdict(status, text) == expected
