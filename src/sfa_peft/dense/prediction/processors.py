# SPDX-License-Identifier: Apache-2.0
"""Pictures in, results at their own size out: one processor for each task.

They are called as the image processors of transformers are, so that its pipelines take them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature

from sfa_peft.dense.data.objects import mask_boxes
from sfa_peft.dense.inference import dense_maps, resize
from sfa_peft.dense.inference_boxes import instances_from_boxes
from sfa_peft.dense.inference_instances import instances_from_queries
from sfa_peft.dense.prediction.preprocessing import Preprocessing, Size, as_picture
from sfa_peft.dense.prediction.spec import TaskSpec
from sfa_peft.errors import SFAError


class TaskProcessor:
    """What is before and behind the model of a task; see :func:`task_processor`.

    Args:
        preprocessing: What happens to pictures.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, images: Any, return_tensors: str = "pt", **_: Any) -> BatchFeature:
        """Return ``pixel_values``, float32 ``(B, 3, H, W)``.

        Args:
            images: One picture or several that come to one size; see
                :func:`~sfa_peft.dense.predict`.
            return_tensors: "pt", the only kind.

        Raises:
            SFAError: If pictures come to different sizes, or another kind is asked for.
        """
        if return_tensors != "pt":
            raise SFAError(f"return_tensors: expected 'pt', got {return_tensors!r}")
        several = images if isinstance(images, (list, tuple)) else [images]
        rows = [self.preprocessing.prepare(as_picture(image)) for image in several]
        if len({row.shape for row in rows}) != 1:
            raise SFAError(
                f"pictures come to the sizes {sorted({tuple(row.shape[1:]) for row in rows})}; "
                "sfa_peft.dense.predict batches those of one size"
            )
        return BatchFeature({"pixel_values": torch.stack(rows)})

    def results(self, outputs: Any, sizes: Sequence[Size], threshold: float) -> list[Any]:
        """Return results of a batch as :func:`~sfa_peft.dense.predict` does.

        Args:
            outputs: The model's.
            sizes: Height and width of each picture.
            threshold: Of objects: the lowest score.
        """
        raise NotImplementedError

    def _maps(self, outputs: Any, sizes: Sequence[Size]) -> Iterator[torch.Tensor]:
        """Yield maps ``(1, C, H, W)`` at each picture's own size; 0 outside of a crop."""
        frames = [self.preprocessing.frame(size) for size in sizes]
        maps = dense_maps(outputs, frames[0].padded).values
        for number, (frame, size) in enumerate(zip(frames, sizes, strict=True)):
            left, top, right, bottom = frame.box
            inner = maps[number : number + 1, :, : frame.size[0], : frame.size[1]]
            inner = resize(inner, (bottom - top, right - left))
            if self.preprocessing.crop is not None:
                whole = inner.new_zeros((*inner.shape[:2], *size))
                whole[..., top:bottom, left:right] = inner
                inner = whole
            yield inner


class SemanticProcessor(TaskProcessor):
    """Class maps."""

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[Size]
    ) -> list[torch.Tensor]:
        """Return class ids, int64 ``(H, W)``, for each picture."""
        return [maps.argmax(1)[0] for maps in self._maps(outputs, target_sizes)]

    def results(self, outputs: Any, sizes: Sequence[Size], threshold: float) -> list[Any]:
        """Return class maps."""
        found = self.post_process_semantic_segmentation(outputs, sizes)
        return [ids.cpu().numpy() for ids in found]


class DepthProcessor(TaskProcessor):
    """Depth in metres."""

    def post_process_depth_estimation(
        self, outputs: Any, target_sizes: Sequence[Size]
    ) -> list[dict[str, torch.Tensor]]:
        """Return ``predicted_depth``, metres, float32 ``(H, W)``, for each picture."""
        return [{"predicted_depth": maps[0, 0]} for maps in self._maps(outputs, target_sizes)]

    def results(self, outputs: Any, sizes: Sequence[Size], threshold: float) -> list[Any]:
        """Return depth maps."""
        found = self.post_process_depth_estimation(outputs, sizes)
        return [one["predicted_depth"].cpu().numpy() for one in found]


