"""Pictures draw the numbers that they are given, in the order of the tree."""

from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from torch import Tensor

from msae.evaluation.matching import cosines, match
from msae.evaluation.pictures import activations_side_by_side, decoder_against_truth, lines, rows_to_show, tree_order
from tests.test_firings import code_of

# Feature 0 stands alone, 1 is the root of 3 and 5, 3 that of 4; 2 is the root of 6
PARENT = torch.tensor([-1, -1, -1, 1, 3, 1, 2])
ORDER = [(1, 0), (3, 1), (4, 2), (5, 1), (2, 0), (6, 1), (0, 0)]
SHOWN = [feature for feature, _ in ORDER]


def labels(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def shown_in(axis) -> np.ndarray:
    """The numbers of an image; NaN where it is blank."""
    return np.ma.filled(axis.images[0].get_array().astype(float), np.nan)


def drawn(figure):
    """The figure, once it has been written without an error or a warning."""
    figure.savefig(BytesIO(), dpi=50)
    return figure


def test_trees_are_ordered_depth_first_and_kept_whole() -> None:
    assert tree_order(PARENT, 60) == tree_order(PARENT, 7) == ORDER
    assert tree_order(PARENT, 6) == ORDER[:6]
    assert tree_order(PARENT, 5) == ORDER[:4]  # whole trees
    assert tree_order(PARENT, 3) == ORDER[:3]  # but for the first
    deep = torch.arange(-1, 4999)  # a chain, deeper than Python's stack
    assert tree_order(deep, 5000)[-1] == (4999, 4999)
    assert tree_order(torch.full((3,), -1), 2) == [(0, 0), (1, 0)]


def test_decoders_are_drawn_by_the_features_they_match() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 9, generator=generator)
    latents = torch.randperm(7, generator=generator)
    near = features[latents] + 0.1 * torch.randn(7, 9, generator=generator)
    decoders = {"all": torch.cat([torch.randn(3, 9, generator=generator), near]), "fewer": near[latents != 3]}
    matches = {name: match(W_dec, features) for name, W_dec in decoders.items()}
    figure = drawn(decoder_against_truth(decoders, matches, features, PARENT))
    for axis, name in zip(figure.axes[:2], decoders, strict=True):
        latent = matches[name].latent_of(7)[SHOWN]
        assert [SHOWN[i] for i in (latent < 0).nonzero()] == ([3] if name == "fewer" else [])
        expected = torch.where(latent[:, None] < 0, torch.nan, cosines(decoders[name], features)[latent][:, SHOWN])
        np.testing.assert_allclose(shown_in(axis), expected, atol=1e-6)
        assert axis.get_title() == name
        assert labels(axis.get_xticklabels()) == [str(feature) for feature in SHOWN]
    names = labels(figure.axes[0].get_yticklabels())
    assert [name.rstrip() for name in names] == ["1", "  └ 3", "    └ 4", "  └ 5", "2", "  └ 6", "0"]
    assert len(figure.axes[1].get_yticks()) == 0


