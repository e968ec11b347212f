# SPDX-License-Identifier: Apache-2.0
"""Several adapters become one, against arithmetic on dense changes."""

from itertools import combinations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from sfa_peft import AdapterFileError, SFAConfig, SFAError
from sfa_peft.tasks import combine
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import deltas_of, masks_of
from tests.tiny import MLP, images, upernet

NAMES = ["x", "y", "z"]
TARGETS = {"x": ["first", "second"], "y": ["second", "first"], "z": ["second"]}


def x_of():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def config_of(name, **changes):
    options = {"budget": 0.3, "rho": 0, "target_modules": TARGETS[name], "score": "random"}
    return SFAConfig(**(options | {"seed": NAMES.index(name), "init_weights": False} | changes))


def trained(dtype=torch.float32, **changes) -> PeftModel:
    torch.manual_seed(4)
    model = get_peft_model(MLP().to(dtype), config_of("x", **changes), adapter_name="x")
    for name in NAMES[1:]:
        model.add_adapter(name, config_of(name, **changes))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    trained().save_pretrained(root)
    return {name: root / name for name in NAMES}


def dense(model) -> tuple[dict, dict]:
    """Changes and masks by adapter and tensor, with zeros for tensors that it cannot change."""
    names = ["first.weight", "second.weight"]
    shapes = {n: MLP().get_parameter(n).shape for n in names}
    changes, masks = {}, {}
    for adapter in NAMES:
        own, mask = deltas_of(find_pool(model, adapter)), masks_of(find_pool(model, adapter))
        changes[adapter] = {n: own.get(n, torch.zeros(shapes[n])) for n in names}
        masks[adapter] = {n: mask.get(n, torch.zeros(shapes[n]).bool()) for n in names}
    return changes, masks


def reference(changes, masks, method, weights):
    result = {}
    for name in changes["x"]:
        total = torch.zeros(changes["x"][name].shape, dtype=torch.float64)
        done = torch.zeros(total.shape, dtype=torch.bool)
        for adapter, weight in zip(NAMES, weights, strict=True):
            own, mask = changes[adapter][name].double(), masks[adapter][name]
            if method == "sum":
                total = total + weight * own
            elif method == "larger":
                total = torch.where(own.abs() > total.abs(), own, total)
            else:
                total = torch.where(mask & ~done, own, total)
            done |= mask
        result[name] = total.float()
    return result


@pytest.mark.parametrize("from_files", [False, True])
@pytest.mark.parametrize(
    ("method", "weights"),
    [("sum", None), ("sum", [0.5, -2, 0.3]), ("larger", None), ("disjoint", None)],
)
def test_every_value_is_that_of_dense_arithmetic(method, weights, from_files, folders, tmp_path):
    model = trained()
    changes, masks = dense(model)
    if from_files:  # files keep every bit of the adapted weight, which is not every bit of a change
        loaded = PeftModel.from_pretrained(MLP(), folders["x"], adapter_name="x")
        for name in NAMES[1:]:
            loaded.load_adapter(folders[name], name)
        changes, masks = dense(loaded)
    expected = reference(changes, masks, method, weights or [1, 1, 1])
    adapters = [folders[n] for n in NAMES] if from_files else NAMES
    target = MLP() if from_files else model
    result, report = combine(target, adapters, method=method, weights=weights, overlaps="first")
    pool = find_pool(result, "combined")
    union = {n: torch.stack([masks[a][n] for a in NAMES]).any(0) for n in expected}
    for name, mask in masks_of(pool).items():
        assert torch.equal(mask, union[name])
        assert torch.equal(deltas_of(pool)[name], expected[name])
    assert report.union == pool.size == sum(int(m.sum()) for m in union.values())
    result.set_adapter("combined")
    output = result(x_of())
    weights = MLP()
    with torch.no_grad():
        for name, change in expected.items():
            weights.get_parameter(name).add_(change)
        assert torch.equal(output, weights(x_of()))
    result.save_pretrained(tmp_path, selected_adapters=["combined"])
    again = PeftModel.from_pretrained(MLP(), tmp_path / "combined")
    assert torch.equal(again(x_of()), output)


