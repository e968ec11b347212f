# SPDX-License-Identifier: Apache-2.0
"""The fuzzer finds nothing in a few seconds, and would find what it looks for."""

import sys

import pytest

from tests import fuzz_reader
from tests.fuzz_reader import Target, fuzz, is_accepted
from tests.processes import run_module

if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)


def target(check):
    return Target(lambda rng: b"input", check, KeyError)


def test_the_readers_stand_a_few_seconds():
    run = run_module("tests.fuzz_reader", "--seconds", 3, "--seed", 7)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "none broke a reader" in run.stdout


def test_the_readers_error_counts_as_refused_and_any_other_breaks_it(capsys):
    def refuse(_data):
        raise KeyError

    def fail(_data):
        raise RuntimeError("not whole")

    assert is_accepted(target(lambda data: None), b"")
    assert not is_accepted(target(refuse), b"")
    assert fuzz({"good": target(refuse)}, 0.1, 0) == 0
    assert fuzz({"bad": target(fail)}, 5, 0) == 1
    assert "bad: RuntimeError: not whole\n696e707574" in capsys.readouterr().out


def test_a_reader_that_takes_too_long_or_too_much_breaks_it(monkeypatch):
    def loop(_data):
        while True:
            pass

    monkeypatch.setattr(fuzz_reader, "SECONDS", 0.1)
    with pytest.raises(TimeoutError):
        is_accepted(target(loop), b"")
    monkeypatch.setattr(fuzz_reader, "SECONDS", 10)
    with pytest.raises(MemoryError):
        is_accepted(target(lambda data: bytearray(b"x" * (250 << 20))), b"")
    assert is_accepted(target(lambda data: bytearray(b"x" * (50 << 20))), b"")
