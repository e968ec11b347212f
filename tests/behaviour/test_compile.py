# SPDX-License-Identifier: Apache-2.0
"""A model under torch.compile trains and answers like an eager one, with one break a forward."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from peft import PeftModel, get_peft_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import get_first_incompatible_cudagraph_node

from sfa_peft import SFAConfig, SFASelector, UnfinishedSelectionWarning
from sfa_peft.tuner.adapted_layers import find_pool
from tests.tiny import MLP

pytestmark = [
    pytest.mark.filterwarnings("ignore:::torch"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]
BASE = {"budget": 0.3, "rho": 0, "target_modules": ["first", "second"], "selection_steps": 3}
BASE["select_until"] = 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = MLP()
        self.tail = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.body(x))


def make(**options):
    torch.manual_seed(0)
    return get_peft_model(Net(), SFAConfig(**(BASE | {"modules_to_save": ["tail"]} | options)))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(step: int = 0) -> torch.Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(step))


def fit(model, net, steps: int):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    selector = SFASelector(model, total_steps=steps)
    for step in range(steps):
        (net(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    return find_pool(model, "default")


def num_breaks() -> int:
    return sum(counters["graph_break"].values())


def assert_same(one, two) -> None:
    assert torch.equal(one.slots, two.slots)
    torch.testing.assert_close(one.values, two.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, 6),
        ({"score_every": 2, "rho": 0.5, "external_modules": ["second"]}, 9),
        ({"score": "weight_difference"}, 6),
    ],
    ids=str,
)
def test_a_compiled_model_trains_like_an_eager_one(options, graphs):
    eager, model = make(**options), make(**options)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(fit(model, compiled, 24), fit(eager, eager, 24))
    # Graphs are made anew where a layer gets its first entries and after the last pick, and not for
    # each pick or step.
    assert counters["stats"]["unique_graphs"] <= graphs
    assert num_breaks() == 1


def test_inductor_keeps_the_scores_where_nothing_is_selected_yet():
    eager, model = make(), make()
    compiled = torch.compile(model, backend="inductor")
    selectors = [SFASelector(m, total_steps=12) for m in (eager, model)]
    for net in (eager, compiled):
        net(batch()).square().mean().backward()
    sums = [s.state_dict()["sums"] for s in selectors]
    for name, expected in sums[0].items():
        assert expected.any()
        torch.testing.assert_close(sums[1][name], expected, rtol=1e-5, atol=1e-7)


EXTERNAL = {"external_modules": ["second"]}


@pytest.mark.parametrize("options", [{}, {"rho": 0.5} | EXTERNAL, {"rho": 1} | EXTERNAL], ids=str)
@pytest.mark.parametrize("form", ["loaded", "merged", "set to eval", "disabled", "training"])
def test_inference_is_one_graph_and_sees_every_change(options, form, tmp_path):
    model = make(score="random", init_weights=False, **options)
    if form == "loaded":
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(bare(), tmp_path)
    elif form == "merged":
        model.merge_adapter()
    elif form != "training":
        model.eval()
    if form == "disabled":
        model.base_model.disable_adapter_layers()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for scale in (1, 2, 3):
            for name, parameter in model.named_parameters():
                if "sfa_" in name:
                    # What writes past autograd is looked for in adapters that train.
                    (parameter if form == "loaded" else parameter.data).mul_(scale)
            torch.testing.assert_close(compiled(batch()), model(batch()), rtol=0, atol=1e-6)
            torch.testing.assert_close(compiled(x=batch()), model(batch()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"rho": 0.5} | EXTERNAL, {"rho": 1} | EXTERNAL], ids=str)
def test_each_of_several_adapters_answers_in_one_graph(options):
    model = make(score="random", init_weights=False, **options)
    other = SFAConfig(**(BASE | options), score="random", seed=1, init_weights=False)
    model.add_adapter("two", other)
    model.eval()
    compiled, answers = torch.compile(model, backend="eager", fullgraph=True), []
    with torch.no_grad():
        for names in ("default", "two", ["default", "two"], "default"):
            model.base_model.set_adapter(names)
            answers.append(compiled(batch()))
            assert torch.equal(answers[-1], model(batch()))
    assert torch.equal(answers[0], answers[3])
    assert not any(torch.equal(answers[0], answer) for answer in answers[1:3])


def test_training_external_adapters_is_one_graph():
    eager, model = (make(rho=1, **EXTERNAL) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for net in (eager, compiled):
        net(batch()).square().sum().backward()
    pairs = zip(eager.parameters(), model.parameters(), strict=True)
    for one, two in [(a, b) for a, b in pairs if a.requires_grad]:
        torch.testing.assert_close(two.grad, one.grad)


def test_a_forward_in_training_breaks_once_until_the_last_pick_and_then_no_more():
    model = make(selection_steps=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    selector = SFASelector(model, total_steps=6)
    compiled, breaks = torch.compile(model, backend="aot_eager"), []
    for step in range(7):
        counters.clear()
        torch._dynamo.reset()  # so that each forward is traced
        (compiled(batch(step)) - 1).square().mean().backward()
        optimizer.step()
        if step < 6:
            selector.step(optimizer)
        optimizer.zero_grad()
        breaks.append(num_breaks())
    # The last pick is after the fourth step; the fifth finds out once what changes no more.
    assert breaks == [1] * 5 + [0] * 2


def test_what_adds_to_scores_stays_out_of_cuda_graphs():
    """As Inductor asks before it records a backward (`mode="reduce-overhead"`)."""
    found = []

    def inspect(module, inputs):
        node = get_first_incompatible_cudagraph_node(module)
        found.append(None if node is None else str(node.target))
        return make_boxed_func(module.forward)

    model = make()
    net = torch.compile(model, backend=aot_autograd(fw_compiler=inspect, bw_compiler=inspect))
    selector = SFASelector(model, total_steps=12)
    net(batch()).square().mean().backward()
    assert found == [None, "sfa_peft.hand_over.default"]
    with pytest.warns(UnfinishedSelectionWarning):
        selector.close()  # as after the last pick: all of a step may be recorded
    net(batch()).square().mean().backward()
    assert found[2:] == [None, None]


@pytest.mark.parametrize("grad", [False, True])
def test_a_bare_model_has_no_break_and_no_hooks(grad):
    model = make(score="random", init_weights=False)
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend="aot_eager")(batch())
        assert num_breaks() == grad
        counters.clear()
        unloaded = model.unload()
        torch.compile(unloaded, backend="aot_eager", fullgraph=True)(batch())
        assert num_breaks() == 0
        assert not unloaded._forward_pre_hooks
        assert not unloaded._forward_hooks


class Compared:
    """A model with two adapters, compiled as a whole and in part, beside itself in eager mode."""

    def __init__(self) -> None:
        self.model = make(score="random", init_weights=False)
        self.model.add_adapter("two", SFAConfig(**BASE, score="random", seed=1, init_weights=False))
        self.model.set_adapter("default")
        self.root = torch.compile(self.model, backend="aot_eager")
        self.body = self.model.get_base_model().body
        self.part = torch.compile(self.body, backend="aot_eager")
        self.seen: list[torch.Tensor] = []

    def check(self, *, like: int | None = None) -> None:
        """Compare with eager calls; the answer is a new one, or `like` an earlier one."""
        x = batch()
        for compiled, eager in ((self.root, self.model), (self.part, self.body)):
            for context in (torch.enable_grad(), torch.no_grad()):
                with context:
                    torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=1e-6)
        out = self.root(x).detach()
        same = [n for n, before in enumerate(self.seen) if torch.equal(out, before)]
        assert (like in same) if like is not None else not same
        self.seen.append(out)

    def step(self) -> None:
        pool = find_pool(self.model, "default")
        optimizer = torch.optim.SGD([pool.values], lr=0.1, fused=True)
        self.root(batch()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_and_evaluating_between_compiled_calls_give_no_stale_result():
    compared = Compared()
    compared.check()
    compared.step()
    compared.check()
    compared.model.eval()
    compared.check(like=1)
    with torch.no_grad():
        find_pool(compared.model, "default").values.mul_(2)
    compared.check()
    compared.model.train()
    compared.step()
    compared.check()


def test_switching_merging_and_loading_between_compiled_calls_give_no_stale_result(tmp_path):
    compared = Compared()
    model = compared.model
    model.save_pretrained(tmp_path)
    compared.check()
    with model.disable_adapter():
        compared.check()
    compared.check(like=0)
    for names in ("two", ["two", "default"]):
        model.base_model.set_adapter(names)
        compared.check()
    model.set_adapter("default")
    model.merge_adapter()
    compared.check(like=0)
    model.unmerge_adapter()
    compared.step()
    compared.check()
    model.load_adapter(tmp_path, "default")
    compared.check(like=0)
    model.delete_adapter("two")
    compared.check(like=0)


def test_what_a_whole_forward_prepared_is_not_used_by_a_part_that_is_called_alone():
    model = make(score="random", init_weights=False)
    root = torch.compile(model, backend="aot_eager")
    body, pool, x = model.get_base_model().body, find_pool(model, "default"), batch()
    part = torch.compile(body, backend="aot_eager")
    root(x)
    with torch.no_grad():
        pool.values.mul_(3)
    stale_or_not = part(x)
    torch.testing.assert_close(stale_or_not, body(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        root(x)
    part(x).square().sum().backward()
    gradient, pool.values.grad = pool.values.grad, None
    body(x).square().sum().backward()
    torch.testing.assert_close(gradient, pool.values.grad)


def test_a_part_compiled_alone_trains_like_an_eager_one():
    eager, model = make(), make()
    body = model.get_base_model().body
    model.get_base_model().body = torch.compile(body, backend="aot_eager")
    assert_same(fit(model, model, 12), fit(eager, eager, 12))


def test_a_reference_forward_between_compiled_forward_and_backward_disturbs_neither():
    model = make(score="random", init_weights=False)
    root = torch.compile(model, backend="aot_eager")
    pool, x = find_pool(model, "default"), batch()
    model(x).square().sum().backward()
    expected, pool.values.grad = pool.values.grad, None
    out = root(x).square().sum()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(root(x), bare()(x), rtol=0, atol=1e-6)
    out.backward()
    torch.testing.assert_close(pool.values.grad, expected)


def bare() -> Net:
    torch.manual_seed(0)
    return Net()


def test_a_copy_that_is_compiled_hands_its_scores_to_itself():
    model = make()
    selector = SFASelector(model, total_steps=12)
    twin, other = copy.deepcopy((model, selector))
    torch.compile(twin, backend="aot_eager")(batch()).sum().backward()
    assert not any(s.any() for s in selector.state_dict()["sums"].values())
    assert all(s.any() for s in other.state_dict()["sums"].values())