def test_overlaps_are_counted(folders):
    changes, masks = dense(trained())
    _, report = combine(MLP(), [folders[n] for n in NAMES])
    by_pair = {(p.first, p.second): p for p in report.pairs}
    for one, other in combinations(NAMES, 2):
        pair = by_pair[str(folders[one]), str(folders[other])]
        both = {n: masks[one][n] & masks[other][n] for n in masks[one]}
        shared = sum(int(m.sum()) for m in both.values())
        same = sum(
            int((changes[one][n].sign() == changes[other][n].sign())[m].sum())
            for n, m in both.items()
        )
        sizes = [sum(int(m.sum()) for m in masks[a].values()) for a in (one, other)]
        assert (pair.shared, pair.share) == (shared, shared / min(sizes))
        assert pair.same_sign == same / shared
    times = {n: sum(masks[a][n].int() for a in NAMES) for n in masks["x"]}
    assert report.num_shared == sum(int((t > 1).sum()) for t in times.values())
    assert "the same way" in str(report)


def test_disjoint_adapters_unite_and_others_are_refused():
    model = get_peft_model(MLP(), config_of("x", target_modules=["first"]), adapter_name="x")
    model.add_adapter("z", config_of("z"))
    outputs = []
    for method in ("disjoint", "sum", "larger"):
        _, report = combine(model, ["z", "x"], method=method, name=method)
        assert report.num_shared == 0
        assert report.pairs[0].same_sign is None
        model.set_adapter(method)
        outputs.append(model(x_of()))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    overlapping = trained()
    with pytest.raises(SFAError, match=r"weights belong to several adapters \(`x` and `y` share"):
        combine(overlapping, NAMES, method="disjoint")
    assert "combined" not in overlapping.peft_config


def task_model(folder, seed, rho=0.5, **options):
    config = SFAConfig(
        budget=0.2,
        rho=rho,
        score="random",
        seed=seed,
        init_weights=False,
        modules_to_save=["decode_head"],
        **options,
    )
    model = get_peft_model(upernet(), config)
    with torch.no_grad():
        model.get_base_model().decode_head.modules_to_save.default.classifier.bias.add_(seed)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["bottleneck", "mona"])
def test_external_adapters_and_head_are_those_to_keep(kind, tmp_path):
    kept = task_model(tmp_path / "kept", 1, external_type=kind)
    task_model(tmp_path / "other", 2, rho=0)
    adapters = [tmp_path / "other", tmp_path / "kept"]
    with pytest.raises(SFAError, match="external adapters, which are not linear"):
        combine(upernet(), adapters)
    # The other's change counts nothing, so what is left is the kept adapter.
    model, _ = combine(upernet(), adapters, weights=[0, 1], keep=tmp_path / "kept")
    model.eval().save_pretrained(tmp_path / "new")
    pixels = images()["pixel_values"]
    with torch.no_grad():
        expected = kept(pixels).logits
        assert torch.equal(model(pixels).logits, expected)
        loaded = PeftModel.from_pretrained(upernet(), tmp_path / "new" / "combined").eval()
        assert torch.equal(loaded(pixels).logits, expected)
    with pytest.raises(SFAError, match="does not fit the model"):
        combine(upernet(num_labels=5), adapters, keep=tmp_path / "kept")


def test_a_kept_head_that_does_not_fit_leaves_the_model_plain(tmp_path):
    task_model(tmp_path / "x", 1)
    task_model(tmp_path / "y", 2)
    model = upernet(num_labels=5)
    with pytest.raises(SFAError, match="does not fit the model"):
        combine(model, [tmp_path / "x", tmp_path / "y"], keep=tmp_path / "x")
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    assert model.state_dict().keys() == upernet(num_labels=5).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "mean"}, "expected method one of"),
        ({"method": "disjoint", "overlaps": "last"}, "expected method one of"),
        ({"adapters": ["x"]}, "two or more different adapters"),
        ({"adapters": ["x", "x"]}, "two or more different adapters"),
        ({"weights": [1]}, "one for each adapter"),
        ({"method": "larger", "weights": [1, 2]}, "Weights belong to method='sum'"),
        ({"keep": "z"}, "none of the adapters"),
        ({"name": "y"}, "has an adapter `y` already"),
        ({"name": "a.b"}, "cannot name"),
        ({"adapters": ["x", "nowhere"]}, "no adapter can be read there"),
    ],
)
def test_errors_leave_the_model_as_it_was(options, says):
    model = trained()
    adapters = options.pop("adapters", ["x", "y"])
    with pytest.raises(SFAError, match=says):
        combine(model, adapters, **options)
    assert set(model.peft_config) == set(NAMES)


def test_adapters_of_another_base_are_refused(folders):
    other = MLP()
    with torch.no_grad():
        other.second.weight[0, 0] += 1
    with pytest.raises(AdapterFileError, match="other pretrained weights"):
        combine(other, [folders["x"], folders["y"]])
