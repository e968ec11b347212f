# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Swinv2Backbone

import sfa_peft
from sfa_peft.dense import NormedFeatures, Preprocessing, TaskSpec
from sfa_peft.dense.prediction.spec import spec_of
from sfa_peft.errors import SFAError
from tests.tiny import swinv2_config, upernet

COVER = Preprocessing("cover", (32, 32), size_divisor=2)


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(3)
    Swinv2Backbone(swinv2_config()).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def described(where, model=None, **changes):
    options = {
        "task": "semantic_segmentation",
        "backbone": "backbone",
        "source": where,
        "preprocessing": COVER,
        "class_names": ["sky", "road", "car"],
    }
    return TaskSpec.describe(model or upernet(), **(options | changes))


def test_what_is_written_is_read_again(backbone, tmp_path):
    spec = described(backbone)
    spec.write(tmp_path / "task", metrics={"mean_iou": 0.5, "iou_car": None})
    found = TaskSpec.read(tmp_path / "task")
    assert found.preprocessing == COVER
    assert found.class_names == ("sky", "road", "car")
    assert found.metrics == {"mean_iou": 0.5, "iou_car": None}
    assert found.config == spec.config
    assert set(found.versions) == {"sfa-peft", "peft", "transformers", "torch"}
    assert found.pretrained.beside == "../backbone"
    assert [path.name for path in (tmp_path / "task").iterdir()] == ["task.json"]


def test_a_checkout_that_is_not_installed_has_its_own_version(backbone, monkeypatch):
    def not_installed(name):
        if name == "sfa-peft":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("sfa_peft.version.version", not_installed)
    assert described(backbone).versions["sfa-peft"] == sfa_peft.__version__


def test_a_built_model_has_the_pretrained_weights_and_names_its_classes(backbone, tmp_path):
    described(backbone).write(tmp_path)
    before = torch.get_rng_state()
    model = TaskSpec.read(tmp_path).build(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = Swinv2Backbone.from_pretrained(backbone).state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in model.backbone.state_dict().items())
    assert not model.training
    assert model.config.id2label == {0: "sky", 1: "road", 2: "car"}


def test_norms_before_the_head_are_built_too(backbone, tmp_path):
    model = upernet()
    model.decode_head = NormedFeatures(model.decode_head, model.backbone.channels)
    described(backbone, model).write(tmp_path)
    built = TaskSpec.read(tmp_path).build(tmp_path)
    assert built.load_state_dict(model.state_dict(), strict=False) == ([], [])


def test_a_folder_that_moved_with_its_backbone_still_finds_it(backbone, tmp_path):
    described(backbone).write(tmp_path / "out" / "task")
    other = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "out", other / "out")
    shutil.move(backbone, other / "backbone")
    folder = other / "out" / "task"
    spec = TaskSpec.read(folder)
    spec.build(folder)
    with pytest.raises(SFAError, match=r"cannot be loaded .*backbone=\.\.\. \(--backbone\)"):
        spec.build(tmp_path)
    spec.build(tmp_path, source=str(other / "backbone"))


def test_a_model_that_is_pretrained_as_a_whole_is_loaded_as_a_whole(tmp_path):
    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1] * 4, "decoder_hidden_size": 8}
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, num_labels=3))
    model.save_pretrained(tmp_path / "base")
    described(tmp_path / "base", model, backbone="").write(tmp_path)
    built = TaskSpec.read(tmp_path).build(tmp_path)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in built.state_dict().items())


def test_a_folder_without_a_task_says_how_one_is_made(tmp_path):
    with pytest.raises(SFAError, match=r"task\.json: no such file.*TaskSpec\.describe"):
        TaskSpec.read(tmp_path)


def break_format(fields):
    fields["format"] = 2


def lose_model(fields):
    del fields["model"]


def add_field(fields):
    fields["code"] = "import os"


def change_task(fields):
    fields["task"] = "poetry"


def break_preprocessing(fields):
    fields["preprocessing"]["resize"] = 7


@pytest.mark.parametrize(
    "damage", [break_format, lose_model, add_field, change_task, break_preprocessing]
)
def test_a_damaged_file_is_one_error_with_its_name(damage, backbone, tmp_path):
    path = described(backbone).write(tmp_path)
    fields = json.loads(path.read_text())
    damage(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(SFAError, match=r"task\.json: cannot be read as a task"):
        TaskSpec.read(tmp_path)


@pytest.mark.parametrize("name", ["os", "Trainer", "AutoModel", "pipeline", "NoSuchModel"])
def test_no_class_but_models_of_transformers_and_this_package_is_looked_up(
    name, backbone, tmp_path
):
    path = described(backbone).write(tmp_path)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"model": name}))
    with pytest.raises(SFAError, match=f"model class '{name}'"):
        TaskSpec.read(tmp_path).build(tmp_path)


def test_a_model_of_an_own_class_is_not_described(backbone):
    class Own(type(upernet())):
        pass

    with pytest.raises(SFAError, match="model class 'Own'"):
        described(backbone, Own(upernet().config))


def test_a_model_that_does_not_know_its_task_says_so():
    with pytest.raises(SFAError, match=r"UperNet.* does not say what its task is"):
        spec_of(upernet())
