# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import RTDetrImageProcessor

from sfa_peft.dense import Preprocessing
from sfa_peft.dense.prediction.processors import (
    DetectionProcessor,
    InstanceProcessor,
    SemanticProcessor,
)
from sfa_peft.errors import SFAError


def test_pictures_of_two_sizes_are_no_batch():
    processor = SemanticProcessor(Preprocessing("keep"))
    with pytest.raises(SFAError, match=r"\[\(4, 4\), \(4, 5\)\]"):
        processor([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])
    with pytest.raises(SFAError, match="expected 'pt'"):
        processor(Image.new("RGB", (4, 4)), return_tensors="np")


def queries():
    """Two masks on 4 x 4 that overlap in the second column; the second is surer."""
    logits = torch.full((1, 2, 4, 4), -20.0)
    logits[0, 0, :, :2] = 20.0
    logits[0, 1, :, 1:3] = 20.0
    classes = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 4.0, 0.0]]])
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=logits)


def test_where_masks_overlap_the_segment_is_the_surest():
    processor = InstanceProcessor(Preprocessing("stretch", (4, 4)))
    (found,) = processor.post_process_instance_segmentation(queries(), 0.5, [(4, 4)])
    assert found["segmentation"].tolist() == [[2, 1, 1, 0]] * 4
    assert [(s["id"], s["label_id"]) for s in found["segments_info"]] == [(1, 1), (2, 0)]
    (objects,) = processor.results(queries(), [(4, 4)], 0.5)
    assert objects["boxes"].tolist() == [[1, 0, 3, 4], [0, 0, 2, 4]]
    scores = torch.tensor([[0.0, 4.0, 0.0], [2.0, 0.0, 0.0]]).softmax(-1).max(-1).values
    np.testing.assert_allclose(objects["scores"], scores.numpy(), atol=1e-5)


def test_boxes_of_an_r_cnn_are_brought_to_the_pictures_size():
    outputs = SimpleNamespace(
        boxes=[torch.tensor([[0.0, 0, 8, 16], [4, 4, 8, 8]])],
        scores=[torch.tensor([0.9, 0.3])],
        classes=[torch.tensor([2, 0])],
        masks=None,
        sizes=[(16, 16)],
    )
    processor = DetectionProcessor(Preprocessing("stretch", (16, 16)))
    (found,) = processor.post_process_object_detection(outputs, 0.5, [(32, 64)])
    assert found["boxes"].tolist() == [[0, 0, 32, 32]]
    assert found["labels"].tolist() == [2]
    (all_of_them,) = processor.results(outputs, [(32, 64)], 0.0)
    assert all_of_them["boxes"].tolist() == [[0, 0, 32, 32], [16, 8, 32, 16]]
    np.testing.assert_allclose(all_of_them["scores"], [0.9, 0.3], rtol=1e-6)


def test_boxes_of_queries_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    outputs = SimpleNamespace(
        logits=torch.randn(2, 7, 3, generator=generator),
        pred_boxes=torch.rand(2, 7, 4, generator=generator),
    )
    sizes = [(20, 30), (64, 48)]
    processor = DetectionProcessor(Preprocessing("stretch", (16, 16)))
    found = processor.post_process_object_detection(outputs, 0.7, sizes)
    theirs = RTDetrImageProcessor().post_process_object_detection(
        outputs, threshold=0.7, target_sizes=torch.tensor(sizes)
    )
    assert 0 < sum(len(one["scores"]) for one in found) < 2 * 7
    for ours, expected in zip(found, theirs, strict=True):
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value)
