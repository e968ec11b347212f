# SPDX-License-Identifier: Apache-2.0
from sfa_peft.plots import plot_selection


def row(role, block, selected, numel=100):
    return {"role": role, "layer": block, "selected": selected, "numel": numel}


def test_the_plot_is_written_whole_also_for_layers_without_roles(tmp_path):
    rows = [row("attn_in", 0, 5), row("attn_in", 0, 10), row("attn_in", 1, 0), row("mlp_in", 1, 1)]
    path = plot_selection(rows, tmp_path / "shares.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    plot_selection([row(None, None, 5), row(None, None, 7)], tmp_path / "plain.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain.svg", "shares.png"]
