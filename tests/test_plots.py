# SPDX-License-Identifier: Apache-2.0
import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from sfa_peft.plots import draw_selection


def row(role, block, selected, numel=100):
    return {"role": role, "layer": block, "selected": selected, "numel": numel}


def test_the_plot_is_written_whole_also_for_layers_without_roles(tmp_path):
    rows = [row("attn_in", 0, 5), row("attn_in", 0, 10), row("attn_in", 1, 0), row("mlp_in", 1, 1)]
    path = draw_selection(rows, tmp_path / "shares.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    draw_selection([row(None, None, 5), row(None, None, 7)], tmp_path / "plain.svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain.svg", "shares.png"]


@pytest.mark.parametrize("backend", ["svg", "pdf"])
def test_the_backend_and_the_figures_of_the_process_stay_as_they_are(backend, tmp_path):
    import matplotlib.pyplot as plt

    before = mpl.get_backend()
    try:
        mpl.use(backend)
        open_figures = plt.get_fignums()
        draw_selection([row("attn_in", 0, 5)], tmp_path / "shares.png")
        assert mpl.get_backend() == backend
        assert plt.get_fignums() == open_figures
    finally:
        mpl.use(before)


def test_lines_are_the_shares_in_per_cent_by_block(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.touch())
    )
    rows = [row("attn_in", 0, 5), row("attn_in", 0, 10, 200), row("attn_in", 2, 7), row(None, 0, 1)]
    draw_selection(rows, tmp_path / "shares.png")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"attention, in": [[1, 5], [3, 7]], "other": [[1, 1]]}


def test_stages_are_set_apart_before_their_first_block(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.touch())
    )
    blocks = [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4)]
    rows = [row("mlp_in", block, 1) | {"stage": stage} for stage, block in blocks]
    draw_selection(rows, tmp_path / "shares.png")
    (axes,) = drawn[0].axes
    lines = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert lines == [2.5, 4.5]  # block 3 is the first of stage 2, block 5 of stage 3
    assert [text.get_text() for text in axes.texts] == ["stage 1", "stage 2", "stage 3"]
