# SPDX-License-Identifier: Apache-2.0
"""Forked processes do what fresh ones do, and know as little of the package."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessRaisedException

from tests.processes import run_code, run_module, run_ranks, run_script_on_ranks

CODES = {
    "prints its arguments": "import sys; print(sys.argv, __name__, sys.path[0])",
    "is imported as __main__": "class A: pass\nimport pickle; print(pickle.loads(pickle.dumps(A)))",
    "exits": "import sys; sys.stdout.write('half'); sys.exit(3)",
    "fails": "raise KeyError('absent')",
    "is killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "sees the environment": "import os; print(os.environ['SEEN'], os.getcwd())",
}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_code_runs_as_by_an_interpreter_of_its_own(code, tmp_path, monkeypatch):
    monkeypatch.setenv("SEEN", "by children")
    found = run_code(code, "a", 1, cwd=tmp_path)
    command = [sys.executable, "-c", code, "a", "1"]
    alone = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (alone.returncode, alone.stdout)
    assert found.stderr.splitlines()[-1:] == alone.stderr.splitlines()[-1:]


def test_nothing_of_ours_is_imported_before_a_program_imports_it():
    code = "import sys; print(*sorted(m for m in sys.modules if m.startswith('sfa_peft')))"
    assert run_code(code).stdout == "\n"
    assert "sfa_peft.tuner.layer" in run_code(f"import sfa_peft; {code}").stdout.split()


def test_a_module_and_a_script_on_ranks_get_their_arguments_and_places(tmp_path):
    path = tmp_path / "its_own.py"
    path.write_text("import os, sys; print(sys.argv[1:], __name__, os.environ.get('RANK'))")
    assert run_module("its_own", "a", cwd=tmp_path).stdout == "['a'] __main__ None\n"
    ranks = run_script_on_ranks(path, "b")
    assert [rank.stdout for rank in ranks] == [f"['b'] __main__ {i}\n" for i in range(2)]


def _write_rank(rank: int, folder: Path) -> None:
    (folder / str(rank)).mkdir()
    if rank == 1:
        raise KeyError("on the second")


def test_a_rank_that_fails_fails_the_run(tmp_path):
    with pytest.raises(ProcessRaisedException, match="KeyError: 'on the second'"):
        run_ranks(_write_rank, tmp_path)
    assert (tmp_path / "1").is_dir()
