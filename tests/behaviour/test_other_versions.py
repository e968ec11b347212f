# SPDX-License-Identifier: Apache-2.0
"""Adapters that either major version of Transformers wrote, read by the installed one."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from sfa_peft.tuner.upstream.task_heads import former_name, names_here
from tests.behaviour.versions.make import HERE, MODELS, adapted_weights, images, model_class

RELEASES = ["transformers-4", "transformers-5"]


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("release", RELEASES)
def test_an_adapter_of_either_release_does_here_what_it_did_there(release, model_type, tmp_path):
    folder = HERE / release / model_type
    expected = load_file(folder / "expected.safetensors")
    source = folder / "adapter"
    for _ in range(2):  # as it was written, and as this release writes it
        base = model_class(model_type).from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, source).eval()
        with torch.no_grad():
            logits = model(pixel_values=images()).logits
        # Releases may add up in another order; another weight or head would differ by far more.
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
        weights = adapted_weights(model)
        assert {"logits", *weights} == set(expected)
        assert all(torch.equal(weights[key], expected[key]) for key in weights)
        source = tmp_path
        model.save_pretrained(source)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_fixtures_were_written_under_other_names(model_type):
    # Otherwise the test above would show nothing.
    configs = [HERE / r / model_type / "adapter" / "adapter_config.json" for r in RELEASES]
    resolved = [json.loads(config.read_text())["resolved"] for config in configs]
    layers = [{layer["name"] for layer in r["layers"]} for r in resolved]
    assert len(layers[0]) == len(layers[1])
    assert layers[0] != layers[1]
    shared = layers[0] & layers[1]
    assert bool(shared) == (model_type == "dinov2")  # which keeps the names of its MLP


@pytest.mark.parametrize(
    ("now", "former"),
    [
        ("decode_head.linear_projections.3.proj.bias", "decode_head.linear_c.3.proj.bias"),
        ("decoder.layers.0.self_attn.o_proj.bias", "decoder.layers.0.self_attn.out_proj.bias"),
        ("decoder.layers.10.mlp.fc2.weight", "decoder.layers.10.fc2.weight"),
        ("encoder.aifi.0.layers.0.mlp.fc1.bias", "encoder.encoder.0.layers.0.fc1.bias"),
        ("decoder.layers.1.mlp.layers.1.bias", "decoder.layers.1.fc2.bias"),
        ("bbox_embed.0.layers.1.bias", "bbox_embed.0.layers.1.bias"),
        ("classifier.weight", "classifier.weight"),
    ],
)
def test_tensors_of_heads_are_known_by_their_former_names(now, former):
    assert former_name(now) == former_name(former) == former
    assert names_here([now], [former]) == ({former: now} if now != former else {})
    assert names_here([former], [now]) == ({now: former} if now != former else {})


def test_names_that_both_releases_have_are_left_alone():
    both = ["a.layers.0.mlp.fc1.weight", "a.layers.0.fc1.weight"]
    assert names_here(both, both) == {}
    assert names_here(both, both[:1]) == {}
    assert names_here(["x.weight"], ["y.weight"]) == {}