class DetectionProcessor(TaskProcessor):
    """Boxes of Faster R-CNN, of RT-DETR, and of others whose classes have a sigmoid each."""

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None
    ) -> list[dict[str, torch.Tensor]]:
        """Return ``scores``, ``labels`` and ``boxes`` (corners in pixels) for each picture."""
        if getattr(outputs, "boxes", None) is not None:
            of_regions = _of_regions(outputs, target_sizes, threshold)
            return [{n: torch.from_numpy(a) for n, a in one.items()} for one in of_regions]
        shares = outputs.logits.float().sigmoid()
        num_queries, num_classes = shares.shape[1:]
        best, pairs = shares.flatten(1).topk(num_queries)  # pairs of a query and a class
        answers = []
        for scores, pair, boxes, size in zip(
            best, pairs, outputs.pred_boxes.float(), target_sizes, strict=True
        ):
            centre, side = boxes[pair // num_classes].split(2, -1)
            height, width = (int(length) for length in size)
            corners = torch.cat([centre - side / 2, centre + side / 2], -1)
            kept = scores > threshold
            found = {
                "scores": scores,
                "labels": pair % num_classes,
                "boxes": corners * corners.new_tensor((width, height, width, height)),
            }
            answers.append({name: value[kept] for name, value in found.items()})
        return answers

    def results(self, outputs: Any, sizes: Sequence[Size], threshold: float) -> list[Any]:
        """Return boxes, the surest first."""
        found = self.post_process_object_detection(outputs, threshold, sizes)
        return [{name: value.cpu().numpy() for name, value in one.items()} for one in found]


class InstanceProcessor(TaskProcessor):
    """Masks of Mask2Former, MaskFormer and Mask R-CNN."""

    def post_process_instance_segmentation(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None, **_: Any
    ) -> list[dict[str, Any]]:
        """Return for each picture a map of segments and what each of them is.

        Returns:
            ``segmentation``, int64 ``(H, W)``: 0 or the ``id`` of a segment, where masks overlap of
            the surest; ``segments_info``: ``id``, ``label_id`` and ``score`` of each.
        """
        answers = []
        for found in self.results(outputs, target_sizes, threshold):
            segmentation = torch.zeros(found["masks"].shape[1:], dtype=torch.int64)
            for number in reversed(range(len(found["masks"]))):
                segmentation[torch.from_numpy(found["masks"][number])] = number + 1
            scored = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
            info = [{"id": i, "label_id": k, "score": s} for i, (k, s) in enumerate(scored, 1)]
            answers.append({"segmentation": segmentation, "segments_info": info})
        return answers

    def results(self, outputs: Any, sizes: Sequence[Size], threshold: float) -> list[Any]:
        """Return masks, the surest first, and the boxes around them."""
        if getattr(outputs, "boxes", None) is not None:
            return _of_regions(outputs, sizes, threshold)
        frames = [self.preprocessing.frame(size) for size in sizes]
        inside = torch.zeros((len(frames), *frames[0].padded), dtype=torch.bool)
        for one, frame in zip(inside, frames, strict=True):
            one[: frame.size[0], : frame.size[1]] = True
        found = instances_from_queries(
            outputs.class_queries_logits,
            outputs.masks_queries_logits,
            list(sizes),
            pixel_mask=inside,
            threshold=threshold,
        )
        return [one | {"boxes": mask_boxes(one["masks"])} for one in found]


def _of_regions(outputs: Any, sizes: Sequence[Size], threshold: float) -> list[dict[str, Any]]:
    """Return what Faster or Mask R-CNN found with more than a score."""
    found = instances_from_boxes(outputs, list(sizes))
    return [{n: array[one["scores"] > threshold] for n, array in one.items()} for one in found]


_KINDS: dict[str, type[TaskProcessor]] = {
    "semantic_segmentation": SemanticProcessor,
    "depth_estimation": DepthProcessor,
    "object_detection": DetectionProcessor,
    "instance_segmentation": InstanceProcessor,
}


def task_processor(spec: TaskSpec) -> TaskProcessor:
    """Return what is before and behind the model of a task.

    Give it to a pipeline of transformers as ``image_processor``.

    Args:
        spec: The task: ``model.task_spec``.
    """
    return _KINDS[spec.task](spec.preprocessing)
