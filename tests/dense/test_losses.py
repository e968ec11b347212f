# SPDX-License-Identifier: Apache-2.0
"""The depth loss: a naive reference, gradients, empty crops, and micro-batches in Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DPTConfig, DPTForDepthEstimation, Trainer, TrainingArguments

from sfa_peft.dense.losses import SILogLoss, resize_depth, silog_loss
from sfa_peft.errors import SFAError
from tests.tiny import swinv2_config

UNMEASURED = (0.0, -1.0, math.nan, math.inf)


def naive(predicted: list[float], target: list[float], lambd: float, min_depth: float) -> float:
    """The equation, pixel by pixel in Python floats."""
    measured = [(p, t) for p, t in zip(predicted, target, strict=True) if 0 < t < math.inf]
    if not measured:
        return 0.0
    d = [math.log(max(p, min_depth)) - math.log(t) for p, t in measured]
    n = len(d)
    return math.sqrt(max(0.0, sum(x * x for x in d) / n - lambd * sum(d) ** 2 / n**2))


depth = st.floats(0, 100)
pixels = st.lists(st.tuples(depth, st.one_of(depth, st.sampled_from(UNMEASURED))), max_size=12)


@given(pixels, st.floats(0, 1))
def test_the_loss_is_the_equation(pairs: list[tuple[float, float]], lambd: float) -> None:
    predicted, target = [p for p, _ in pairs], [t for _, t in pairs]

    loss = silog_loss(
        torch.tensor(predicted, dtype=torch.float64),
        torch.tensor(target, dtype=torch.float64),
        lambd=lambd,
    )

    # The reference subtracts two large numbers before the root: half the digits may go.
    assert loss.item() == pytest.approx(naive(predicted, target, lambd, 1e-3), abs=2e-6)


def test_a_common_factor_costs_what_lambda_does_not_forgive() -> None:
    target = torch.rand(3, 4, 4, dtype=torch.float64) + 0.5

    forgiven, half, whole = (silog_loss(2 * target, target, lambd=x) for x in (1, 0.5, 0))

    assert forgiven.item() < 1e-7
    torch.testing.assert_close(half, torch.tensor(math.log(2) * 0.5**0.5, dtype=torch.float64))
    torch.testing.assert_close(whole, torch.tensor(math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("lambd", [0.0, 0.5, 1.0])
def test_gradients_are_those_of_finite_differences(lambd: float) -> None:
    torch.manual_seed(0)
    predicted = (torch.rand(2, 3, 4, dtype=torch.float64) + 0.1).requires_grad_()
    target = torch.rand(2, 3, 4, dtype=torch.float64) * 5
    target[0, :2] = 0

    assert torch.autograd.gradcheck(lambda p: silog_loss(p, target, lambd=lambd), (predicted,))


@pytest.mark.parametrize("unmeasured", UNMEASURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_crop_without_truth_gives_zero_and_zero_gradients(
    unmeasured: float, dtype: torch.dtype
) -> None:
    # 0 is what a last ReLU predicts.
    predicted = torch.tensor([[[0.0, 1.0], [2.0, 1e-9]]], dtype=dtype, requires_grad=True)

    loss = silog_loss(predicted, torch.full((1, 2, 2), unmeasured))
    loss.backward()

    assert loss.item() == 0
    assert predicted.grad is not None
    assert (predicted.grad == 0).all()


def test_unmeasured_pixels_and_dead_ones_get_no_gradient_but_the_others_do() -> None:
    predicted = torch.tensor([0.0, 3.0, 2.0, 2.0, 5.0], requires_grad=True)
    target = torch.tensor([1.0, 0.0, math.nan, 1.0, 2.0])

    silog_loss(predicted, target).backward()

    assert predicted.grad is not None
    assert (predicted.grad[:3] == 0).all()
    assert (predicted.grad[3:] != 0).all()
    assert predicted.grad.isfinite().all()


def test_a_perfect_prediction_has_no_loss_and_finite_gradients() -> None:
    target = torch.rand(1, 4, 4) + 1
    predicted = target.clone().requires_grad_()

    loss = silog_loss(predicted, target)
    loss.backward()

    assert loss.item() == 0
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()


def test_a_prediction_that_is_not_a_number_shows() -> None:
    assert silog_loss(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])).isnan()


def test_the_loss_survives_a_product_in_place() -> None:
    predicted = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = silog_loss(predicted, torch.tensor([2.0, 1.0]))
    loss *= 3
    loss.backward()

    assert predicted.grad is not None
    assert predicted.grad.abs().min() > 0


def test_half_precision_is_computed_in_float32() -> None:
    predicted = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)

    loss = silog_loss(predicted, torch.tensor([1.5, 1.7]))

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, silog_loss(predicted.float(), torch.tensor([1.5, 1.7])))


def dpt() -> DPTForDepthEstimation:
    torch.manual_seed(0)
    config = DPTConfig(
        backbone_config=swinv2_config(),
        neck_hidden_sizes=[16, 32, 64, 128],
        fusion_hidden_size=16,
        reassemble_factors=[1] * 4,
    )
    model = DPTForDepthEstimation(config)
    # A positive start: at random values the last ReLU may be dead in a model this small.
    torch.nn.init.constant_(
        next(m for m in reversed(model.head.head) if hasattr(m, "bias")).bias, 1
    )
    return model


def test_a_prediction_of_rounded_size_is_brought_to_the_labels() -> None:
    model, labels = dpt(), torch.rand(2, 40, 56) + 0.5
    outputs = model(pixel_values=torch.randn(2, 3, 40, 56))
    assert outputs.predicted_depth.shape == (2, 64, 64)

    loss = SILogLoss()(outputs, labels)
    loss.backward()

    expected = torch.nn.functional.interpolate(
        outputs.predicted_depth[:, None], (40, 56), mode="bilinear"
    )[:, 0]
    torch.testing.assert_close(loss, silog_loss(expected, labels))
    weight = model.backbone.embeddings.patch_embeddings.projection.weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def trained(model: torch.nn.Module, folder: Path, batch: int, micro_batches: int) -> list[float]:
    """Return the losses logged over two update steps of the same four images."""
    generator = torch.Generator().manual_seed(0)
    images, depths = torch.randn(3, 32, 32, generator=generator), torch.rand(32, 32) + 0.5
    items = [{"pixel_values": images, "labels": depths}] * 8
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=batch, learning_rate=0.0,
        gradient_accumulation_steps=micro_batches, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=items, compute_loss_func=SILogLoss())
    trainer.train()
    logged = [e for e in trainer.state.log_history if "loss" in e]
    return [value for e in logged for value in (e["loss"], e["grad_norm"])]


def test_micro_batches_in_trainer_give_the_loss_of_the_batch(tmp_path: Path) -> None:
    # Equal images: the loss of a half is that of the whole.
    whole, halves = (trained(dpt(), tmp_path, 4 // n, n) for n in (1, 2))

    assert whole == pytest.approx(halves, rel=1e-3)
    assert min(whole) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: silog_loss(torch.ones(2, 2), torch.ones(2, 3)), "differ in shape"),
        (lambda: silog_loss(torch.ones(2), torch.ones(2), lambd=1.1), "lambd: expected 0 to 1"),
        (lambda: silog_loss(torch.ones(2), torch.ones(2), min_depth=0), "min_depth: expected"),
        (lambda: SILogLoss(lambd=-1), "lambd: expected 0 to 1"),
        (lambda: SILogLoss()(SimpleNamespace(), None), "no labels"),
        (lambda: resize_depth(torch.ones(2, 1, 4, 4), (8, 8)), "expected .B, H, W."),
        (
            lambda: SILogLoss()({"predicted_depth": torch.ones(2, 4, 4)}, torch.ones(1, 4, 4)),
            "differ in shape",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(SFAError, match=message):
        call()
