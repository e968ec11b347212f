# SPDX-License-Identifier: Apache-2.0
"""What a linear probe of the frozen features loses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.tradeoff import probe
from tests.class_images import make_npz


class Pixels(nn.Module):
    """A backbone whose features are averages of parts of the image, times a factor each."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.ones(3 * 16))

    def forward(self, images):
        parts = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return SimpleNamespace(feature_maps=[None, (parts * self.factors)[:, :, None, None]])


@pytest.fixture
def fitted(monkeypatch):
    monkeypatch.delenv(probe.FOLDER, raising=False)
    monkeypatch.setattr(probe, "SCENES", {3: 120, 4: 60})
    backbone = Pixels()
    yield backbone, probe.Probe(backbone, [32, 32])
    probe.probe_images.cache_clear()


def test_it_is_ridge_regression_on_standardised_features(fitted):
    backbone, made = fitted
    _, (images, labels), (others, truths) = probe.probe_images(32)

    def features(x):
        with torch.no_grad():
            return backbone(x).feature_maps[-1].flatten(1).double().numpy()

    x, y = features(images), np.eye(int(labels.max()) + 1)[labels]
    mean, scale = x.mean(0), x.std(0, ddof=1) + 1e-6
    # Ridge as least squares with more rows.
    rows = np.concatenate([(x - mean) / scale, np.sqrt(probe.RIDGE) * np.eye(x.shape[1])])
    targets = np.concatenate([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))])
    weight = np.linalg.lstsq(rows, targets, rcond=None)[0]
    np.testing.assert_allclose(made.weight.numpy(), weight, atol=1e-8)
    found = ((features(others) - mean) / scale @ weight + y.mean(0)).argmax(1)
    assert made.before == pytest.approx((found == truths.numpy()).mean())


def test_features_that_stay_forget_nothing_and_others_what_the_probe_loses(monkeypatch):
    def noisy(seed):
        generator, labels = torch.Generator().manual_seed(seed), torch.arange(40) % 4
        patterns = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
        noise = 0.1 * torch.rand(40, 3, 8, 8, generator=generator)
        return patterns[labels] + noise, labels

    monkeypatch.setattr(probe, "probe_images", lambda _: ("rendered", noisy(0), noisy(1)))
    backbone = Pixels()
    made = probe.Probe(backbone, [8, 8])
    assert made.before == 1
    assert made.compare(backbone)["forgetting"] == 0
    with torch.no_grad():
        backbone.factors.mul_(-1)
    lost = made.compare(backbone)
    assert lost["forgetting"] == lost["probe accuracy frozen"] - lost["probe accuracy"] > 0
    assert lost["probe images"] == "rendered"


def test_images_with_classes_are_taken_where_a_folder_is_named(monkeypatch, tmp_path):
    folder = make_npz(tmp_path / "images")
    monkeypatch.setenv(probe.FOLDER, str(folder))
    monkeypatch.setattr(probe, "CLASSES", 2)
    source, fit, held_out = probe.probe_images.__wrapped__(16)
    assert source == "classes"
    for images, labels in (fit, held_out):
        assert images.shape[1:] == (3, 16, 16)
        assert set(labels.tolist()) == {0, 1}
        assert len(images) == len(labels)
