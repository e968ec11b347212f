# SPDX-License-Identifier: Apache-2.0
"""Outputs and labels of Mask2Former as Trainer hands them over, up to the reported mask AP."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfa_peft.dense.inference_instances import instances_from_queries
from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.dense.metrics.mask_queries import mask_query_outputs, mask_query_results
from sfa_peft.errors import SFAError
from tests.head_zoo import HEADS

pytest.importorskip("faster_coco_eval")


def metric(names: Any) -> CocoMetrics:
    return CocoMetrics(names, iou_types=("segm",), convert=mask_query_results())


def test_queries_are_found_among_the_outputs() -> None:
    classes, masks = torch.zeros(2, 5, 3), torch.zeros(2, 5, 8, 8)
    found = mask_query_outputs((classes, masks, [{}], torch.zeros(2, 5, 8, 8)), None)

    assert found[0] is classes
    assert found[1] is masks
    with pytest.raises(SFAError, match="is this a MaskFormer"):
        mask_query_outputs((torch.zeros(2, 3, 8, 8), torch.zeros(2, 3)), None)


def test_perfect_overlapping_masks_score_one_at_their_own_size() -> None:
    masks = torch.zeros(1, 2, 8, 12)
    masks[0, 0, :, :8] = masks[0, 1, 2:6, 4:] = 1
    classes = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])
    inputs = {
        "class_labels": [torch.tensor([0, 1])],
        "mask_labels": [masks[0].repeat_interleave(4, 1).repeat_interleave(4, 2)],
    }
    prediction = SimpleNamespace(predictions=(classes, masks * 40 - 20), inputs=inputs)

    assert metric(("a", "b"))(prediction)["segm_map_75"] == pytest.approx(1.0)

    inputs["class_labels"] = inputs["class_labels"] * 2
    with pytest.raises(SFAError, match="outputs of 1 images, labels of 2"):
        metric(("a", "b"))(prediction)
    with pytest.raises(SFAError, match=r"include_for_metrics=\['inputs'\]"):
        metric(("a", "b"))(SimpleNamespace(predictions=prediction.predictions, inputs=None))


def test_padding_of_the_batch_is_not_counted() -> None:
    inside = torch.zeros(2, 12, 16, dtype=torch.int64)
    inside[0, :8, :10] = inside[1] = 1
    # Logits are as large as the input and beyond the image say what is not there.
    masks = torch.full((2, 1, 12, 16), -20.0)
    masks[0, 0, :4, :4] = masks[1, 0, 3:9, 5:12] = 20
    masks[0, 0, 8:] = 20
    classes = torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]]])
    truth = (masks > 0).float()
    truth[0, 0, 8:] = 0
    inputs = {
        "class_labels": [torch.tensor([0])] * 2,
        "mask_labels": [truth[0], truth[1]],
        "pixel_mask": inside,
    }

    found, true = mask_query_results()(SimpleNamespace(predictions=(classes, masks), inputs=inputs))

    assert [one["masks"][0]["size"] for one in found] == [[8, 10], [12, 16]]
    assert [tuple(one["masks"].shape) for one in true] == [(1, 8, 10), (1, 12, 16)]
    prediction = SimpleNamespace(predictions=(classes, masks), inputs=inputs)
    assert metric(("a",))(prediction)["segm_map"] == pytest.approx(1.0)


def test_trainer_reports_what_a_loop_over_the_set_gives(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = HEADS["mask2former"][1]().eval()
    names = [str(i) for i in range(model.config.num_labels)]
    generator = torch.Generator().manual_seed(0)
    data = []
    for count in (2, 1, 3):
        pixels = torch.randn(1, 3, 64, 64, generator=generator)
        with torch.no_grad():
            outputs = model(pixels)
        # Ground truth is what the model finds, so that the AP is neither 0 nor nan.
        found = instances_from_queries(
            outputs.class_queries_logits, outputs.masks_queries_logits, [(64, 64)], top=count
        )[0]
        masks = torch.from_numpy(found["masks"]).float()
        labels = torch.from_numpy(found["labels"])
        data.append({"pixel_values": pixels[0], "mask_labels": masks, "class_labels": labels})

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
        batch["pixel_values"] = torch.stack(batch["pixel_values"])
        return batch

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=2,
            batch_eval_metrics=True,
            include_for_metrics=["inputs"],
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        eval_dataset=data,  # type: ignore[arg-type]
        data_collator=collate,
        compute_metrics=metric(names),
        preprocess_logits_for_metrics=mask_query_outputs,
    )

    reported = trainer.evaluate()

    direct = metric(names)
    for last, item in zip((False, False, True), data, strict=True):
        with torch.no_grad():
            outputs = model(item["pixel_values"][None])
        prediction = SimpleNamespace(
            predictions=(outputs.class_queries_logits, outputs.masks_queries_logits),
            inputs=collate([item]),
        )
        expected = direct(prediction, compute_result=last)
    assert reported["eval_images"] == 3
    np.testing.assert_allclose(reported["eval_segm_map"], expected["segm_map"], atol=1e-6)
    assert 0 < reported["eval_segm_map"] <= 1
