# SPDX-License-Identifier: Apache-2.0
"""Fetch PEFT's own tests from its source distribution and stage them as a package."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "peft_upstream_tests"
# PEFT's conftest and these folders belong to PEFT's own checkout.
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "regression", "training", "conftest.py")


class UpstreamError(Exception):
    """PEFT's tests cannot be had; the text says what to do."""


def upstream_tests(version: str, cache: Path) -> Path:
    """Folder that holds PEFT's tests of exactly this version as the package `peft_upstream_tests`.

    The wheel has no tests, the source distribution has. Fetched once, then taken from `cache`.

    Raises:
        UpstreamError: pip cannot fetch it, or it holds no tests.
    """
    stage = cache / f"peft-{version}"
    if stage.is_dir():
        return stage
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"peft-{version}.tar.gz"
    if not archive.is_file():
        _download(version, cache)
    scratch = cache / f"peft-{version}.{os.getpid()}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        stage_archive(archive, version, scratch)
        scratch.rename(stage)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return stage


def _download(version: str, cache: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", f"peft=={version}", "--quiet"]
    command += ["--no-binary", "peft", "--no-deps", "--no-build-isolation", "--dest", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (cache / f"peft-{version}.tar.gz").is_file():
        raise UpstreamError(
            f"PEFT's tests come with its source distribution, and pip could not fetch that of "
            f"peft {version}. Make a package index reachable, or put peft-{version}.tar.gz into "
            f"{cache}. `{' '.join(command)}` said:\n{done.stderr.strip()}"
        )


def stage_archive(archive: Path, version: str, stage: Path) -> None:
    """Unpack the tests of a source distribution into `stage/peft_upstream_tests`."""
    unpacked = stage / "unpacked"
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(unpacked, filter="data")
    except tarfile.TarError as error:
        raise UpstreamError(f"{archive} is damaged ({error}). Delete it and run again.") from error
    tests = unpacked / f"peft-{version}" / "tests"
    if not (tests / "testing_common.py").is_file():
        raise UpstreamError(
            f"{archive} holds no tests/testing_common.py: PEFT moved its tests in {version}. "
            "Adapt tests/conformance/upstream.py."
        )
    package = stage / PACKAGE
    shutil.copytree(tests, package, ignore=LEFT_BEHIND)
    shutil.rmtree(unpacked)
    (package / "__init__.py").touch()
    common = package / "testing_common.py"
    common.write_text(without_diffusers(common.read_text("utf-8")), "utf-8")


def without_diffusers(source: str) -> str:
    """The source with a stand-in for the one class of diffusers that it names as a type."""
    if importlib.util.find_spec("diffusers"):
        return source
    stand_in = "StableDiffusionPipeline = type('StableDiffusionPipeline', (), {})"
    line = r"^from diffusers import StableDiffusionPipeline$"
    return re.sub(line, stand_in, source, flags=re.MULTILINE)
