# SPDX-License-Identifier: Apache-2.0
"""ONNX files against PyTorch, and overwrites applied by a reader of their own."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from sfa_peft import SFAError
from sfa_peft.tasks import export_onnx, export_overwrites
from sfa_peft.tasks import onnx_export as export
from tests.task_folder import save_backbone, save_task

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings(  # torch's own
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
SIZE = (32, 32)
READER = Path(__file__).parents[2] / "examples" / "onnx_overwrites.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def backbone(root):
    return save_backbone(root)


@pytest.fixture(scope="module")
def models(root, backbone):
    return {
        "one": save_task(root / "one", backbone, rho=0),
        "two": save_task(root / "two", backbone, rho=0, seed=1),
        "both_parts": save_task(root / "both_parts", backbone),
    }


@pytest.fixture(scope="module")
def overwrites(root, models):
    """Overwrites of two tasks for one base file."""
    return {
        name: export_overwrites(
            root / name, root / "base.onnx", root / f"{name}.safetensors", size=SIZE
        )
        for name in ("one", "two")
    }


def run(data, images):
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": images.numpy()})
    return torch.from_numpy(found)


def pictures():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(8))


def wanted(model):
    with torch.no_grad():
        return model(pixel_values=pictures()).logits


def test_a_model_with_both_parts_is_one_file(root, models):
    report = export_onnx(root / "both_parts", root / "model.onnx", size=SIZE)
    assert report.outputs == ("logits",)
    assert report.difference < 1e-4
    assert report.nbytes == (root / "model.onnx").stat().st_size
    found = run((root / "model.onnx").read_bytes(), pictures())
    torch.testing.assert_close(found, wanted(models["both_parts"]), rtol=0, atol=1e-4)


def reader():
    spec = importlib.util.spec_from_file_location("onnx_overwrites", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_reader_in_plain_numpy_puts_a_task_into_the_base(name, root, models, overwrites):
    assert "sfa_peft" not in READER.read_text()
    before = (root / "base.onnx").read_bytes()
    reader().main(
        str(root / "base.onnx"), str(root / f"{name}.safetensors"), str(root / "out.onnx")
    )
    found = run((root / "out.onnx").read_bytes(), pictures())
    torch.testing.assert_close(found, wanted(models[name]), rtol=0, atol=1e-4)
    assert (root / "base.onnx").read_bytes() == before


def test_overwrites_are_the_selected_weights_and_the_head(root, models, overwrites):
    report, model = overwrites["one"], models["one"]
    selected = model.peft_config["default"].to_dict()["resolved"]["internal"]
    head = sum(p.numel() for p in model.get_base_model().decode_head.parameters())
    assert selected < report.overwritten <= selected + head
    assert report.nbytes < (root / "base.onnx").stat().st_size / 2


def test_overwrites_of_another_base_are_refused(root, overwrites):
    base = onnx.load(str(root / "base.onnx"))
    array = onnx.numpy_helper.to_array(base.graph.initializer[0])
    base.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(array + 1, base.graph.initializer[0].name)
    )
    with pytest.raises(SFAError, match="made for another base"):
        export.read_overwrites(root / "one.safetensors", base)
    onnx.save(base, str(root / "other.onnx"))
    with pytest.raises(SystemExit, match="made for another base"):
        reader().main(
            str(root / "other.onnx"), str(root / "one.safetensors"), str(root / "no.onnx")
        )


def test_a_base_of_another_graph_is_refused(root, overwrites):
    before, after = (onnx.load(str(root / "base.onnx")) for _ in range(2))
    assert export.find_overwrites(before, after, where="base.onnx") == {}
    del before.graph.node[-1]
    with pytest.raises(SFAError, match=r"base\.onnx: another graph"):
        export.find_overwrites(before, after, where="base.onnx")


def test_external_adapters_are_no_overwrites(root, models, tmp_path):
    with pytest.raises(SFAError, match=r"rho=0 are overwrites; export the whole model"):
        export_overwrites(
            root / "both_parts", tmp_path / "base.onnx", tmp_path / "o.safetensors", size=SIZE
        )
    assert list(tmp_path.iterdir()) == []


def test_without_the_packages_one_error_says_how_to_get_them(root, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SFAError, match=r"onnxruntime.* pip install 'sfa-peft\[onnx\]'"):
        export_onnx(root / "one", tmp_path / "m.onnx", size=SIZE)


def test_numbers_that_compare_equal_but_are_stored_otherwise_are_overwritten():
    def model(values):
        array = np.array(values, np.float32)
        tensor = onnx.numpy_helper.from_array(array, "w")
        graph = onnx.helper.make_graph([], "g", [], [], [tensor])
        return onnx.helper.make_model(graph)

    before, after = model([0.0, 1.0, 2.0]), model([-0.0, 1.0, np.nan])
    found = export.find_overwrites(before, after, where="here")
    positions, values = found["w"]
    assert positions.tolist() == [0, 2]
    export.apply_overwrites(before, found)
    assert export.find_overwrites(before, after, where="here") == {}
    assert np.signbit(values[0])
