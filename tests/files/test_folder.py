# SPDX-License-Identifier: Apache-2.0
import json
import os
import platform
import time

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfa_peft import AdapterFileError
from sfa_peft.files import folder as files
from sfa_peft.files.folder import (
    CHECKSUM,
    WEIGHTS_NAME,
    check_complete,
    check_selection,
    read_adapter,
    replacing,
    write_tensors,
)
from tests.files.golden import LISTED, PACKED
from tests.processes import run_code


def test_a_whole_file_and_a_folder_without_one_pass(tmp_path):
    check_complete(tmp_path)
    save_file({"a": torch.arange(5), "b": torch.zeros(0)}, tmp_path / WEIGHTS_NAME)
    check_complete(tmp_path)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = tmp_path / WEIGHTS_NAME
    save_file({"a": torch.arange(5)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterFileError, match=WEIGHTS_NAME):
            check_complete(tmp_path)
    path.write_bytes(whole + b"x")
    with pytest.raises(AdapterFileError, match="cut short or damaged"):
        check_complete(tmp_path)


@given(data=st.binary(max_size=200), header=st.booleans())
def test_hostile_bytes_give_the_one_clear_error(tmp_path_factory, data, header):
    folder = tmp_path_factory.mktemp("hostile")
    start = len(data).to_bytes(8, "little") if header else b""
    (folder / WEIGHTS_NAME).write_bytes(start + data)
    assume(not (header and data.startswith(b"{")))  # might be a file without tensors
    with pytest.raises(AdapterFileError, match="cut short or damaged"):
        check_complete(folder)


@pytest.mark.parametrize(
    "header", [[], {"a": 1}, {"a": {}}, {"a": {"data_offsets": [0]}}, {"a": {"data_offsets": "xy"}}]
)
def test_a_header_of_another_shape_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS_NAME).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(AdapterFileError):
        check_complete(tmp_path)


STORED = {"a.sfa_packed": PACKED, "a.sfa_up.weight": torch.randn(3, 2)}


def test_one_pass_finds_tensors_metadata_and_the_parsed_selection(tmp_path, monkeypatch):
    write_tensors(STORED, tmp_path / WEIGHTS_NAME, {"format": "pt"})
    counts = dict.fromkeys(("safe_open", "checksum", "read_packed"), 0)

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        monkeypatch.setattr(files, name, counted(name, getattr(files, name)))

    found = read_adapter(tmp_path / WEIGHTS_NAME)

    assert counts == {"safe_open": 1, "checksum": 1, "read_packed": 1}
    assert found.path == tmp_path / WEIGHTS_NAME
    assert set(found.metadata) == {"format", CHECKSUM}
    assert found.tensors.keys() == STORED.keys()
    assert all(torch.equal(found.tensors[k], t) for k, t in STORED.items())
    assert found.selection.manifest == LISTED
    assert found.selection.where == f"{found.path}: a.sfa_packed"


def test_a_file_without_a_selection_and_one_with_two(tmp_path):
    write_tensors({"a.sfa_up.weight": torch.zeros(2)}, tmp_path / "one", {})
    assert read_adapter(tmp_path / "one").selection is None
    write_tensors({"a.sfa_packed": PACKED, "b.sfa_packed": PACKED.clone()}, tmp_path / "two", {})
    with pytest.raises(AdapterFileError, match=r"two: 2 selections .a\.sfa_packed, b\.sfa_packed."):
        read_adapter(tmp_path / "two")
    with pytest.raises(AdapterFileError, match="none: cut short or damaged"):
        read_adapter(tmp_path / "none")


@pytest.mark.parametrize("change", [{"a": torch.arange(5) + 1}, {"b": torch.arange(5)}])
def test_tensors_other_than_those_written_are_refused(tmp_path, change):
    path = tmp_path / WEIGHTS_NAME
    write_tensors({"a": torch.arange(5)}, path, {})
    metadata = dict(read_adapter(path).metadata)
    save_file(change, path, metadata)
    with pytest.raises(AdapterFileError, match=f"but {metadata[CHECKSUM]} was written"):
        read_adapter(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from sfa_peft.files.folder import replacing
with replacing(sys.argv[1]) as partial:
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_write_sweeps_what_killed_ones_left_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    run_code(KILLED, path)
    (left,) = tmp_path.iterdir()
    assert left.is_file()
    alive = tmp_path / f".file.{platform.node()}.{os.getppid()}.sfa-partial"
    elsewhere, old = tmp_path / ".file.host.1.sfa-partial", tmp_path / ".x.host.1.sfa-partial"
    foreign = tmp_path / ".file.partial"
    for other in (alive, elsewhere, old, foreign):
        other.touch()
    yesterday = time.time() - 25 * 60 * 60
    for other in (old, foreign):
        os.utime(other, (yesterday, yesterday))

    with replacing(tmp_path / "another") as partial:
        partial.touch()

    assert set(tmp_path.iterdir()) == {tmp_path / "another", alive, elsewhere, foreign}


@given(st.lists(st.integers(-3, 12), max_size=8))
def test_positions_pass_exactly_if_distinct_in_range_and_free_only_at_the_end(positions):
    slots, values = torch.tensor(positions, dtype=torch.int64), torch.zeros(len(positions))
    used = [p for p in positions if p >= 0]
    fine = (
        all(-1 <= p < 10 for p in positions)
        and len(set(used)) == len(used)
        and positions[: len(used)] == used
    )
    if fine:
        check_selection("x", slots, values, 10)
    else:
        with pytest.raises(AdapterFileError, match=r"^x: "):
            check_selection("x", slots, values, 10)
