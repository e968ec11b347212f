# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from sfa_peft.selection.rounding import Noise, add_rounded, round_stochastically

CPU = torch.device("cpu")
NOISE = Noise(0, CPU)


@pytest.mark.parametrize("value", [1.003, -1.003, 3.1415926, -1e-5, 1e-39, 123456.7])
def test_the_expected_value_is_the_exact_one(value):
    size, draws = 4096, 64
    exact = torch.full((size,), value)
    bits = exact[:1].view(torch.int32) & -0x10000
    neighbours = torch.cat([bits, bits + 0x10000]).view(torch.float32)
    spread = float((neighbours[1] - neighbours[0]).abs())
    total = torch.zeros(size, dtype=torch.float64)
    for key in range(draws):
        rounded = round_stochastically(exact.clone(), NOISE, str(key))
        assert torch.isin(rounded, neighbours).all()
        total += rounded.double()
    error = float((total / draws - exact.double()).mean()) / spread
    assert abs(error) < 0.01


def test_over_all_offsets_rounding_is_exactly_unbiased():
    # An offset is drawn uniformly for each key; here each one comes once.
    added = 2**-8 * 0.37
    noise = Noise(3, CPU)
    shifted = noise._tile[: 1 << 16]
    assert torch.equal(shifted.sort().values, torch.arange(1 << 16, dtype=torch.int32))
    exact = torch.full((1 << 16,), 1 + added)
    rounded = round_stochastically(exact, noise, "any")  # one turn of the whole tile
    assert abs(float((rounded - 1).double().mean()) - added) < 2**-23


def test_what_bfloat16_can_hold_is_kept_exactly():
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    exact[:4] = torch.tensor([0.0, -0.0, 3.3895e38, -1e-40]).bfloat16().float()
    for key in "abc":
        kept = round_stochastically(exact.clone(), NOISE, key)
        assert torch.equal(kept.view(torch.int32), exact.view(torch.int32))


def test_infinity_and_nan_stay_what_they_are():
    special = torch.tensor([float("inf"), -float("inf"), float("nan")] * 500)
    # NaNs whose lower bits are all set: adding to them would carry into the sign.
    special.view(torch.int32)[:4] = torch.tensor([0x7FFFFFFF, -1] * 2, dtype=torch.int32)
    rounded = round_stochastically(special.clone(), NOISE, "k")
    assert torch.equal(rounded.isnan(), special.isnan())
    assert torch.equal(rounded[~special.isnan()], special[~special.isnan()])


def test_the_same_key_rounds_alike_and_another_key_does_not():
    addend = torch.randn(150_000, generator=torch.Generator().manual_seed(1))  # over one tile
    results = []
    for key, noise in (("a", NOISE), ("a", Noise(0, CPU)), ("b", NOISE)):
        target = torch.ones(150_000, dtype=torch.bfloat16)
        add_rounded(target, addend, noise, key)
        results.append(target)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_many_small_steps_add_up_where_plain_rounding_stands_still():
    target, plain = torch.ones(5000, dtype=torch.bfloat16), torch.ones(5000, dtype=torch.bfloat16)
    addend = torch.full((50, 100), 1e-3).T  # any shape, not contiguous
    for step in range(200):
        add_rounded(target, addend, NOISE, f"w/{step}")
        plain += 1e-3
    assert torch.equal(plain, torch.ones_like(plain))
    assert abs(float(target.float().mean()) - 1.2) < 0.002
    assert float(target.float().std()) < 0.05