def test_large_forests_show_their_first_trees() -> None:
    number = torch.arange(500)
    parent = torch.where(number % 10 == 0, -1, number // 10 * 10)
    features = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    W_dec = features.flip(0).requires_grad_()
    figure = drawn(decoder_against_truth({"one": W_dec}, {"one": match(W_dec, features)}, features, parent))
    np.testing.assert_allclose(shown_in(figure.axes[0]), cosines(features, features)[:60, :60], atol=1e-6)


def example_activations() -> Tensor:
    """Feature by feature, rows in which it is active with those above it, one row with all, and an empty one."""
    activations = torch.zeros(30, 7)
    for row in range(28):
        feature = row % 7
        while feature >= 0:
            activations[row, feature] = 1 + row / 100
            feature = int(PARENT[feature])
    activations[28] = 2.0
    return activations


def test_rows_show_each_feature_with_few_others() -> None:
    truth = code_of(example_activations())
    rows = rows_to_show(truth, ORDER, 9)
    assert rows == [1, 8, 3, 10, 4, 5, 2, 6, 0]  # 9 of 7 features: two for each of the first two, one for the others
    every = rows_to_show(truth, ORDER, 200)
    assert len(set(every)) == len(every) == 29  # 29 is empty


def test_activations_are_drawn_side_by_side() -> None:
    dense = {"truth": example_activations(), "SAE": 3 * example_activations()}
    dense["SAE"][:, 1] = 0
    codes = {name: code_of(of) for name, of in dense.items()}
    figure = drawn(activations_side_by_side(codes, PARENT, rows=9))
    rows = rows_to_show(codes["truth"], ORDER, 9)
    for axis, (name, of) in zip(figure.axes[:2], dense.items(), strict=True):
        np.testing.assert_allclose(np.nan_to_num(shown_in(axis)), of[rows][:, SHOWN])
        assert axis.images[0].get_clim() == pytest.approx((0, 3 * 1.1))  # shared: row 10 is the largest
        assert axis.get_title() == name
    assert labels(figure.axes[1].get_xticklabels()) == [str(feature) for feature in SHOWN]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [3.5, 5.5]  # between trees
    few = activations_side_by_side({"truth": codes["truth"]}, PARENT, rows=4, most=4)
    assert shown_in(few.axes[0]).shape == (4, 4)


SERIES = {
    "vanilla": [(512, 0.4, 0.3, 0.5), (128, 0.2, 0.1, 0.25)],
    "nested": [(128, 0.5, 0.45, 0.55), (2048, 0.7, 0.6, 0.9)],
}


@pytest.mark.parametrize("log_x", [False, True])
def test_numbers_are_joined_by_lines(log_x) -> None:
    panels = {"MCC": SERIES, "F1": {"nested": SERIES["nested"]}}
    figure = drawn(lines(panels, "latents", log_x, references={"MCC": 0.15}, title="title"))
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
        floats = lines({"y": {"a": [(x, 1, 0, 2) for x in (0.5, 16.0, 2048.0)]}}, "x", log_x=True)
        assert labels(floats.axes[0].get_xticklabels()) == ["0.5", "16", "2,048"]  # no decimals where there are none


def test_words_are_points_with_bars() -> None:
    series = {"a": [("vanilla", 0.4, 0.3, 0.6), ("nested", 0.5, 0.45, 0.55)], "b": [("nested", 0.7, 0.6, 0.9)]}
    axis = drawn(lines({"MCC": series}, "objective", references={"MCC": 0.1})).axes[0]
    assert labels(axis.get_xticklabels()) == ["vanilla", "nested"]
    a, b = axis.containers
    (ax, ay), (bx, by) = (container.lines[0].get_data() for container in (a, b))
    assert (list(ay), list(by)) == ([0.4, 0.5], [0.7])
    assert [round(x) for x in [*ax, *bx]] == [0, 1, 1]
    assert ax[1] < bx[0]  # side by side
    bars = np.array([segment.tolist() for segment in a.lines[2][0].get_segments()])
    assert bars[:, :, 1] == pytest.approx(np.array([[0.3, 0.6], [0.45, 0.55]]))


def test_many_panels_hide_the_rest_and_one_series_needs_no_legend() -> None:
    figure = drawn(lines({f"metric {i}": {"one": [(0, 1, 0, 2), (1, 2, 1, 3)]} for i in range(5)}, "x"))
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False]
    assert not figure.legends


@pytest.mark.parametrize("x", [0, -1, "word"])
def test_only_positive_numbers_have_a_logarithm(x) -> None:
    with pytest.raises(ValueError, match=r"^log_x needs positive numbers, not [^\n]*$"):
        lines({"y": {"a": [(x, 1, 0, 2)]}}, "x", log_x=True)
