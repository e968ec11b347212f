# SPDX-License-Identifier: Apache-2.0
"""Each command as it is typed, in this process, and once in one of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sfa_peft
from sfa_peft import SFAConfig
from sfa_peft.cli import commands, main
from sfa_peft.dense import predict
from sfa_peft.tasks import ExportReport, diff, inspect, overlaps, plan_training
from tests.processes import run_code
from tests.task_folder import describe, plain_model, save_backbone, save_task


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A backbone and two tasks."""
    root = tmp_path_factory.mktemp("tasks")
    backbone = save_backbone(root)
    save_task(root / "a", backbone, rho=0)
    save_task(root / "b", backbone, seed=1)
    return root


@pytest.fixture
def run(capsys):
    """Run a command line; return its status, what it printed, and its error."""

    def run(*words):
        capsys.readouterr()  # of what the test itself did
        status = main([str(word) for word in words])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def answer(run):
    """Run a command line that must succeed, and return its json."""

    def answer(*words):
        status, out, error = run(*words, "--json")
        assert (status, error) == (0, "")
        return json.loads(out)

    return answer


def test_inspect(root, run, answer):
    report = inspect(root / "b")
    assert answer("inspect", root / "b") == json.loads(json.dumps(report.to_dict()))
    assert run("inspect", root / "b") == (0, f"{report}\n", "")


def test_diff(root, run, answer):
    report = diff(root / "a", root / "b")
    assert answer("diff", root / "a", root / "b") == json.loads(json.dumps(report.to_dict()))
    assert "hold the same" in run("diff", root / "a", root / "a")[1]


def test_plot(root, answer, tmp_path):
    found = answer("plot", root / "a", root / "b", "-o", tmp_path / "o.png")
    ((pair, share),) = overlaps([root / "a", root / "b"]).items()
    assert found["overlaps"] == [{"first": pair[0], "second": pair[1], "share": share}]
    with Image.open(tmp_path / "o.png") as picture:
        assert min(picture.size) > 100


def test_verify(root, run, answer, tmp_path):
    assert answer("verify", root / "a")["unknown"] == 0
    other = plain_model(root / "backbone").backbone
    torch.nn.init.normal_(other.encoder.layers[0].blocks[0].intermediate.dense.weight)
    other.save_pretrained(tmp_path)
    status, out, error = run("verify", root / "a", "--base", tmp_path)
    assert (status, out) == (1, "")
    assert error.count("\n") == 1
    assert "trained on other pretrained weights" in error


def test_budget(root, answer, run):
    folder = str(root / "backbone")
    plan = plan_training(folder, SFAConfig(budget=0.1, rho=0), image_size=(64, 64), optimizer="sgd")
    options = ["--budget", 0.1, "--rho", 0, "--image_size", 64, "--optimizer", "sgd"]
    assert answer("budget", folder, *options) == json.loads(json.dumps(plan.to_dict()))
    assert "smallest budget" in run("budget", folder, "--budget", 1e-6)[2]


def test_predict(root, answer, tmp_path):
    file = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file)
    found = answer("predict", root / "a", file, "-o", tmp_path / "out")
    assert [image["width"] for image in found["images"]] == [50]
    stored = np.asarray(Image.open(tmp_path / "out" / "photo.png"))
    assert np.array_equal(stored, predict(root / "a", file)[0])


def test_merge(root, run, answer, tmp_path):
    answer("merge", root / "a", "-o", tmp_path / "merged")
    pixels = Image.new("RGB", (32, 32))
    same = [predict(folder, pixels)[0] for folder in (root / "a", tmp_path / "merged")]
    assert np.array_equal(*same)
    assert "rho=0 can be merged" in run("merge", root / "b", "-o", tmp_path / "no")[2]


def test_convert(root, answer, tmp_path):
    found = answer("convert", root / "a", "-o", tmp_path / "small", "--values", "int8")
    assert inspect(tmp_path / "small").values == "int8"
    assert found["nbytes"] < (root / "a" / "adapter_model.safetensors").stat().st_size


