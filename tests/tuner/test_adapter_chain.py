# SPDX-License-Identifier: Apache-2.0
"""Earlier adapters are found in bounded time, counted in reads, whatever their folders say."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model

from sfa_peft import AdapterFileError, SFAConfig
from sfa_peft.files import adapter_config as record
from sfa_peft.tuner import adapter_chain as chain
from sfa_peft.tuner import load_adapter as reading
from sfa_peft.tuner.adapted_layers import find_pool
from sfa_peft.tuner.upstream import save_and_load as files
from tests.tiny import MLP

READS = 2  # of a config for each folder: its fields, and that its tensors are whole


class TooManyError(BaseException):
    """What no reader catches."""


@pytest.fixture
def at_most(monkeypatch):
    """Let configs be read so many times."""

    def limit(count: int) -> None:
        left, original = [count], files.read_config

        def counted(path):
            left[0] -= 1
            if left[0] < 0:
                raise TooManyError(count)
            return original(path)

        monkeypatch.setattr(files, "read_config", counted)

    return limit


def save(where, before=None, seed=0):
    config = SFAConfig(
        budget=0.2,
        rho=0,
        score="random",
        target_modules=["second"],
        seed=seed,
        continue_from=before,
    )
    model = get_peft_model(MLP(), config)
    with torch.no_grad():
        find_pool(model, "default").values.normal_(generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(where)


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text())
    data["resolved"] |= fields
    path.write_text(json.dumps(data))


def refused(folder, says):
    with pytest.raises(AdapterFileError, match=says) as caught:
        PeftModel.from_pretrained(MLP(), folder)
    assert len(str(caught.value)) < 1200


def test_a_long_chain_named_by_relative_paths_is_refused_with_one_cause_read_once(
    tmp_path, monkeypatch, at_most
):
    monkeypatch.chdir(tmp_path)
    save("t0")
    for i in range(1, 12):
        save(f"t{i}", before=f"t{i - 1}", seed=i)
    save("t0", seed=99)
    at_most(READS * 13)
    refused("t11", "needs it as it was then: .*t0: its selection .* is another now")


def test_copies_of_a_chain_that_name_one_another_are_each_read_once(tmp_path, at_most):
    depth = 11  # 22 folders
    save(tmp_path / "a" / "t0")
    for i in range(1, depth):
        save(tmp_path / "a" / f"t{i}", before=tmp_path / "a" / f"t{i - 1}", seed=i)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for one, other in ("ab", "ba"):
        for i in range(1, depth):
            folder = tmp_path / one / f"t{i}"
            chain = json.loads((folder / "adapter_config.json").read_text())["resolved"]["chain"]
            chain[-1]["source"] = f"../../{other}/t{i - 1}"
            edit(folder, chain=chain)
        save(tmp_path / one / "t0", seed=99)
    at_most(READS * (2 * depth + 1))
    refused(tmp_path / "a" / f"t{depth - 1}", r"another now\. .1 more at other places")


def test_folders_that_name_one_another_in_a_circle_are_left_at_once(tmp_path, at_most):
    names = [f"t{i}" for i in range(22)]
    save(tmp_path / "first")
    for name in names:
        shutil.copytree(tmp_path / "first", tmp_path / name)
    digest = chain.Search().read(str(tmp_path / "first")).digest
    for name, before in zip(names, names[1:] + names[:1], strict=True):
        links = [{"source": f"../{before}", "digest": digest}] * 3
        edit(tmp_path / name, format=4, chain=links)
    at_most(READS * 3)
    refused(tmp_path / "t0", "is another now")


def test_a_chain_as_long_as_may_be_is_followed_and_a_longer_one_refused(monkeypatch, tmp_path):
    count = record.LONGEST_CHAIN
    links = [record.Link(f"t{i}", f"{i}") for i in range(count)]

    def read(source):
        i = int(source[1:])
        return chain.SavedFiles(source, SFAConfig(), {}, f"{i}", tuple(links[:i]))

    monkeypatch.setattr(chain, "_read_files", read)
    found = chain.Search().earlier(links, None)
    assert [own.source for own in found] == [link.source for link in links]
    monkeypatch.undo()
    monkeypatch.setattr(reading, "LONGEST_CHAIN", 1)
    save(tmp_path / "one")
    save(tmp_path / "two", before=tmp_path / "one")
    with pytest.raises(AdapterFileError, match=r"1 are the most\. Merge it"):
        save(tmp_path / "three", before=tmp_path / "two")


@pytest.mark.parametrize("source", ["a" * 3000, "nul\0", "../" * 1500, ""])
def test_what_names_no_folder_is_one_error(source, tmp_path):
    save(tmp_path / "one")
    digest = chain.Search().read(str(tmp_path / "one")).digest
    edit(tmp_path / "one", format=4, chain=[{"source": source, "digest": digest}])
    with pytest.raises(AdapterFileError, match="needs it as it was then"):
        PeftModel.from_pretrained(MLP(), tmp_path / "one")
