# SPDX-License-Identifier: Apache-2.0
"""SFA's section in the card survives whatever else writes a card."""

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from sfa_peft import SFAConfig, set_card_metrics
from tests.tiny import upernet
from tests.training.trainer_runs import QUIET

OPTIONS = {"budget": 0.2, "score": "random", "rho": 0}


def model_with(kind, config):
    model = upernet()
    model.name_or_path = model.config._name_or_path = "someone/base"
    if kind == "PeftModel":
        return get_peft_model(model, config)
    model.add_adapter(config)
    return model


def trainer_of(model, folder):
    return Trainer(model, TrainingArguments(str(folder), **QUIET))


@pytest.mark.parametrize("kind", ["PeftModel", "attached"])
@pytest.mark.parametrize("saved", [False, True])
def test_the_trainers_card_has_the_section_too(kind, saved, tmp_path):
    model = model_with(kind, SFAConfig(**OPTIONS))
    trainer = trainer_of(model, tmp_path)
    set_card_metrics(model, {"mIoU": 0.5})
    for _ in range(2):
        if saved:
            trainer.save_model()
        trainer.create_model_card()
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model == "someone/base"
        assert card.text.count("import sfa_peft  # registers") == 1
        assert card.text.count("| mIoU | 0.5 |") == 1
        assert card.text.index("import sfa_peft") < card.text.index("## Model description")
        assert 'UperNetForSemanticSegmentation.from_pretrained("someone/base")' in card.text
        assert ("### Budget" in card.text) == saved


def test_cards_of_other_methods_are_transformers_own(tmp_path):
    config = LoraConfig(target_modules=["query"])
    trainer_of(model_with("attached", config), tmp_path).create_model_card()
    assert "sfa_peft" not in (tmp_path / "README.md").read_text()
