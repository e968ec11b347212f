# SPDX-License-Identifier: Apache-2.0
"""A detector's outputs and labels as Trainer hands them over, up to the reported AP."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.dense.metrics.detr import detr_outputs, detr_results
from sfa_peft.errors import SFAError
from tests.head_zoo import HEADS
from tests.model_zoo import require

pytest.importorskip("faster_coco_eval")


def processor() -> Any:
    return require("RTDetrImageProcessor")()


def test_logits_and_boxes_are_found_among_the_outputs() -> None:
    logits, boxes = torch.zeros(2, 5, 3), torch.zeros(2, 5, 4)
    found = detr_outputs(({"loss_ce": 1}, logits, boxes, torch.zeros(2, 5, 4)), None)

    assert found[0] is logits
    assert found[1] is boxes
    with pytest.raises(SFAError, match="is this a detector"):
        detr_outputs((torch.zeros(2, 3, 8, 8), torch.zeros(2, 3)), None)


def test_a_perfect_detector_scores_one_whatever_the_shape_of_the_image() -> None:
    shares = torch.tensor([[[0.25, 0.5, 0.5, 0.25], [0.75, 0.5, 0.25, 1.0]]])
    logits = torch.full((1, 2, 3), -9.0)
    logits[0, 0, 2] = logits[0, 1, 0] = 5.0
    label = {
        "class_labels": torch.tensor([2, 0]),
        "boxes": shares[0],
        "orig_size": torch.tensor([40, 200]),
    }
    prediction = SimpleNamespace(predictions=(logits, shares), inputs={"labels": [label]})

    guess, truth = detr_results(processor(), threshold=0.5)(prediction)
    assert truth[0]["boxes"].tolist() == [[0, 15, 100, 25], [125, 0, 175, 40]]
    assert guess[0]["boxes"].tolist() == truth[0]["boxes"].tolist()
    metric = CocoMetrics(("a", "b", "c"), convert=detr_results(processor()))
    assert metric(prediction)["bbox_map"] == pytest.approx(1.0)

    prediction.inputs["labels"] = [label, label]
    with pytest.raises(SFAError, match="outputs of 1 images, labels of 2"):
        metric(prediction)
    prediction.inputs = {"labels": [label]}
    del label["orig_size"]
    with pytest.raises(SFAError, match="without 'orig_size'"):
        metric(prediction)


def test_trainer_reports_what_a_loop_over_the_set_gives(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = HEADS["rt_detr"][1]().eval()
    names = [str(i) for i in range(model.config.num_labels)]
    data = []
    for count in (2, 0, 2, 1, 3):
        pixels = torch.randn(1, 3, 64, 64, generator=generator)
        # Ground truth is what the model finds, so that the AP is neither 0 nor nan.
        with torch.no_grad():
            outputs = model(pixels)
        best = outputs.logits[0].max(-1).values.argsort(descending=True)[:count]
        labels = {
            "class_labels": outputs.logits[0, best].argmax(-1),
            "boxes": outputs.pred_boxes[0, best],
            "orig_size": torch.tensor([64, 64]),
        }
        data.append({"pixel_values": pixels[0], "labels": labels})

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([item["pixel_values"] for item in items])
        return {"pixel_values": pixels, "labels": [item["labels"] for item in items]}

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=3,
            batch_eval_metrics=True,
            include_for_metrics=["inputs"],
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        eval_dataset=data,  # type: ignore[arg-type]
        data_collator=collate,
        compute_metrics=CocoMetrics(names, convert=detr_results(processor())),
        preprocess_logits_for_metrics=detr_outputs,
    )

    reported = trainer.evaluate()

    direct = CocoMetrics(names, convert=detr_results(processor()))
    for last, item in zip((False,) * 4 + (True,), data, strict=True):
        with torch.no_grad():
            outputs = model(item["pixel_values"][None])
        prediction = SimpleNamespace(
            predictions=(outputs.logits, outputs.pred_boxes),
            inputs={"labels": [item["labels"]]},
        )
        expected = direct(prediction, compute_result=last)
    assert reported["eval_images"] == 5
    assert reported["eval_bbox_map"] == pytest.approx(expected["bbox_map"], abs=1e-6)
    assert 0 < reported["eval_bbox_map"] <= 1


def test_trainers_own_labels_are_refused_because_it_cuts_them() -> None:
    prediction = SimpleNamespace(predictions=(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)))
    prediction.label_ids = [{"class_labels": torch.zeros(0)}]

    with pytest.raises(SFAError, match=r"include_for_metrics=\['inputs'\]"):
        detr_results(processor())(prediction)
