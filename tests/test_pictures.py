"""Pictures draw the numbers that they are given, in the order of the tree."""

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from torch import Tensor

from msae.evaluation.matching import cosines, match
from msae.evaluation.pictures import (
    activations_side_by_side,
    decoder_against_truth,
    lines,
    rows_to_show,
    tree_order,
)
from msae.evaluation.truth import Codes

# Feature 0 stands alone, 1 is the root of 3 and 5, 3 that of 4; 2 is the root of 6
PARENT = torch.tensor([-1, -1, -1, 1, 3, 1, 2])
ORDER = [(1, 0), (3, 1), (4, 2), (5, 1), (2, 0), (6, 1), (0, 0)]
SHOWN = [feature for feature, _ in ORDER]


def labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def test_tree_order() -> None:
    assert tree_order(PARENT, 60) == tree_order(PARENT, 7) == ORDER
    assert tree_order(PARENT, 6) == ORDER[:6]
    assert tree_order(PARENT, 5) == ORDER[:4]  # whole trees
    assert tree_order(PARENT, 3) == ORDER[:3]  # but for the first
    deep = torch.arange(-1, 4999)  # a chain, deeper than Python's stack
    assert tree_order(deep, 5000)[-1] == (4999, 4999)
    assert tree_order(torch.full((3,), -1), 2) == [(0, 0), (1, 0)]


def arms() -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 9, generator=generator)
    latents = torch.randperm(7, generator=generator)
    near = features[latents] + 0.1 * torch.randn(7, 9, generator=generator)
    return {"all": torch.cat([torch.randn(3, 9, generator=generator), near]), "fewer": near[latents != 3]}, features


@pytest.mark.parametrize("given", [False, True])
def test_decoder_against_truth(given, tmp_path) -> None:
    W_decs, features = arms()
    matches = {name: match(W_dec, features) for name, W_dec in W_decs.items()}
    figure = decoder_against_truth(W_decs, features, PARENT, matches if given else None)
    for axis, name in zip(figure.axes[:2], W_decs, strict=True):
        shown = axis.images[0].get_array()
        cos, latent = cosines(W_decs[name], features), matches[name].latent_of(7)
        for i, row in enumerate(SHOWN):
            if name == "fewer" and row == 3:
                assert latent[row] < 0
                assert shown.mask[i].all() if np.ma.is_masked(shown) else np.isnan(shown[i]).all()
            else:
                np.testing.assert_allclose(shown[i], cos[latent[row], SHOWN], atol=1e-6)
        assert axis.get_title() == name
        assert labels(axis.get_xticklabels()) == [str(feature) for feature in SHOWN]
    names = labels(figure.axes[0].get_yticklabels())
    assert [name.rstrip() for name in names] == ["1", "  └ 3", "    └ 4", "  └ 5", "2", "  └ 6", "0"]
    assert len(figure.axes[1].get_yticks()) == 0
    figure.savefig(tmp_path / "decoder.png", dpi=50)


def test_large_forests_show_their_first_trees(tmp_path) -> None:
    n = 500
    parent = torch.where(torch.arange(n) % 10 == 0, -1, torch.arange(n) // 10 * 10)
    features = torch.randn(n, 32, generator=torch.Generator().manual_seed(0))
    figure = decoder_against_truth({"one": features.flip(0).requires_grad_()}, features, parent)
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, cosines(features, features)[:60, :60], atol=1e-6)
    figure.savefig(tmp_path / "large.png", dpi=50)


def example_codes() -> Codes:
    """Feature by feature, rows in which it is active with those above it, and one row with all."""
    dense = torch.zeros(30, 7)
    for row in range(28):
        feature = row % 7
        while feature >= 0:
            dense[row, feature] = 1 + row / 100
            feature = int(PARENT[feature])
    dense[28] = 2.0
    row, index = dense.nonzero(as_tuple=True)
    return Codes(row, index, dense[row, index], 30, 7)


def test_rows_to_show() -> None:
    truth = example_codes()
    rows = rows_to_show(truth, ORDER, 9)
    assert rows == [1, 8, 3, 10, 4, 5, 2, 6, 0]  # 9 of 7 features: two for each of the first two, one for the others
    assert len(set(rows_to_show(truth, ORDER, 200))) == len(rows_to_show(truth, ORDER, 200)) == 29  # 29 is empty


