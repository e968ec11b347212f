# SPDX-License-Identifier: Apache-2.0
"""`task.json`: all that a folder must say so that its adapter becomes a model that predicts.

Names of classes are looked up in transformers and among the heads of this package, and nowhere
else: a file makes no other code run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from sfa_peft.dense.heads.deconv_depth import DeconvForDepthEstimation
from sfa_peft.dense.heads.feature_norms import add_norms, find_norms
from sfa_peft.dense.heads.mask2former import (
    EomtForSemanticSegmentation,
    Mask2FormerForSemanticSegmentation,
)
from sfa_peft.dense.heads.rcnn import RCNNForObjectDetection
from sfa_peft.dense.prediction.preprocessing import Preprocessing
from sfa_peft.errors import SFAError
from sfa_peft.version import package_versions

SPEC_NAME = "task.json"
FORMAT = 1
TASKS = (
    "semantic_segmentation",
    "depth_estimation",
    "object_detection",
    "instance_segmentation",
)
_OWN: dict[str, type[PreTrainedModel]] = {
    "DeconvForDepthEstimation": DeconvForDepthEstimation,
    "EomtForSemanticSegmentation": EomtForSemanticSegmentation,
    "Mask2FormerForSemanticSegmentation": Mask2FormerForSemanticSegmentation,
    "RCNNForObjectDetection": RCNNForObjectDetection,
}
_LARGEST = 1 << 24  # bytes of a file


@dataclass(frozen=True)
class Pretrained:
    """Where the pretrained weights of a model come from.

    Attributes:
        source: Folder or Hub id.
        kind: Name of the class that loads them.
        path: Path of that part in the model; "" for the whole model.
        revision: Commit on the Hub, None if unknown.
        beside: Path of a folder as seen from the task's folder, tried first.
    """

    source: str
    kind: str
    path: str
    revision: str | None = None
    beside: str | None = None

    def find(self, folder: Path) -> str:
        """Return the folder or Hub id to load from, seen from a task's folder."""
        near = folder / self.beside if self.beside else None
        return str(near.resolve()) if near is not None and near.is_dir() else self.source


