# SPDX-License-Identifier: Apache-2.0
"""The model card, and adapters that go to the Hub and come back (a stand-in on this machine)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from sfa_peft import SFAConfig, SFAError, budget_report, selection_summary, set_card_metrics
from tests.behaviour.hub import local_hub
from tests.tiny import MLP, upernet

ROOT = Path(__file__).parents[2]


def adapted():
    config = SFAConfig(budget=0.2, score="magnitude", modules_to_save=["decode_head"])
    return get_peft_model(upernet(), config)


def numbers(text: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?![\d.%])", text)]


def row(card: str, start: str) -> str:
    return next(line for line in card.splitlines() if line.startswith(f"| {start} |"))


def test_the_card_has_budget_shares_by_stage_and_how_to_load(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    report = budget_report(model)
    assert "Asked for: 0.2 of the backbone." in card
    assert numbers(row(card, "backbone"))[0] == report.backbone
    assert numbers(row(card, "external adapters"))[0] == report.external
    assert numbers(row(card, "selected weights"))[0] == report.selected > 0
    assert f"{report.share:.2%}" in row(card, "trained together")
    by_stage = {}
    for entry in selection_summary(model):
        stage = int(re.search(r"layers\.(\d)", entry["name"])[1])
        before = by_stage.get(stage, (0, 0))
        by_stage[stage] = before[0] + entry["selected"], before[1] + entry["numel"]
    assert len(by_stage) == 4
    for stage, (selected, numel) in by_stage.items():
        line = row(card, str(stage + 1))
        assert numbers(line)[1:3] == [selected, numel]
        assert f"{selected / numel:.2%}" in line
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert code.splitlines()[0].startswith("import sfa_peft")


def test_a_known_base_is_loaded_in_the_cards_code(tmp_path):
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "from transformers import UperNetForSemanticSegmentation\n" in card
    assert 'UperNetForSemanticSegmentation.from_pretrained("someone/base")' in card
    plain = get_peft_model(MLP(), SFAConfig(rho=0, score="random", target_modules=["first"]))
    plain.save_pretrained(tmp_path / "plain")
    assert "transformers import" not in (tmp_path / "plain" / "README.md").read_text()


def test_metrics_appear_once_and_saving_again_changes_nothing_else(tmp_path):
    model = adapted()
    set_card_metrics(model, {"mIoU (val)": 0.4521234567, "a|b": 3, "note": "3 seeds"})
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    first = card.read_text()
    assert "| mIoU (val) | 0.452123 |\n| a\\|b | 3 |\n| note | 3 seeds |" in first
    edited = first.replace("# Model Card for Model ID", "# Trees from above")
    card.write_text(edited + "\nWritten by hand.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    again = card.read_text()
    assert again.count("### Results") == first.count("### Results")
    assert again.count("import sfa_peft  #") == 1
    assert "# Trees from above" in again
    assert "Written by hand." in again
    assert ModelCard.load(card).data.library_name == "peft"
    set_card_metrics(model, {})
    model.save_pretrained(tmp_path)
    assert "mIoU" not in card.read_text()


def test_metrics_that_are_none_are_refused():
    model = adapted()
    with pytest.raises(SFAError, match=r"\.item\(\)"):
        set_card_metrics(model, {"loss": torch.ones(())})
    for wrong in (None, [("mIoU", 1)], {"mIoU": None}, {"mIoU": float("nan")}, {1: 0.5}):
        with pytest.raises(SFAError, match=r"set_card_metrics: expected .* by name"):
            set_card_metrics(model, wrong)
    with pytest.raises(SFAError, match="has no adapter `other`"):
        set_card_metrics(model, {"loss": 1.0}, "other")
    lora = get_peft_model(MLP(), LoraConfig(target_modules=["first"]))
    with pytest.raises(SFAError, match="has no adapter `default`; it has none"):
        set_card_metrics(lora, {"loss": 1.0})


def test_a_card_that_is_not_utf8_keeps_its_bytes(tmp_path):
    card = tmp_path / "README.md"
    card.write_bytes("# Café\n".encode("latin-1"))
    for _ in range(2):
        SFAConfig().save_pretrained(tmp_path)
    assert card.read_bytes().startswith(b"# Caf\xe9\n")
    assert card.read_bytes().count(b"import sfa_peft  # registers") == 1
    with pytest.raises(UnicodeDecodeError):  # PEFT reads the card first, before anything is written
        adapted().save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "adapter_config.json"}


def test_numbers_of_numpy_are_metrics(tmp_path):
    model = adapted()
    set_card_metrics(model, {"a": np.float32(0.5), "b": np.int64(1234567), "c": np.float64(1 / 3)})
    model.save_pretrained(tmp_path)
    assert "| a | 0.5 |\n| b | 1234567 |\n| c | 0.333333 |" in (tmp_path / "README.md").read_text()


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import sfa_peft
from huggingface_hub import HfApi
from peft import AutoPeftModel, PeftConfig, PeftModel
from sfa_peft import SFAConfig, set_card_metrics
from tests.tiny import images, upernet
from tests.behaviour.test_peft_expectations_hub import adapted

batch = images()["pixel_values"]
model = adapted().eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.add_(0.01)
set_card_metrics(model, {"mIoU": 0.5})
expected = model(batch).logits
model.push_to_hub("someone/pushed", token="t")
attached = upernet()
attached.add_adapter(SFAConfig(budget=0.2, score="random", modules_to_save=["decode_head"]))
set_card_metrics(attached, {"mIoU": 0.5})
attached.push_to_hub("someone/attached", token="t")
model.peft_config["default"].push_to_hub("someone/config", token="t")
model.save_pretrained(sys.argv[1])
HfApi(token="t").create_repo("someone/uploaded")
HfApi(token="t").upload_folder(repo_id="someone/uploaded", folder_path=sys.argv[1])
model.push_to_hub("someone/uploaded", token="t")  # keeps a card that is there
for name in ("someone/pushed", "someone/uploaded"):
    loaded = PeftModel.from_pretrained(upernet(), name).eval()
    assert torch.equal(loaded(batch).logits, expected), name
assert isinstance(PeftConfig.from_pretrained("someone/pushed"), SFAConfig)
again = SFAConfig(selection_from="someone/uploaded", modules_to_save=["decode_head"])
from peft import get_peft_model
assert get_peft_model(upernet(), again).base_model is not None
try:
    PeftModel.from_pretrained(upernet(), "someone/absent")
except Exception as error:
    print("absent:", type(error).__name__)
print("came back")
"""


def test_an_adapter_goes_to_the_hub_and_comes_back_by_its_id(tmp_path):
    with local_hub() as (address, repositories):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)]),
        }
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "adapter")],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=300,
        )
        assert "came back" in result.stdout, result.stderr
        assert "absent:" in result.stdout
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert files <= set(repositories["someone/pushed"])
    for name in ("someone/pushed", "someone/uploaded", "someone/attached", "someone/config"):
        card = repositories[name]["README.md"].decode()
        assert card.count("import sfa_peft  # registers") == 1
        assert "| mIoU | 0.5 |" in card