def test_activations_side_by_side(tmp_path) -> None:
    truth = example_codes()
    arm = truth.where(truth.index != 1)._replace(value=truth.value[truth.index != 1] * 3)
    figure = activations_side_by_side({"truth": truth, "SAE": arm}, PARENT, rows=9)
    rows = rows_to_show(truth, ORDER, 9)
    images = [axis.images[0] for axis in figure.axes[:2]]
    for image, codes in zip(images, (truth, arm), strict=True):
        dense = torch.zeros(30, 7).index_put_((codes.row, codes.index), codes.value)[rows][:, SHOWN]
        np.testing.assert_allclose(np.ma.filled(image.get_array(), 0), dense)
        assert image.get_clim() == pytest.approx((0, 3 * 1.1))  # shared: row 10 is the largest
    assert [axis.get_title() for axis in figure.axes[:2]] == ["truth", "SAE"]
    assert labels(figure.axes[1].get_xticklabels()) == [str(feature) for feature in SHOWN]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [3.5, 5.5]  # between trees
    few = activations_side_by_side({"truth": truth}, PARENT, rows=4, most=4)
    assert few.axes[0].images[0].get_array().shape == (4, 4)
    figure.savefig(tmp_path / "activations.png", dpi=50)


SERIES = {
    "vanilla": [(512, 0.4, 0.3, 0.5), (128, 0.2, 0.1, 0.25)],
    "nested": [(128, 0.5, 0.45, 0.55), (2048, 0.7, 0.6, 0.9)],
}


@pytest.mark.parametrize("log_x", [False, True])
def test_lines_of_numbers(log_x, tmp_path) -> None:
    panels = {"MCC": SERIES, "F1": {"nested": SERIES["nested"]}}
    figure = lines(panels, "latents", log_x, references={"MCC": 0.15}, title="title")
    first, second = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["MCC", "F1"]
    assert first.get_xscale() == ("log" if log_x else "linear")
    vanilla, nested, reference = first.lines
    assert vanilla.get_xydata().tolist() == [[128, 0.2], [512, 0.4]]  # in the order of x
    assert nested.get_xydata().tolist() == [[128, 0.5], [2048, 0.7]]
    assert list(reference.get_ydata()) == [0.15, 0.15]
    band = first.collections[0].get_paths()[0].vertices.tolist()
    for corner in ([128, 0.1], [128, 0.25], [512, 0.3], [512, 0.5]):
        assert corner in band
    assert same_color(second.lines[0].get_color(), nested.get_color())  # a label looks alike in every panel
    assert not same_color(vanilla.get_color(), nested.get_color())
    assert labels(figure.legends[0].get_texts()) == ["vanilla", "nested"]
    if log_x:
        assert labels(first.get_xticklabels()) == ["128", "512", "2,048"]
    figure.savefig(tmp_path / "lines.png", dpi=50)


def test_whole_numbers_on_a_logarithmic_axis_have_no_decimals() -> None:
    figure = lines({"y": {"a": [(x, 1, 0, 2) for x in (0.5, 16.0, 2048.0)]}}, "x", log_x=True)
    assert labels(figure.axes[0].get_xticklabels()) == ["0.5", "16", "2,048"]


def test_lines_of_words(tmp_path) -> None:
    series = {"a": [("vanilla", 0.4, 0.3, 0.6), ("nested", 0.5, 0.45, 0.55)], "b": [("nested", 0.7, 0.6, 0.9)]}
    figure = lines({"MCC": series}, "objective", references={"MCC": 0.1})
    axis = figure.axes[0]
    assert labels(axis.get_xticklabels()) == ["vanilla", "nested"]
    a, b = axis.containers
    (ax, ay), (bx, by) = (container.lines[0].get_data() for container in (a, b))
    assert (list(ay), list(by)) == ([0.4, 0.5], [0.7])
    assert [round(x) for x in [*ax, *bx]] == [0, 1, 1]
    assert ax[1] < bx[0]  # side by side
    bars = [segment.tolist() for segment in a.lines[2][0].get_segments()]
    assert np.asarray(bars)[:, :, 1].tolist() == pytest.approx(np.array([[0.3, 0.6], [0.45, 0.55]]))
    figure.savefig(tmp_path / "words.png", dpi=50)


def test_many_panels_and_one_series(tmp_path) -> None:
    figure = lines({f"metric {i}": {"one": [(0, 1, 0, 2), (1, 2, 1, 3)]} for i in range(5)}, "x")
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False]
    assert not figure.legends
    figure.savefig(tmp_path / "many.png", dpi=50)


@pytest.mark.parametrize("x", [0, -1, "word"])
def test_logarithms_of_what_has_none(x) -> None:
    with pytest.raises(ValueError, match=r"^log_x needs positive numbers, not [^\n]*$"):
        lines({"y": {"a": [(x, 1, 0, 2)]}}, "x", log_x=True)