@dataclass(frozen=True)
class TaskSpec:
    """A task: its model, its pictures and its classes.

    Made by :meth:`describe`, written and read as ``task.json``.

    Attributes:
        task: One of ``semantic_segmentation``, ``depth_estimation``, ``object_detection`` and
            ``instance_segmentation``.
        model: Name of the model's class.
        config: Its configuration.
        pretrained: Where its pretrained weights come from.
        preprocessing: What happens to pictures.
        class_names: Name of class id 0, 1, ...; none for depth.
        norms: Norms before parts of the head, see :func:`~sfa_peft.dense.NormedFeatures`.
        metrics: Scores by name.
        method: How it was trained: a name and its options, for people.
        versions: Of packages, when it was written.
    """

    task: str
    model: str
    config: Mapping[str, Any]
    pretrained: Pretrained
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    norms: Mapping[str, Sequence[int]] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise SFAError(f"TaskSpec: expected task one of {', '.join(TASKS)}, got {self.task!r}")

    @classmethod
    def describe(
        cls,
        model: PreTrainedModel,
        *,
        task: str,
        backbone: str,
        source: str | Path,
        preprocessing: Preprocessing,
        class_names: Sequence[str] = (),
    ) -> TaskSpec:
        """Describe a task model before it gets an adapter.

        Its config learns the class names, so that pipelines of transformers show them.

        Args:
            model: The plain task model: a class of transformers or of ``sfa_peft.dense``.
            task: See :class:`TaskSpec`.
            backbone: Path of the pretrained backbone in it, as ``sfa_peft.find_backbone`` tells;
                "" if the whole model is loaded from ``source``.
            source: Folder or Hub id of the pretrained weights.
            preprocessing: What happens to pictures.
            class_names: Name of class id 0, 1, ...

        Raises:
            SFAError: If the class of the model is another, or the task unknown.
        """
        _find_class(type(model).__name__)
        if class_names:
            model.config.id2label = dict(enumerate(class_names))
            model.config.label2id = {name: i for i, name in enumerate(class_names)}
        part = model.get_submodule(backbone)
        pretrained = Pretrained(
            source=str(Path(source).resolve()) if Path(source).is_dir() else str(source),
            kind=type(part).__name__,
            path=backbone,
            revision=getattr(part.config, "_commit_hash", None),
        )
        return cls(
            task=task,
            model=type(model).__name__,
            config=json.loads(model.config.to_json_string(use_diff=False)),
            pretrained=pretrained,
            preprocessing=preprocessing,
            class_names=tuple(class_names),
            norms=find_norms(model),
            versions=package_versions("peft", "transformers", "torch"),
        )

    # --- the model -----------------------------------------------------------------------------

    def build(self, folder: str | Path = ".", *, source: str | None = None) -> PreTrainedModel:
        """Return the task model with pretrained weights and a new head, in eval mode.

        Args:
            folder: The task's folder, from which a backbone beside it is found.
            source: Folder or Hub id of the pretrained weights, instead of what the file says.

        Raises:
            SFAError: If a class is not known, or the weights cannot be loaded.
        """
        kind = _find_class(self.model)
        config = kind.config_class.from_dict(dict(self.config))  # pyright: ignore
        where = source or self.pretrained.find(Path(folder))
        revision = None if source else self.pretrained.revision
        if not self.pretrained.path:
            return _load(kind, where, revision, config).eval()
        with torch.random.fork_rng(devices=[]):  # whoever loads a model keeps their random numbers
            model = kind(config)
        add_norms(model, self.norms)
        part = _find_class(self.pretrained.kind)
        backbone = _load(part, where, revision, config.backbone_config)
        model.set_submodule(self.pretrained.path, backbone)
        return model.eval()

    # --- the file ------------------------------------------------------------------------------

    def write(self, folder: str | Path, *, metrics: Mapping[str, Any] | None = None) -> Path:
        """Write ``task.json`` into a folder, whole or not at all.

        Args:
            folder: The task's folder; made if there is none.
            metrics: Scores to write with it.

        Returns:
            The file.
        """
        path = Path(folder) / SPEC_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.pretrained.beside
        if Path(self.pretrained.source).is_dir():
            beside = Path(os.path.relpath(self.pretrained.source, path.parent)).as_posix()
        spec = replace(
            self,
            pretrained=replace(self.pretrained, beside=beside),
            metrics=self.metrics if metrics is None else metrics,
        )
        partial = path.with_name(f".{SPEC_NAME}.{os.getpid()}")
        text = json.dumps({"format": FORMAT, **asdict(spec)}, indent=2, default=str)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
        return path

    @classmethod
    def read(cls, folder: str | Path) -> TaskSpec:
        """Read the ``task.json`` of a folder.

        Raises:
            SFAError: If there is none, or it is damaged or of another version.
        """
        path = Path(folder) / SPEC_NAME
        if not path.is_file():
            raise SFAError(
                f"{path}: no such file. Scripts of examples/ write it beside an adapter; after "
                "own training write one with sfa_peft.dense.TaskSpec.describe(...).write(folder)"
            )
        try:
            with path.open("rb") as file:
                fields = json.loads(file.read(_LARGEST))
            number = fields.pop("format")
            if number != FORMAT:
                raise ValueError(f"format {number!r}, this version reads {FORMAT}")
            fields["pretrained"] = Pretrained(**fields["pretrained"])
            given = {n: _as_tuple(value) for n, value in fields["preprocessing"].items()}
            fields["preprocessing"] = Preprocessing(**given)
            fields["class_names"] = tuple(fields["class_names"])
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SFAError(f"{path}: cannot be read as a task ({error}). Save it again") from error


def attach_spec(model: Any, spec: TaskSpec) -> None:
    """Let a model know its task, so that :func:`~sfa_peft.dense.predict` takes it."""
    model.task_spec = spec


def spec_of(model: Any) -> TaskSpec:
    """Return the task that a model knows.

    Raises:
        SFAError: If it knows none.
    """
    spec = getattr(model, "task_spec", None)
    if not isinstance(spec, TaskSpec):
        raise SFAError(
            f"{type(model).__name__} does not say what its task is. Load it with "
            "sfa_peft.load_task(folder), or set model.task_spec to a TaskSpec"
        )
    return spec


def _find_class(name: str) -> type[PreTrainedModel]:
    kind = _OWN.get(name) or getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedModel):
        raise SFAError(
            f"model class {name!r}: neither one of transformers {transformers.__version__} nor of "
            f"sfa_peft.dense ({', '.join(_OWN)})"
        )
    return kind


def _load(kind: Any, source: str, revision: str | None, config: Any) -> PreTrainedModel:
    try:
        return kind.from_pretrained(source, revision=revision or "main", config=config)
    except (OSError, ValueError) as error:
        raise SFAError(
            f"pretrained weights {source!r}: cannot be loaded ({error}). Say where they are now: "
            "backbone=... (--backbone)"
        ) from error


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
