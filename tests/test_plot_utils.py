"""The pictures: decoded again, their pixels compared with the arrays they were made from."""

import io
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from PIL import Image
from scipy import stats
from scipy.ndimage import gaussian_filter, zoom

import plot_utils


def decode(png):
    """Returns a PNG's pixels (height, width, 3) from 0 to 255."""
    return (255 * imread(io.BytesIO(png), format="png")[..., :3]).round().astype(int)


@pytest.fixture
def digits():
    """Six images, each different in every corner, so that no flip or transposition goes unseen."""
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    return images, images.reshape(6, 784) / 255


def test_image_grid_has_the_digits_pixels(digits):
    images, batch = digits
    picture = decode(plot_utils.image_grid(batch, n_x=3, n_y=2))
    expected = np.block([[images[0], images[1], images[2]], [images[3], images[4], images[5]]])
    for channel in range(3):
        np.testing.assert_array_equal(picture[..., channel], expected)


def test_image_grid_is_white_on_black_whatever_its_range():
    faint = np.full((1, 784), 0.2)
    assert (decode(plot_utils.image_grid(faint, 1, 1)) == 51).all()


@pytest.mark.parametrize("factor", [0.5, 1.5, 3.0])
def test_resized_digits(factor):
    images = np.zeros((2, 28, 28))
    images[0, :14] = images[1, :, :14] = 1  # upper half, left half
    side = round(28 * factor)
    picture = decode(plot_utils.image_grid(images.reshape(2, 784), 2, 1, factor))[..., 0]
    assert picture.shape == (side, 2 * side)
    middle, edge = side // 2, max(2, round(2 * factor))
    assert (picture[: middle - edge, :side] > 240).all()
    assert (picture[middle + edge :, :side] < 15).all()
    assert (picture[:, side : side + middle - edge] > 240).all()
    assert (picture[:, side + middle + edge :] < 15).all()


def test_comparison_has_each_digit_above_what_was_made_of_it(digits):
    images, batch = digits
    picture = decode(plot_utils.comparison([batch, 1 - batch, batch], n_x=3, n_y=2))[..., 0]
    first, second = (np.hstack(images[row]) for row in (slice(0, 3), slice(3, 6)))
    gap = np.full((plot_utils.GAP, 3 * 28), 255)
    expected = np.vstack([first, 255 - first, first, gap, second, 255 - second, second])
    np.testing.assert_array_equal(picture, expected)


def test_interpolation_has_a_row_a_pair(digits):
    images, batch = digits
    lines = np.stack([batch[[2, 3, 0]], batch[[3, 2, 1]]])
    picture = decode(plot_utils.interpolation(batch[:2], lines, batch[4:]))[..., 0]
    gap = np.full((28, plot_utils.GAP), 255)
    rows = [
        np.hstack([images[0], gap, *images[[2, 3, 0]], gap, images[4]]),
        np.hstack([images[1], gap, *images[[3, 2, 1]], gap, images[5]]),
    ]
    np.testing.assert_array_equal(picture, np.vstack(rows))


def test_animation_has_every_frame_in_order():
    blocks = np.random.default_rng(0).integers(0, 2, (30, 4, 4))
    batches = np.kron(blocks, np.ones((28, 28))).reshape(30, 4, 28, 4, 28).swapaxes(2, 3)
    frames = np.stack([plot_utils.frame(batch.reshape(16, 784), 4, 4) for batch in batches])
    gif = Image.open(io.BytesIO(plot_utils.animation(frames)))
    assert (gif.n_frames, gif.info["loop"]) == (30, 0)
    for n, block in enumerate(blocks):
        gif.seek(n)
        np.testing.assert_array_equal(np.asarray(gif.convert("L")), np.kron(255 * block, np.ones((28, 28))))
        assert gif.info["duration"] == (2_000 if n == 29 else 200)


def test_an_animation_stays_small():
    """A hundred frames of 400 digits, none of which resembles the one before."""
    rng = np.random.default_rng(0)
    strokes = zoom(rng.random((400, 7, 7)), (1, 4, 4), order=3) > 0.6
    frames = [
        plot_utils.frame(
            gaussian_filter(rng.permutation(strokes).astype(float), (0, 1, 1)).reshape(-1, 784), 20, 20
        )
        for _ in range(10)
    ]
    assert frames[0].shape == (400, 400)
    assert 10 * len(plot_utils.animation(np.stack(frames))) < 8e6


