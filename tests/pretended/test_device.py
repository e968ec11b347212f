# SPDX-License-Identifier: Apache-2.0
"""The device itself: what it refuses, and that everything a GPU would wait for is reported."""

import pytest
import torch

from sfa_peft.sparse.delta import count_assigned
from tests.pretended.runs import ONE, TWO


def test_values_are_real_and_gradients_flow():
    weight = torch.randn(4, 3, device=ONE, requires_grad=True)
    x = torch.randn(5, 3).to(ONE)
    torch.nn.functional.linear(x, weight).square().sum().backward()
    expected = weight.detach().cpu().requires_grad_()
    torch.nn.functional.linear(x.cpu(), expected).square().sum().backward()
    assert weight.grad.device == weight.device == torch.device(ONE)
    torch.testing.assert_close(weight.grad.cpu(), expected.grad)


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a + b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: a.index_select(0, b.long()),
        lambda a, b: a + b.cpu(),
    ],
)
def test_tensors_of_two_devices_are_refused(mix):
    a, b = torch.zeros(3, device=ONE), torch.zeros(3, device=TWO)
    with pytest.raises(RuntimeError, match="on the same device"):
        mix(a, b)


WAITS = {
    "item": lambda t: t[0].item(),
    "bool": lambda t: bool(t.any()),
    "to the host": lambda t: t.cpu(),
    "from the host": lambda t: torch.ones(3).to(t.device),
    "equal": lambda t: torch.equal(t, t + 1),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "bincount": lambda t: torch.bincount(t.int()),
}
NONE = {
    "add": lambda t: t + 1,
    "a number on the CPU": lambda t: t * torch.tensor(2.0),
    "between devices": lambda t: t.to(TWO),
    "behind the host": lambda t: torch.ones(3).to(t.device, non_blocking=True),
    "masked_fill": lambda t: t.masked_fill(t > 0, 0),
    "a slice": lambda t: t[1:].copy_(t[:-1]),
}


@pytest.mark.parametrize("name", [*WAITS, *NONE])
def test_each_wait_of_the_host_is_reported(device, name):
    tensor = torch.ones(3, device=ONE)
    with device.watched() as report:
        (WAITS | NONE)[name](tensor)
    assert report.waits.total() == (name in WAITS)
    assert report.kernels.total() >= (name in NONE)


def test_what_a_line_of_ours_asks_for_is_told_from_what_others_do(device):
    slots = torch.arange(4, device=ONE)
    with device.watched() as report:
        count_assigned(slots)
        slots.tolist()
    assert [place.partition(":")[0] for _, place in report.own_waits] == ["sparse/delta.py"]
    assert report.waits.total() == 2
    assert report.own_kernels == 2  # a comparison and a sum
