# SPDX-License-Identifier: Apache-2.0
"""The gradient of selected entries is that of the dense gradient, however little is computed."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sfa_peft import SFAConfig, SFALayer, SFASelector
from sfa_peft.sparse.gradient import SparseLinear, find_support
from sfa_peft.tuner.adapted_layers import find_pool
from tests.reference import deltas_of

ROWS, COLUMNS, TOKENS = 40, 48, 30
#: Which rows and columns of the matrix hold entries.
PARTS = {
    "few rows": (range(0, ROWS, 4), range(COLUMNS)),
    "few columns": (range(ROWS), range(0, COLUMNS, 5)),
    "few of both": (range(3, ROWS, 7), range(1, COLUMNS, 6)),
    "all of both": (range(ROWS), range(COLUMNS)),
    "one entry": ([7], [11]),
    "none": ([], []),
}


def entries(part: str) -> torch.Tensor:
    """Return about half of the positions in a part of the matrix, in no order, int32."""
    rows, columns = (torch.tensor(list(own), dtype=torch.int32) for own in PARTS[part])
    block = (rows[:, None] * COLUMNS + columns).reshape(-1)
    order = torch.randperm(len(block), generator=torch.Generator().manual_seed(0))
    return block[order[: (len(block) + 1) // 2]]


def random(*shape: int, seed: int, **options) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**options)


@given(st.data())
def test_a_block_holds_every_entry_where_it_says(data):
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    size = shape[0] * shape[1]
    chosen = data.draw(st.lists(st.integers(0, size - 1), unique=True))
    indices = torch.tensor(chosen, dtype=torch.int32)
    matrix = torch.arange(size).view(shape)

    rows, columns, places = find_support(indices, torch.Size(shape))

    block = matrix if rows is None else matrix[rows]
    block = block if columns is None else block[:, columns]
    assert torch.equal(block.reshape(-1)[places.long()], indices.long())
    for needed, own in ((rows, indices // shape[1]), (columns, indices % shape[1])):
        assert needed is None or torch.equal(needed, own.unique())


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(TOKENS,), (2, 5, 3)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_output_and_gradients_are_those_of_a_dense_layer(part, dtype, shape, has_bias):
    indices = entries(part)
    x, weight = random(*shape, COLUMNS, seed=1, dtype=dtype), random(ROWS, COLUMNS, seed=2)
    bias = random(ROWS, seed=3, dtype=dtype) if has_bias else None
    weight, upstream = weight.to(dtype), random(*shape, ROWS, seed=4, dtype=dtype)
    dense_x, dense = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = F.linear(dense_x, dense, bias)
    expected.backward(upstream)
    x.requires_grad_()
    values = torch.zeros(len(indices), requires_grad=True)
    support = find_support(indices, weight.shape)
    needed = None if support.columns is None else x[..., support.columns]

    out = SparseLinear.apply(x, needed, weight, bias, support, values)
    out.backward(upstream)

    assert torch.equal(out, expected)
    assert torch.equal(x.grad, dense_x.grad)
    gathered = dense.grad.reshape(-1)[indices.long()].float()
    # One sum over the tokens for each entry; a smaller product may add its terms in another order.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(values.grad, gathered, rtol=2 * eps, atol=16 * min(eps, 1e-7))


def test_a_gradient_of_the_gradient_is_right():
    indices = entries("few of both")
    support = find_support(indices, torch.Size((ROWS, COLUMNS)))
    weight, values = random(ROWS, COLUMNS, seed=2).double(), torch.zeros(len(indices)).double()

    def layer(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        needed = x.index_select(-1, support.columns)
        return SparseLinear.apply(x, needed, weight, None, support, values).sin()

    def reference(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        changed = weight.flatten().index_add(0, indices.long(), values).view_as(weight)
        return F.linear(x, changed).sin()

    def penalty(function) -> tuple[torch.Tensor, ...]:
        x = random(3, COLUMNS, seed=1).double().requires_grad_()
        own = values.clone().requires_grad_()
        first = torch.autograd.grad(function(x, own).sum(), (x, own), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), x)

    torch.testing.assert_close(penalty(layer), penalty(reference))


# --- in a model --------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, ROWS, bias=False)
        self.third, self.head = nn.Linear(ROWS, ROWS), nn.Linear(ROWS, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.third(x)))


def adapted(**options):
    """Return a model of which few rows and columns are selected, and nothing of `third`."""
    config = {"budget": 0.1, "rho": 0, "target_modules": ["first", "second", "third"]}
    model = get_peft_model(Net(), SFAConfig(**config, **options))
    pool = find_pool(model, "default")
    first, second = entries("few of both"), entries("few rows") % (ROWS * ROWS)
    with torch.no_grad():
        pool.slots.fill_(-1)
    chosen = [first.long().sort().values, second.long().unique(), first[:0].long()]
    pool.assign([own[: pool.size // 3] for own in chosen])
    with torch.no_grad():
        pool.values[: pool.num_assigned] = random(pool.num_assigned, seed=5)
    return model, pool


def batch(seed: int = 6) -> torch.Tensor:
    return random(TOKENS, COLUMNS, seed=seed)


def expected_gradient(pool, backward) -> torch.Tensor:
    """Return the dense gradient of a bare net that holds the change, gathered."""
    net = Net()
    with torch.no_grad():
        for name, delta in deltas_of(pool).items():
            net.get_parameter(name).add_(delta)
    backward(net)
    gradient = torch.zeros_like(pool.values)
    for ordinal, spans in enumerate(pool.layout()):
        dense = net.get_parameter(pool.names[ordinal]).grad.reshape(-1)
        found = dense[pool.indices(ordinal)]
        for a, b in spans:
            gradient[a:b], found = found[: b - a], found[b - a :]
    return gradient


def plain(net) -> None:
    net(batch()).square().sum().backward()


def in_bfloat16(net) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(batch()).float().square().sum()
    loss.backward()


def checkpointed(net) -> None:
    checkpoint(net, batch(), use_reentrant=False).square().sum().backward()


def accumulated(net) -> None:
    for seed in (6, 7):
        net(batch(seed)).square().sum().backward()


@pytest.mark.parametrize("backward", [plain, in_bfloat16, checkpointed, accumulated])
def test_values_get_the_gathered_dense_gradient(backward):
    model, pool = adapted(score="random")
    backward(model.train())
    expected = expected_gradient(pool, backward)
    assert expected.any()
    torch.testing.assert_close(pool.values.grad, expected, rtol=1e-5, atol=1e-6)


def test_hooks_on_a_layer_see_it_and_change_it():
    model, pool = adapted(score="random")
    seen = []

    def double(_layer, args, out):
        seen.append(args[0].shape)
        return 2 * out

    def hooked(net) -> None:
        layer = net.get_submodule("first") if isinstance(net, Net) else net.base_model.model.first
        (layer.base_layer if isinstance(layer, SFALayer) else layer).register_forward_hook(double)
        plain(net)

    hooked(model)
    assert seen == [(TOKENS, COLUMNS)]
    torch.testing.assert_close(
        pool.values.grad, expected_gradient(pool, hooked), rtol=1e-5, atol=1e-6
    )


def saved_floats(model) -> int:
    """Return how many numbers a forward keeps for its backward, of what is not a parameter."""
    known = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch()).sum()
    return sum(tensor.numel() for tensor in kept.values())


def test_only_needed_columns_of_the_input_are_kept_and_none_where_nothing_is_selected():
    model, pool = adapted(score="random")
    support = find_support(pool.indices(0), torch.Size((ROWS, COLUMNS)))
    columns = support.columns.numel()
    outputs = 3 * TOKENS * ROWS  # of the three tanh; the second's input is the first's output
    assert saved_floats(model.train()) == outputs + TOKENS * columns


def test_steps_between_those_that_score_and_after_the_last_pick_compute_parts_only():
    config = {"budget": 0.1, "rho": 0, "target_modules": ["first"], "select_until": 1}
    model = get_peft_model(Net(), SFAConfig(**config, score_every=2, selection_steps=2)).train()
    layer = model.base_model.model.first
    optimizer = torch.optim.SGD([find_pool(model, "default").values], lr=1e-3)
    selector = SFASelector(model, total_steps=6)
    in_parts = []
    for step in range(6):
        model(batch(step)).square().sum().backward()
        taps = layer.taps(layer.weights["weight"]).taps
        in_parts.append([tap.support is not None for tap in taps])
        optimizer.step()
        selector.step(optimizer)
        optimizer.zero_grad()
    # Nothing is selected in the first step; the second and the fourth score.
    assert in_parts == [[True], [False], [True], [False], [True], [True]]
