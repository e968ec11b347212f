# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import Swinv2Config, Swinv2Model

from sfa_peft import BudgetError
from sfa_peft.backbones import find_backbone, role_modules
from sfa_peft.budget import External, solve_budget

OUTPUTS = st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 300), max_size=6)


EXTERNAL = st.builds(External, OUTPUTS, st.booleans(), st.sampled_from(["bottleneck", "mona"]))


@given(st.integers(1, 1000), st.floats(0, 1), EXTERNAL, st.integers(100, 100_000))
def test_the_budget_is_never_exceeded_and_nearly_used_up(permille, rho, external, total):
    arguments = {
        "budget": permille / 1000,
        "adapter_dim": None,
        "total": total,
        "external": external,
        "eligible": total,
    }
    try:
        plan = solve_budget(rho=rho, **arguments)
    except BudgetError:
        assume(False)
    trained = plan.external + plan.internal
    assert trained * 1000 <= permille * total
    assert plan.external == external.parameters(plan.adapter_dim)
    if rho < 1:
        assert trained == plan.allowed  # what the widths leave over goes to selected weights
    elif plan.adapter_dim < max(external.outputs.values()):
        assert external.parameters(plan.adapter_dim + 1) > plan.allowed


def _solve(**changes):
    arguments = {
        "budget": 0.1,
        "rho": 0.5,
        "adapter_dim": None,
        "total": 10_000,
        "external": External({"a": 10, "b": 20}),
        "eligible": 8000,
    }
    return solve_budget(**(arguments | changes))


@pytest.mark.parametrize("changes", [{"budget": 0.005}, {"rho": None, "adapter_dim": 50}])
def test_the_smallest_budget_that_an_error_names_works(changes):
    with pytest.raises(BudgetError, match=r"smallest budget that works is [\d.]+") as caught:
        _solve(**changes)
    budget = float(str(caught.value).split("that works is ")[1].split(";")[0].rstrip("."))
    assert _solve(**(changes | {"budget": budget})).adapter_dim >= 1
    with pytest.raises(BudgetError):
        _solve(**(changes | {"budget": budget - 2e-4}))


@pytest.mark.parametrize("changes", [{"rho": 0.5}, {"rho": None, "adapter_dim": 4}])
def test_external_adapters_without_a_place_are_refused(changes):
    with pytest.raises(BudgetError, match="none of the targeted layers ends"):
        _solve(external=External({}), **changes)


def test_a_decimal_budget_is_taken_as_written():
    assert _solve(budget=0.3, rho=0, total=10, external=External({}), eligible=10).internal == 3
    assert _solve(budget=0.29, rho=0, total=100, external=External({}), eligible=100).internal == 29


def _paper_backbone(embed_dim: int, heads: list[int]) -> Swinv2Model:
    config = Swinv2Config(
        image_size=192, embed_dim=embed_dim, depths=[2, 2, 18, 2], num_heads=heads, window_size=12
    )
    with torch.device("meta"):
        return Swinv2Model(config, add_pooling_layer=False)


@pytest.fixture(scope="module")
def base():
    return _paper_backbone(128, [4, 8, 16, 32])


def _sizes(model):
    backbone = find_backbone(model)
    modules = dict(backbone.module.named_modules())
    roles = role_modules(backbone)
    outputs = {r.name: modules[r.name].out_features for r in roles if r.role.endswith("_out")}
    return outputs, sum(modules[r.name].weight.numel() for r in roles)


def test_backbone_and_eligible_sizes_are_those_of_the_paper(base):
    assert sum(p.numel() for p in base.parameters()) == 86_893_816
    assert _sizes(base)[1] == 83_755_008
    large = _paper_backbone(192, [6, 12, 24, 48])
    assert sum(p.numel() for p in large.parameters()) == 195_202_932
    assert _sizes(large)[1] == 188_448_768


@pytest.mark.parametrize(
    ("dim", "millions"), [(32, 1.540), (64, 3.080), (128, 6.160), (256, 12.190)]
)
def test_external_counts_of_swinv2_base_are_those_of_table_4(base, dim, millions):
    outputs, _ = _sizes(base)
    assert sum(outputs.values()) == 2 * 12_032
    assert round(External(outputs, bias=False).parameters(dim) / 1e6, 3) == millions


@pytest.mark.parametrize(
    ("dim", "millions"),
    [(32, 0.770), (64, 1.540), (128, 3.080), (256, 6.095), (512, 11.862)],
)
def test_one_adapter_per_block_gives_adaptformers_counts_of_table_4(base, dim, millions):
    outputs = {n: d for n, d in _sizes(base)[0].items() if "attention" not in n}
    assert round(External(outputs, bias=False).parameters(dim) / 1e6, 3) == millions


@pytest.mark.parametrize(("budget", "dim"), [(0.05, 45), (0.2, 182)])
def test_half_of_the_papers_budgets_gives_the_expected_width(base, budget, dim):
    outputs, eligible = _sizes(base)
    plan = solve_budget(
        budget=budget,
        rho=0.5,
        adapter_dim=None,
        total=86_893_816,
        external=External(outputs, bias=False),
        eligible=eligible,
    )
    assert abs(plan.adapter_dim - dim) <= 1
    assert 0.99 * plan.allowed <= plan.external + plan.internal <= plan.allowed
