# SPDX-License-Identifier: Apache-2.0
"""Results lie in files, and no run is made twice."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.tradeoff.store import Run, Store
from tests.benchmarks.tradeoff.made import result

ROOT = Path(__file__).parents[3]
RUN = Run("segmentation", "sfa/5pct", 4e-3, 6e-3, 0)

#: A program that works the plan off with results made by hand; argv: folder, jobs, what it does.
PROGRAM = """
import os, sys, time
from pathlib import Path
from benchmarks.tradeoff.runner import Runner
from benchmarks.tradeoff.store import Store
from tests.benchmarks.tradeoff.made import experiments, result

folder, jobs, deed = sys.argv[1:]

def execute(run, experiment):
    with open(Path(folder) / "log", "a") as log:
        log.write(f"{run.name}\\n")
    if deed == "die" and run.seed == 1:
        os._exit(9)
    if deed == "raise" and run.seed == 1:
        raise ValueError("a mistake")
    time.sleep(0.02)
    return result(run, 1 - abs(run.backbone_rate - 4e-3) - abs(run.head_rate - 6e-3))

runner = Runner(
    Store(Path(folder)), experiments("sfa/5pct", "lora/5pct"), execute,
    only=["segmentation"], jobs=int(jobs), budget_minutes=0 if deed == "no time" else None,
)
print(runner.work(), len(runner.failed))
"""


def start(folder: Path, jobs: int, deed: str = "work") -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(jobs), deed]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen) -> tuple[int, int]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    ended, failed = map(int, out.split())
    return ended, failed


def ran(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def test_what_is_written_is_read_again(tmp_path):
    store = Store(tmp_path)
    made = result(RUN, 0.5)
    store.write(RUN, made)
    assert store.read() == {RUN: made}
    assert Store(tmp_path).read() == {RUN: made}
    assert [p.name for p in tmp_path.rglob("*.*")] == ["sfa--5pct--b0.004-h0.006-s0.json"]


def test_a_file_cut_short_by_a_kill_is_never_seen(tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with contextlib.suppress(KeyboardInterrupt):
        store.write(RUN, result(RUN, 0.5))
    assert store.read() == {}


def test_of_two_who_want_a_run_one_gets_it(tmp_path):
    one, other = Store(tmp_path), Store(tmp_path)
    assert one.claim(RUN)
    assert not other.claim(RUN)
    one.give_up(RUN)
    assert other.claim(RUN)
    other.write(RUN, result(RUN, 0.5))
    other.give_up(RUN)
    assert not one.claim(RUN)
    assert not list(tmp_path.rglob("*.claim"))


def test_a_claim_ends_with_whoever_held_it(tmp_path):
    code = (
        "from pathlib import Path; from benchmarks.tradeoff.store import Run, Store; import sys; "
        f"assert Store(Path(sys.argv[1])).claim({RUN!r}); import os; os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert list(tmp_path.rglob("*.claim"))
    store = Store(tmp_path)
    assert store.claim(RUN)
    store.give_up(RUN)


def test_two_runners_together_make_each_run_once(tmp_path):
    processes = [start(tmp_path, 2), start(tmp_path, 2)]
    ended = [end(process) for process in processes]
    names = ran(tmp_path)
    assert len(names) == len(set(names)) == len(Store(tmp_path).read())
    assert sum(count for count, _ in ended) == len(names)


def test_a_runner_goes_on_where_another_ended(tmp_path):
    end(start(tmp_path, 2))
    names = ran(tmp_path)
    lost = sorted(tmp_path.glob("*/*-s1.json"))
    for path in lost:
        path.unlink()
    assert end(start(tmp_path, 1)) == (len(lost), 0)
    assert sorted(ran(tmp_path)[len(names) :]) == [path.stem for path in lost]
    assert end(start(tmp_path, 1)) == (0, 0)


def test_runs_that_die_leave_no_result_and_do_not_stop_the_others(tmp_path):
    for deed in ("die", "raise"):
        folder = tmp_path / deed
        folder.mkdir()
        _, failed = end(start(folder, 2, deed))
        assert failed == 2  # seed 1 of both
        names = ran(folder)
        assert len(names) == len(set(names))
        assert {run.seed for run in Store(folder).read()} == {0, 2}
        assert not list(folder.rglob("*.claim"))
        assert end(start(folder, 1)) == (2, 0)  # the next runner tries them again


def test_no_run_begins_that_would_end_too_late(tmp_path):
    assert end(start(tmp_path, 1, "no time")) == (0, 0)
    assert not (tmp_path / "log").exists()


def test_a_result_is_one_line_of_json(tmp_path):
    store = Store(tmp_path)
    store.write(RUN, result(RUN, 0.5))
    text = store.path(RUN).read_text()
    assert text.count("\n") == 1
    assert json.loads(text)["run_info"]["experiment_name"] == "sfa/5pct"