def test_manifold_axes_have_equal_steps_of_probability():
    z_x, z_y = plot_utils.manifold_axes(5, 4, z_range=2.0)
    assert (z_x[0], z_x[-1]) == pytest.approx((-2, 2))
    assert (z_y[0], z_y[-1]) == pytest.approx((2, -2))
    for z in (z_x, z_y):
        steps = np.diff(stats.norm.cdf(z))
        assert steps == pytest.approx(np.full(len(z) - 1, steps[0]))
    assert plot_utils.manifold_axes(1, 1, 2.0)[0].tolist() == [0]


def test_manifold_holds_the_digits_one_to_one(digits):
    images, batch = digits
    z_x, z_y = plot_utils.manifold_axes(3, 2, 2.0)
    picture = decode(plot_utils.manifold(batch, z_x, z_y))[..., 0]
    expected = np.block([[images[0], images[1], images[2]], [images[3], images[4], images[5]]])
    height, width = expected.shape
    windows = np.lib.stride_tricks.sliding_window_view(picture, (height, width))
    assert (windows == expected).all(axis=(2, 3)).sum() == 1


def test_manifold_labels_carry_z(digits, monkeypatch):
    monkeypatch.setattr(plot_utils, "png_of", lambda figure: figure)
    z_x, z_y = plot_utils.manifold_axes(3, 2, 2.0)
    (axes,) = plot_utils.manifold(digits[1], z_x, z_y).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-2.00", "2.00"]  # no room for a third
    assert axes.get_xticks().tolist() == [0, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2.00", "-2.00"]  # from the top
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$z_1$", "$z_2$")


def test_latent_map_shows_every_digit_in_its_colour_at_its_place():
    labels = np.repeat(np.arange(10), 100)
    x, y = labels, 7 * labels % 10
    z = np.random.default_rng(0).normal(size=(1_000, 2)) * 0.1 + np.stack([x, y], axis=1)
    picture = decode(plot_utils.latent_map(z, labels))[:, :720]  # without the legend
    columns, rows = np.empty(10), np.empty(10)
    for digit, colour in enumerate(plot_utils.DIGIT_COLOURS):
        rgb = (255 * np.array(to_rgb(colour))).round()
        found = np.argwhere(np.abs(picture - rgb).max(axis=2) <= 1)
        assert len(found) > 50
        rows[digit], columns[digit] = found.mean(axis=0)
    assert (np.argsort(columns) == np.argsort(x[::100])).all()
    assert (np.argsort(-rows) == np.argsort(y[::100])).all()


def test_latent_map_has_a_legend_of_the_digits(monkeypatch):
    monkeypatch.setattr(plot_utils, "png_of", lambda figure: figure)
    (axes,) = plot_utils.latent_map(np.zeros((10, 2)), np.arange(10)).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [str(digit) for digit in range(10)]


def test_latent_map_needs_no_digit_of_every_kind():
    assert decode(plot_utils.latent_map(np.zeros((1, 2)), np.array([7]))).shape == (700, 800, 3)


# Machado, Oliveira and Fernandes 2009, severity 1: what the linear RGB of a colour becomes.
COLOUR_VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def lab(colour, vision):
    """CIE L*a*b* of a colour as somebody with that vision sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(vision) @ linear, 0, 1)
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = to_xyz @ seen / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", COLOUR_VISION)
def test_colours_can_be_told_apart(vision):
    seen = [lab(colour, COLOUR_VISION[vision]) for colour in plot_utils.DIGIT_COLOURS]
    for (a, first), (b, second) in combinations(enumerate(seen), 2):
        overlap = {a, b} <= {3, 5, 8} or {a, b} <= {4, 7, 9}
        assert np.linalg.norm(first - second) > (30 if overlap else 15), f"digits {a} and {b}"


def test_elbo_curves_go_up_where_the_elbo_does():
    picture = decode(plot_utils.elbo_curves([-200, -150, -140], [-180, -145, -138]))
    blue, orange = (31, 119, 180), (255, 127, 14)
    for colour in (blue, orange):
        rows, columns = np.nonzero(np.abs(picture - colour).max(axis=2) <= 2)
        assert rows[columns == columns.min()].min() > 200
        assert rows[columns > 600].min() < 50


def test_same_arrays_same_bytes(digits):
    _, batch = digits
    for _ in range(2):
        assert plot_utils.image_grid(batch, 3, 2) == plot_utils.image_grid(batch, 3, 2)
        assert plot_utils.elbo_curves([-2, -1], [-3, -2]) == plot_utils.elbo_curves([-2, -1], [-3, -2])
