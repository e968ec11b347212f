# SPDX-License-Identifier: Apache-2.0
"""What an installation has beside code. `make wheel-test` runs this on the built wheel."""

import sys
from importlib.metadata import files, requires, version
from pathlib import Path

import pytest

import sfa_peft

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(sfa_peft.__file__).resolve().parent
installed = pytest.mark.skipif(
    ROOT / "src" in PACKAGE.parents, reason="of the source tree; `make wheel-test` has a wheel"
)


def test_the_version_of_the_package_is_that_of_its_metadata():
    assert version("sfa-peft") == sfa_peft.__version__


def test_peft_has_an_upper_bound_because_its_insides_are_used():
    (line,) = [line for line in requires("sfa-peft") or [] if line.startswith("peft")]
    assert "<" in line
    assert ">=" in line


@installed
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else():
    source = ROOT / "src" / "sfa_peft"
    wanted = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    listed = [path for path in files("sfa-peft") or [] if path.suffix != ".pyc"]
    scripts = {path.name for path in listed if path.parts[0] == ".."}  # made by the installer
    assert scripts == {"sfa-peft"}
    found = {path.as_posix() for path in listed if path.parts[0] != ".."}
    kept = {path.removeprefix("sfa_peft/") for path in found if path.startswith("sfa_peft/")}
    assert kept == wanted
    assert "py.typed" in kept
    assert {path.split("/")[0] for path in found} <= {
        "sfa_peft",
        f"sfa_peft-{sfa_peft.__version__}.dist-info",
    }


@installed
def test_the_source_tree_is_not_on_the_path():
    assert str(ROOT / "src") not in sys.path
