# SPDX-License-Identifier: Apache-2.0
"""What users may import. A name added or taken away here is a change for them: changelog."""

import importlib
import re
import types
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_code

DOCS = Path(__file__).resolve().parents[2] / "docs"
DIRECTIVE = re.compile(r"^\.\. (currentmodule|auto\w+):: (\S+)$", re.MULTILINE)

NAMES = {
    "sfa_peft": """
        AdapterFileError Backbone BudgetError BudgetReport BudgetWarning ConfigError DataWarning
        EmptySelectionWarning FrozenHeadWarning GradientWarning LearningRateWarning
        LossScaleWarning MergeWarning OptimizerWarning OtherBaseWarning ParameterGroupWarning
        ResumedRunWarning RoleModule SFACallback SFAConfig SFAError SFALayer SFAModel SFASelector
        SFAWarning SelectionError TargetError UnfinishedSelectionWarning budget_report
        find_backbone head_modules limit_switch_memory load_task parameter_groups plot_selection
        register_score role_modules selection_summary set_card_metrics
    """,
    "sfa_peft.tasks": """
        CombineReport DiffReport ExportReport ExtractReport LostTensor PairOverlap SavedPart
        SavedReport TaskBank TaskMemory TrainingPlan VerifyReport combine convert diff export_onnx
        export_overwrites extract inspect load_task merge overlaps plan_training plot_saved verify
    """,
    "sfa_peft.dense": """
        CLASS_NAMES ClassMaps CocoMetrics DeconvDepthConfig DeconvForDepthEstimation DenseData
        DenseMaps DepthEvalTransform DepthMetrics DepthTrainTransform EomtForSemanticSegmentation
        EvalTransform IGNORE_INDEX IMAGENET_MEAN IMAGENET_STD MAX_DEPTH MapNorm
        Mask2FormerForSemanticSegmentation NormedFeatures
        ObjectPicture ObjectResize ObjectScaleCrop ObjectShortestEdge Objects Preprocessing
        Pretrained RCNNConfig RCNNForObjectDetection SILogLoss Scene SceneDataset SceneSplit
        SegmentationData SegmentationMetrics SegmentationSplit Split SubSplit THING_NAMES
        TaskProcessor TaskSpec TrainTransform TransformedSplit argmax_logits as_image class_palette
        collate_detection collate_instances collate_semantic_masks colour_jitter confusion_matrix
        contact_sheet curve_plot decode_mask dense_maps depth_at_labels depth_sheet depth_to_tensors
        detr_outputs detr_results encode_masks instances_from_boxes instances_from_queries kb_crop
        kitti_benchmark_crop load_dense load_segmentation mask_query_outputs mask_query_results
        multi_scale_probabilities nyu_border_crop object_sheet objects_to_tensors predict
        predict_depth predict_maps read_classes render_scene resize_depth segmentation_scores
        silog_loss sliding_window_maps task_processor to_tensors true_objects vertical_cut_depth
        write_predictions
    """,
}


def documented(text: str) -> list[Any]:
    """The objects that a page's directives document; of a whole module those defined there."""
    found, module = [], ""
    for directive, name in DIRECTIVE.findall(text):
        if directive == "currentmodule":
            module = name
        elif directive == "automodule":
            contents = vars(importlib.import_module(name)).values()
            found += [v for v in contents if getattr(v, "__module__", None) == name]
        else:
            full = name if name.startswith("sfa_peft.") else f"{module}.{name}"
            parent, _, last = full.rpartition(".")
            found.append(getattr(importlib.import_module(parent), last))
    return found


@pytest.mark.parametrize("module", NAMES)
def test_the_public_names_are_these_and_no_others(module):
    contents = importlib.import_module(module)
    listed = NAMES[module].split()
    assert listed == sorted(listed)
    assert sorted(contents.__all__) == listed
    bound = {
        name
        for name, value in vars(contents).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sorted(bound - {"annotations"}) == listed


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_stands_on_a_page(module):
    found = {id(v) for page in DOCS.rglob("*.md") for v in documented(page.read_text("utf-8"))}
    contents = importlib.import_module(module)
    assert [name for name in contents.__all__ if id(getattr(contents, name)) not in found] == []


def test_what_a_page_documents_is_read_off_its_directives():
    page = (
        ".. autoclass:: sfa_peft.SFAConfig\n   :members:\n\n.. currentmodule:: sfa_peft.tasks\n"
        ".. autofunction:: combine\n\n.. automodule:: sfa_peft.errors\n\nSFALayer is only named."
    )
    names = {value.__name__ for value in documented(page)}
    assert {"SFAConfig", "combine", "SFAError"} < names
    assert "SFALayer" not in names


def test_the_package_brings_nothing_heavy_that_peft_does_not():
    heavy = "datasets pandas matplotlib PIL.ImageDraw scipy pycocotools transformers.trainer"
    code = (
        "import sys, peft; before = set(sys.modules); import sfa_peft\n"
        f"print(*sorted((set(sys.modules) - before) & set('{heavy}'.split())))"
    )
    run = run_code(code)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
