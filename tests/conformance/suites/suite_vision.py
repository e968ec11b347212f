# SPDX-License-Identifier: Apache-2.0
"""PEFT's common tests on vision transformers, with heads for dense prediction.

PEFT's own test_vision_models.py has a convolutional ResNet only; the checks here are the methods of
its `PeftCommonTester`, and a few that dense prediction needs.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_upstream_tests import testing_common
from peft_upstream_tests.testing_utils import set_init_weights_false

from tests.conformance.suites.models import VISION, saved
from tests.conformance.suites.rows import METHOD

OWN_SUITE = True
COMMON = (
    "model_attr",
    "adapter_name",
    "load_model_low_cpu_mem_usage",
    "save_pretrained",
    "save_pretrained_selected_adapters",
    "from_pretrained_config_construction",
    "load_multiple_adapters",
    "merge_layers_nan",
    "merge_layers_is_idempotent",
    "delete_adapter",
    "delete_inactive_adapter",
    "delete_unknown_adapter_raises",
    "unload_adapter",
    "peft_model_device_map",
    "get_base_model_state_dict",
    "inference_safetensors",
)
# As PEFT's own suites: these tests need an adapter that changes something.
NEED_A_CHANGE = (
    "save_pretrained",
    "save_pretrained_selected_adapters",
    "merge_layers_is_idempotent",
    "unload_adapter",
)


class Loader:
    """Stands in for the Auto class of PEFT's testers: the last part of the path says which."""

    @staticmethod
    def from_pretrained(path: str, **kwargs):
        return VISION[Path(path).name][1].from_pretrained(path, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    METHOD.vision,
    ids=[f"{name}-{number}" for number, (name, _) in enumerate(METHOD.vision)],
)
class TestVisionModels(testing_common.PeftCommonTester):
    transformers_class = Loader
    name: str

    @pytest.fixture(autouse=True)
    def model_of_case(self, name: str):
        self.name = name
        self.path = saved(name, VISION[name][0])

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        size = VISION[self.name][2]
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))
        return {"pixel_values": images}

    def output(self, model) -> torch.Tensor:
        return getattr(model(**self.prepare_inputs_for_testing()), VISION[self.name][3])

    def adapted(self, kwargs: dict, **load):
        torch.manual_seed(0)
        model = Loader.from_pretrained(self.path, **load)
        return get_peft_model(model, METHOD.config(**kwargs))

    def changed(self, kwargs: dict, **load):
        """An adapted model that does not start as the base model."""
        return self.adapted(set_init_weights_false(METHOD.config, kwargs), **load)

    @pytest.mark.parametrize("check", COMMON)
    def test_common(self, name, kwargs, check):
        if check in NEED_A_CHANGE:
            kwargs = set_init_weights_false(METHOD.config, kwargs)
        getattr(self, f"_test_{check}")(self.path, METHOD.config, dict(kwargs))

    def test_common_gradient_checkpointing(self, name, kwargs):
        without_head = {key: value for key, value in kwargs.items() if key != "modules_to_save"}
        self._test_training_gradient_checkpointing(
            self.path, METHOD.config, without_head, use_reentrant=False
        )

    def test_an_untrained_adapter_is_the_identity(self, name, kwargs):
        base = Loader.from_pretrained(self.path).eval()
        torch.testing.assert_close(self.output(self.adapted(kwargs).eval()), self.output(base))

    def test_a_step_changes_the_output_and_reloads(self, name, kwargs, tmp_path):
        model = self.changed(kwargs)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        before = self.output(model.eval()).detach()
        self.output(model.train()).square().sum().backward()
        optimizer.step()
        after = self.output(model.eval()).detach()
        assert not torch.allclose(before, after)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(Loader.from_pretrained(self.path), tmp_path).eval()
        torch.testing.assert_close(self.output(again), after, atol=1e-5, rtol=1e-5)

    def test_checkpointed_gradients_are_the_same(self, name, kwargs):
        model = self.changed(kwargs).train()
        base = model.get_base_model()
        if not base.supports_gradient_checkpointing:
            pytest.skip("transformers has no gradient checkpointing for this model")

        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            self.output(model).square().sum().backward()
            named = model.named_parameters()
            return {n: p.grad.clone() for n, p in named if p.grad is not None and model.prefix in n}

        plain = gradients()
        base.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = gradients()
        assert plain
        assert plain.keys() == checkpointed.keys()
        for key, gradient in plain.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                checkpointed[key], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-9
            )

    def test_transformers_loads_the_adapter_itself(self, name, kwargs, tmp_path):
        model = self.changed(kwargs).eval()
        expected = self.output(model).detach()
        model.save_pretrained(tmp_path)
        base = Loader.from_pretrained(self.path)
        base.load_adapter(str(tmp_path))
        torch.testing.assert_close(self.output(base.eval()), expected, atol=1e-5, rtol=1e-5)

    def test_merged_output_is_the_adapted_one(self, name, kwargs):
        model = self.changed(kwargs).eval()
        expected = self.output(model).detach()
        merged = model.merge_and_unload().eval()
        torch.testing.assert_close(self.output(merged), expected, atol=1e-4, rtol=1e-4)

    def test_disabled_is_the_base_model(self, name, kwargs):
        model = self.changed(kwargs).eval()
        base = self.output(Loader.from_pretrained(self.path).eval())
        with model.disable_adapter():
            torch.testing.assert_close(self.output(model), base, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(self.output(model), base, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_a_half_precision_base_gives_finite_output(self, name, kwargs, dtype):
        model = self.changed(kwargs, dtype=dtype).eval()
        images = self.prepare_inputs_for_testing()["pixel_values"].to(dtype)
        output = getattr(model(pixel_values=images), VISION[name][3])
        assert torch.isfinite(output).all()