def test_extract(root, answer, tmp_path):
    model = plain_model(root / "backbone")
    spec = describe(model, root / "backbone")
    with torch.no_grad():
        weight = model.backbone.encoder.layers[0].blocks[0].intermediate.dense.weight
        weight[3, 5] += 1.0
    model.save_pretrained(tmp_path / "full")
    spec.write(tmp_path / "full")
    found = answer(
        "extract", tmp_path / "full", "--base", root / "backbone", "-o", tmp_path / "adapter"
    )
    assert found["differing"] == 1
    assert found["kept"] == 1
    loaded = sfa_peft.load_task(tmp_path / "adapter")
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(loaded(pixel_values=pixels).logits, wanted)


@pytest.mark.parametrize("kind", ["onnx", "overwrites"])
def test_export(kind, root, answer, run, monkeypatch):
    seen = {}

    def write(*args, **options):
        seen[kind] = (args, options)
        return ExportReport("out", 1, ("logits",), 0.0)

    monkeypatch.setattr("sfa_peft.tasks.onnx_export.export_onnx", write)
    monkeypatch.setattr("sfa_peft.tasks.onnx_export.export_overwrites", write)
    folder = str(root / "a")
    files = {"onnx": ["--onnx", "m"], "overwrites": ["--overwrites", "o", "--base_onnx", "b"]}
    assert answer("export", folder, *files[kind], "--batch_size", 2)["outputs"] == ["logits"]
    wanted = {"onnx": (folder, "m"), "overwrites": (folder, "b", "o")}
    options = {"size": (32, 32), "batch_size": 2, "base": None}  # the size is the task's
    assert seen[kind] == (wanted[kind], options)
    answer("export", folder, *files[kind], "--size", 64, 96)
    assert seen[kind][1]["size"] == (64, 96)
    status, _, error = run("export", folder, "--overwrites", "o")
    assert (status, "--base_onnx" in error) == (1, True)


def test_an_installed_command_finds_the_scripts_of_the_clone_that_one_stands_in(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "a/b/c/d/e.py"))
    monkeypatch.chdir(tmp_path)
    status, _, error = run("train", "depth")
    assert (status, "examples/depth_estimation.py: no such script" in error) == (1, True)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "semantic_segmentation.py").touch()
    assert commands._scripts() == Path("examples")


def test_train(answer, run, root, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--max_steps", 2, "--per_device_train_batch_size", 2, "--max_eval_samples", 2]
    options += ["--backbone", root / "backbone", "--image_size", 32, "--output_dir", out]
    status = main([str(word) for word in ["train", "segmentation", *options, "--json"]])
    assert status == 0
    row = json.loads((out / "results.json").read_text())["row"]
    assert f'"trainable_share": {row["trainable_share"]}' in capsys.readouterr().out
    assert sfa_peft.load_task(out).task_spec.task == "semantic_segmentation"
    status, _, error = run("train", "segmentatoin")
    assert status == 1
    assert "did you mean segmentation?" in error
    status, _, error = run("train", "depth", "--scripts", tmp_path)
    assert "no such script" in error


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["inspct", "x"], 2, "unknown command inspct: did you mean inspect?"),
        (["plot", "x", "-o", "y", "--jsno"], 2, "unknown option --jsno: did you mean --json?"),
        (["convert", "x", "-o", "y", "--values", "int4"], 2, "invalid choice: 'int4'"),
        (["plot", "x"], 2, "required: -o/--out"),
        (["inspect", "no/such"], 1, "no adapter can be read there"),
        (["predict", "no/such", "x.png", "-o", "y"], 1, "no such folder, and not on the Hub"),
    ],
)
def test_an_error_is_one_line_and_a_status(words, status, message, run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, out, error = run(*words)
    assert (found, out) == (status, "")
    assert message in error
    assert error.startswith("sfa-peft")
    assert error.count("\n") == 1


def test_the_overview_is_shown_for_no_command(run):
    assert run() == run("--help") == run("help")
    assert run()[0] == 0


def test_as_a_program_of_its_own(root):
    code = "import sys; from sfa_peft.cli import main; sys.exit(main())"
    done = run_code(code, "inspect", root / "a", "--json")
    assert json.loads(done.stdout)["source"] == str(root / "a")
    script = 'sfa-peft = "sfa_peft.cli:main"'
    assert script in (Path(__file__).parents[2] / "pyproject.toml").read_text()
