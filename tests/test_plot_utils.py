"""The pictures: decoded again, their pixels compared with the arrays they were made from."""

import io
import math
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import stats
from scipy.ndimage import gaussian_filter, zoom

import plot_utils
import run_main
import vae

pytestmark = pytest.mark.quick

HISTORY = [
    {"epoch": 1, "train_elbo": -200, "valid_elbo": -180},
    {"epoch": 2, "train_elbo": -150, "valid_elbo": -145},
    {"epoch": 3, "train_elbo": -140, "valid_elbo": -138},
]


def decode(png):
    """Returns a PNG's pixels (height, width, 3) from 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def small_flags(*arguments):
    """Returns flags for small pictures: 3 by 2 digits, and a manifold of 5 by 4."""
    reconstructions = ["--PRR_n_img_x=3", "--PRR_n_img_y=2"]
    manifold = ["--PMLR_n_img_x=5", "--PMLR_n_img_y=4"]
    return run_main.parse_flags([*reconstructions, *manifold, *arguments])


def digits_of(targets, inputs, labels):
    """Returns Digits with these for validation and test, and no others."""
    batch = vae.Batch(targets, inputs, labels)
    return run_main.Digits(None, None, None, None, batch, batch)


def plot_data(*arguments, **arrays):
    """Returns PlotData with these arrays in place of what a network would compute."""
    nothing = np.zeros((0, 784))
    data = plot_utils.PlotData(None, digits_of(nothing, nothing, np.zeros(0)), small_flags(*arguments))
    for name, array in arrays.items():
        setattr(data, name, array)
    return data


@pytest.fixture
def six_images():
    """Six images, each different in every corner, so that no flip or transposition goes unseen.

    Returns them as integers from 0 to 255, (6, 28, 28), and as a batch in [0, 1], (6, 784).
    """
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    return images, images.reshape(6, 784) / 255


@pytest.fixture
def figures(monkeypatch):
    """Lets the functions that draw with Matplotlib return their figures instead of PNGs."""

    def owner(save, **options):
        return save.__self__

    monkeypatch.setattr(plot_utils, "file_content", owner)


# --- Digits in rows and columns -----------------------------------------------------------------------


@pytest.mark.parametrize("side", [28, 5])
def test_tile_shows_exact_pixels(side):
    images = np.random.default_rng(0).integers(0, 256, (6, side, side))
    batch = images.reshape(6, side**2) / 255
    picture = decode(plot_utils.png(plot_utils.tile(batch, n_x=3, n_y=2)))
    expected = np.block([[images[0], images[1], images[2]], [images[3], images[4], images[5]]])
    for channel in range(3):
        np.testing.assert_array_equal(picture[..., channel], expected)
    faint = np.full((1, side**2), 0.2)
    assert (plot_utils.tile(faint, 1, 1) == 51).all()  # whatever the range of the images


@pytest.mark.parametrize("factor", [0.5, 1.5, 3.0])
def test_tile_resizes_digits(factor):
    upper_half = np.zeros((28, 28))
    upper_half[:14] = 1
    batch = np.stack([upper_half.ravel(), upper_half.T.ravel()])
    side = round(28 * factor)
    picture = decode(plot_utils.png(plot_utils.tile(batch, 2, 1, factor)))[..., 0]
    assert picture.shape == (side, 2 * side)
    middle = side // 2
    edge = max(2, round(2 * factor))
    assert (picture[: middle - edge, :side] > 240).all()
    assert (picture[middle + edge :, :side] < 15).all()
    assert (picture[:, side : side + middle - edge] > 240).all()
    assert (picture[:, side + middle + edge :] < 15).all()


def test_stacked_rows_show_each_digit_above_its_counterparts(six_images):
    images, batch = six_images
    picture = decode(plot_utils.stacked_rows([batch, 1 - batch, batch], n_x=3, n_y=2))[..., 0]
    first = np.hstack(images[:3])
    second = np.hstack(images[3:])
    gap = np.full((plot_utils.GAP, 3 * 28), 255)
    expected = np.vstack([first, 255 - first, first, gap, second, 255 - second, second])
    np.testing.assert_array_equal(picture, expected)


def test_interpolation_has_one_row_per_pair(six_images):
    images, batch = six_images
    lines = np.stack([batch[[2, 3, 0]], batch[[3, 2, 1]]])
    data = plot_data(interpolations=(batch[:2], lines, batch[4:]))
    picture = decode(plot_utils.draw_interpolation(data))[..., 0]
    gap = np.full((28, plot_utils.GAP), 255)
    first = np.hstack([images[0], gap, images[2], images[3], images[0], gap, images[4]])
    second = np.hstack([images[1], gap, images[3], images[2], images[1], gap, images[5]])
    np.testing.assert_array_equal(picture, np.vstack([first, second]))


def test_reconstruction_pairs_fill_the_last_row_with_black():
    x = np.random.default_rng(0).integers(0, 256, (13, 784)) / 255
    missing = np.zeros((7, 784))
    padded = [np.concatenate([x, missing]), np.concatenate([1 - x, missing])]
    assert plot_utils.reconstruction_pairs(x, 1 - x, 1) == plot_utils.stacked_rows(padded, 10, 2)
    three = plot_utils.reconstruction_pairs(x[:3], x[:3], 1)
    assert three == plot_utils.stacked_rows([x[:3], x[:3]], 3, 1)
    many = np.tile(x, (10, 1))
    hundred = plot_utils.stacked_rows([many[:100], many[:100]], 10, 10)
    assert plot_utils.reconstruction_pairs(many, many, 1) == hundred


# --- The animation ------------------------------------------------------------------------------------


def test_animation_plays_every_frame_in_order():
    blocks = np.random.default_rng(0).integers(0, 2, (30, 4, 4))
    frames = np.kron(255 * blocks, np.ones((28, 28), int)).astype(np.uint8)
    gif = Image.open(io.BytesIO(plot_utils.draw_animation(plot_data("--animate", frames=frames))))
    assert (gif.n_frames, gif.info["loop"]) == (30, 0)
    for n, frame in enumerate(frames):
        gif.seek(n)
        np.testing.assert_array_equal(np.asarray(gif.convert("L")), frame)
        assert gif.info["duration"] == (2_000 if n == 29 else 200)


def test_animation_stays_small():
    """A hundred frames of 400 digits, none of which resembles the one before."""
    rng = np.random.default_rng(0)
    coarse = zoom(rng.random((400, 7, 7)), (1, 4, 4), order=3)
    strokes = gaussian_filter(1.0 * (coarse > 0.6), (0, 1, 1)).reshape(400, 784)
    frames = [plot_utils.tile(rng.permutation(strokes), 20, 20, 400 / 560) for _ in range(10)]
    gif = plot_utils.draw_animation(plot_data("--animate", frames=frames))
    assert 10 * len(gif) < 8e6


# --- The manifold -------------------------------------------------------------------------------------


class GumbelPrior(vae.StandardNormal):
    """A prior whose quantiles are not symmetric."""

    def cdf(self, z):
        return stats.gumbel_r.cdf(z)

    def quantile(self, p):
        return stats.gumbel_r.ppf(p)


class PriorWithoutQuantiles(vae.StandardNormal):
    cdf = quantile = None


class StandInNetwork:
    """All that the manifold's axes need of a network."""

    def __init__(self, prior):
        self.prior = prior


def manifold_axis(prior, n, z_range, mean):
    """Returns the axis of n digits for a prior and test digits with these latent means, (n_digits,)."""
    return plot_data(f"--PMLR_z_range={z_range}", network=StandInNetwork(prior)).manifold_axis(mean, n)


# Digits' means of standard deviations 0.5, 1 and 3; the prior is stretched to the last only.
@pytest.mark.parametrize(
    ("n", "z_range", "std", "width"),
    [(5, 2, 1, 1), (4, 2, 0.5, 1), (20, 8, 1, 1), (50, 8, 1, 1), (5, 2, 3, 3)],
)
@pytest.mark.parametrize(
    ("prior", "distribution"), [(vae.StandardNormal(), stats.norm), (GumbelPrior(), stats.gumbel_r)]
)
def test_manifold_axis_has_equal_steps_of_probability(prior, distribution, n, z_range, std, width):
    mean = np.array([std, -std], np.float32)  # as a network computes them
    z = manifold_axis(prior, n, z_range, mean)
    assert len(z) == n
    assert (z[0], z[-1]) == (-z_range, z_range)
    steps = np.diff(distribution(0, width).cdf(z))
    assert steps == pytest.approx(np.full(n - 1, steps[0]))


def test_manifold_axis_of_a_single_digit_is_the_centre():
    assert manifold_axis(vae.StandardNormal(), 1, 2.0, np.array([1, -1])).tolist() == [0]
    centre = stats.gumbel_r.ppf(stats.gumbel_r.cdf([-2, 2]).mean())  # half of the probability on each side
    assert manifold_axis(GumbelPrior(), 1, 2.0, np.array([1, -1])) == pytest.approx([centre])
    mean = np.array([0.1, 0.2, 0.4])
    assert manifold_axis(PriorWithoutQuantiles(), 1, 2.0, mean).tolist() == [0.2]


def test_manifold_axis_follows_the_digits_where_the_prior_has_no_quantiles():
    prior = PriorWithoutQuantiles()
    mean = np.random.default_rng(0).gamma(2, size=1_001) - 1
    z = manifold_axis(prior, 5, 8, mean[np.abs(mean) < 8])
    np.testing.assert_allclose(z, np.quantile(mean[np.abs(mean) < 8], [0, 0.25, 0.5, 0.75, 1]))
    within = mean[np.abs(mean) <= 0.5]
    assert len(within) < 500
    z = manifold_axis(prior, 5, 0.5, mean)
    np.testing.assert_allclose(z, np.quantile(within, [0, 0.25, 0.5, 0.75, 1]), atol=0.01)
    assert np.abs(z).max() <= 0.5
    assert manifold_axis(prior, 3, 0.5, np.array([2.0, 3.0])).tolist() == [0.5, 0.5, 0.5]  # no digit within


def contains(picture, part):
    """Returns whether exactly one place of a picture, (height, width), has the pixels of a part of it."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, part.shape)
    middle = len(part) // 2  # a row that few places have, so that only those are compared
    candidates = np.argwhere((windows[:, :, middle] == part[middle]).all(axis=-1))
    return sum((windows[y, x] == part).all() for y, x in candidates) == 1


def test_manifold_holds_the_digits_one_to_one(six_images):
    images, batch = six_images
    data = plot_data(manifold=(batch[None], np.array([-2, 0, 2]), np.array([2, -2])))
    picture = decode(plot_utils.draw_manifold(data))[..., 0]
    expected = np.block([[images[0], images[1], images[2]], [images[3], images[4], images[5]]])
    assert contains(picture, expected)


def test_manifold_axes_are_labelled_with_z(six_images, figures):
    _, batch = six_images
    data = plot_data(manifold=(batch[None], np.array([-2, 0, 2]), np.array([2, -2])))
    (axes,) = plot_utils.draw_manifold(data).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-2.00", "2.00"]  # no room for a third
    assert axes.get_xticks().tolist() == [0, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["2.00", "-2.00"]  # from the top
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$z_1$", "$z_2$")


def test_manifold_axis_has_ten_labels_at_most(figures):
    z = np.linspace(-2, 2, 20)
    data = plot_data(manifold=(np.zeros((1, 20, 784)), z, np.zeros(1)))
    (axes,) = plot_utils.draw_manifold(data).axes
    assert len(axes.get_xticks()) == 10
    for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True):
        assert float(label.get_text()) == pytest.approx(z[int(tick)], abs=0.0051)


def test_manifold_axes_have_no_negative_zero(six_images, figures):
    _, batch = six_images
    data = plot_data(
        "--PMLR_resize_factor=2", manifold=(batch[None], np.array([-2, -1e-9, 2]), np.array([2, -2]))
    )
    (axes,) = plot_utils.draw_manifold(data).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-2.00", "0.00", "2.00"]


# --- Points in colours --------------------------------------------------------------------------------


def test_latent_map_shows_every_digit_in_its_colour_at_its_place():
    labels = np.repeat(np.arange(10), 100)
    x = labels
    y = 7 * labels % 10
    z = np.random.default_rng(0).normal(size=(1_000, 2)) * 0.1 + np.stack([x, y], axis=1)
    data = plot_data(latent_points=(z, ("$z_1$", "$z_2$")), labels=labels)
    picture = decode(plot_utils.draw_latent_map(data))[:, :720]  # without the legend
    columns = np.empty(10)
    rows = np.empty(10)
    for digit, colour in enumerate(plot_utils.COLOURS):
        rgb = (255 * np.array(to_rgb(colour))).round()
        found = np.argwhere(np.abs(picture - rgb).max(axis=2) <= 1)
        assert len(found) > 50
        rows[digit], columns[digit] = found.mean(axis=0)
    assert (np.argsort(columns) == np.argsort(x[::100])).all()
    assert (np.argsort(-rows) == np.argsort(y[::100])).all()


def test_latent_map_has_a_legend_of_all_digits(figures):
    data = plot_data(latent_points=(np.zeros((1, 2)), ("one axis", "the other")), labels=np.array([7]))
    (axes,) = plot_utils.draw_latent_map(data).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [str(digit) for digit in range(10)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("one axis", "the other")


def test_simplex_shows_the_shares_of_the_sticks(figures):
    network = vae.StickBreaking(dim_z=2, n_hidden=16)
    z = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    labels = np.arange(60) % 10
    data = plot_data("--model=stick_breaking", "--PMLR_n_samples=50", network=network, mean=z, labels=labels)
    (axes,) = plot_utils.draw_simplex(data).axes
    first, second, rest = network.sticks(z[:50]).numpy().T
    assert np.ptp(first) > 0.1
    for digit, points in enumerate(axes.collections):
        own = labels[:50] == digit
        x = second[own] + rest[own] / 2  # the corners are (0, 0), (1, 0) and (1/2, sqrt(3)/2)
        y = rest[own] * math.sqrt(3) / 2
        np.testing.assert_allclose(points.get_offsets(), np.stack([x, y], axis=1), atol=1e-6)
    names = {text.get_text(): text.get_position() for text in axes.texts}
    assert names == {"first piece": (0, 0), "second piece": (1, 0), "the rest": (0.5, math.sqrt(0.75))}


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
def test_colours_are_distinguishable(vision):
    seen = [lab(colour, COLOUR_VISION[vision]) for colour in plot_utils.COLOURS]
    assert len(seen) == 10
    for a, b in combinations(range(10), 2):
        overlap = {a, b} <= {3, 5, 8} or {a, b} <= {4, 7, 9}
        assert np.linalg.norm(seen[a] - seen[b]) > (30 if overlap else 15), f"digits {a} and {b}"


# --- The ELBO by epoch --------------------------------------------------------------------------------


def test_elbo_curves_rise_with_the_elbo():
    picture = decode(plot_utils.draw_elbo(plot_data(history=HISTORY)))
    blue = (31, 119, 180)
    orange = (255, 127, 14)
    for colour in (blue, orange):
        rows, columns = np.nonzero(np.abs(picture - colour).max(axis=2) <= 2)
        assert rows[columns == columns.min()].min() > 200
        assert rows[columns > 600].min() < 60


def test_elbo_curves_show_the_history_by_epoch(figures):
    (axes,) = plot_utils.draw_elbo(plot_data("--keep_prob=0.9", history=HISTORY)).axes
    training, validation = [line.get_xydata().tolist() for line in axes.lines]
    assert training == [[1, -200], [2, -150], [3, -140]]
    assert validation == [[1, -180], [2, -145], [3, -138]]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training, with annealed dropout", "validation, without dropout"]
    (axes,) = plot_utils.draw_elbo(plot_data("--keep_prob=1", history=HISTORY)).axes
    assert axes.get_legend().get_texts()[0].get_text() == "training, without dropout"


def test_elbo_axis_is_fitted_to_the_later_epochs(figures):
    elbo = [-5_000.0, *np.linspace(-150, -140, 19)]
    history = [{"epoch": n, "train_elbo": y - 3, "valid_elbo": y} for n, y in enumerate(elbo, 1)]
    (axes,) = plot_utils.draw_elbo(plot_data(history=history)).axes
    low, high = axes.get_ylim()
    assert -155 < low < -150
    assert -140 < high < -138


# --- What a network and the flags make of it ----------------------------------------------------------


def enlarge(layers):
    """Multiplies output layers' weights, which start so small that all z would look the same."""
    for layer in layers:
        layer.kernel.assign(60 * layer.kernel)


def random_digits(n_pixels):
    """Returns Digits with 60 test digits, whose labels go through 0 to 9 six times."""
    x, x_corrupted = np.random.default_rng(0).random((2, 60, n_pixels)).astype(np.float32)
    return digits_of(x, x_corrupted, np.arange(60) % 10)


@pytest.fixture(scope="module")
def digits():
    return random_digits(784)


def vivid_network(network_class, **options):
    """Returns a network whose means and images differ from digit to digit, although it is not trained."""
    network = network_class(dim_z=2, n_hidden=16, **options)
    enlarge([network.encoder_output, network.decoder_output])
    return network


@pytest.fixture(scope="module")
def state():
    network = vivid_network(vae.VAE)
    frames = [np.zeros((56, 84), np.uint8), np.full((56, 84), 255, np.uint8)]
    return run_main.TrainingState(network, HISTORY, frames)


ALWAYS = {"samples.png", "interpolation.png", "elbo.png"}
DIGITS = {"input.png", "reconstruction.png"}
PLANE = {"manifold.png", "latent_map.png", "posterior.png"}
NOISY = {"input_noise.png", "denoising.png"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ALWAYS | DIGITS | PLANE),
        (("--add_noise", "--animate"), ALWAYS | DIGITS | NOISY | PLANE | {"manifold.gif"}),
        (("--add_noise", "--PRR=False"), ALWAYS | PLANE),
        (("--PMLR=True", "--PRR=False"), ALWAYS | PLANE),
        (("--PMLR=False", "--animate"), ALWAYS | DIGITS),
    ],
)
def test_flags_select_the_pictures(state, digits, arguments, expected):
    pictures = plot_utils.draw(state, digits, small_flags(*arguments))
    assert set(pictures) == expected
    for name, content in pictures.items():
        assert Image.open(io.BytesIO(content)).format == name.rpartition(".")[2].upper()


def test_pictures_show_the_test_digits_and_their_reconstructions(state, digits):
    flags = small_flags("--add_noise", "--PRR_resize_factor=2", "--seed=5")
    pictures = plot_utils.draw(state, digits, flags)
    network = state.network
    x = digits.test.targets[:6]
    x_corrupted = digits.test.inputs[:6]
    restored = network.reconstruct(x_corrupted).numpy()
    samples = network.sample(6, (5, 0)).numpy()
    # The labels are 0 to 9, again and again. So 10 is a 0 like 0, and the next digit of another class is 11.
    ends = digits.test.inputs[[0, 11]]
    z_start, z_end = network.encode(ends).numpy()
    line = network.decode(np.linspace(z_start, z_end, plot_utils.INTERPOLATION_STEPS)).numpy()
    first_line = plot_data(interpolations=(ends[:1], line[None], ends[1:]))
    expected = {
        "input.png": plot_utils.png(plot_utils.tile(x, 3, 2, 2)),
        "input_noise.png": plot_utils.png(plot_utils.tile(x_corrupted, 3, 2, 2)),
        "reconstruction.png": plot_utils.png(plot_utils.tile(restored, 3, 2, 2)),
        "denoising.png": plot_utils.stacked_rows([x, x_corrupted, restored], 3, 2, 2),
        "samples.png": plot_utils.png(plot_utils.tile(samples, 3, 2, 2)),
        "interpolation.png": plot_utils.draw_interpolation(first_line),
    }
    for name, png in expected.items():
        shown = decode(pictures[name])
        if name == "interpolation.png":
            assert len(shown) == 28 * plot_utils.N_INTERPOLATIONS
            shown = shown[:28]  # the first line
        np.testing.assert_allclose(shown, decode(png), atol=1)  # batches of other sizes round differently


@pytest.mark.architecture
def test_latent_plane_shows_the_means_and_a_decoded_grid(state, digits):
    network = state.network
    flags = small_flags("--PMLR_n_samples=40", "--PMLR_resize_factor=2", "--PMLR_z_range=1.5")
    data = plot_utils.PlotData(network, digits, flags)
    mean = network.encode(digits.test.inputs).numpy()
    z, axes_labels = data.latent_points
    assert axes_labels == ("$z_1$", "$z_2$")
    np.testing.assert_allclose(z, mean[:40], atol=1e-5)

    (images,), z_x, z_y = data.manifold
    widths = np.maximum(1, mean.std(axis=0))  # of a Gaussian that holds the digits, too
    assert widths.max() > widths.min() + 0.1
    p_x = stats.norm(0, widths[0]).cdf([-1.5, 1.5])
    p_y = stats.norm(0, widths[1]).cdf([1.5, -1.5])  # from the top
    np.testing.assert_allclose(z_x, stats.norm(0, widths[0]).ppf(np.linspace(*p_x, 5)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(z_y, stats.norm(0, widths[1]).ppf(np.linspace(*p_y, 4)), rtol=1e-4)
    grid = np.stack([np.tile(z_x, 4), np.repeat(z_y, 5)], axis=1)
    np.testing.assert_allclose(images, network.decode(grid), atol=1e-5)
    picture = decode(plot_utils.draw(state, digits, flags)["manifold.png"])[..., 0]
    assert contains(picture, plot_utils.tile(images, 5, 4, 2))


def test_latent_map_shows_the_requested_number_of_digits(state, digits, figures):
    data = plot_utils.PlotData(state.network, digits, small_flags("--PMLR_n_samples=40"))
    (axes,) = plot_utils.draw_latent_map(data).axes
    mean = state.network.encode(digits.test.inputs).numpy()[:40]
    for digit, points in enumerate(axes.collections):
        np.testing.assert_allclose(points.get_offsets(), mean[digits.test.labels[:40] == digit], atol=1e-5)


def test_latent_map_of_many_dimensions_shows_the_principal_components(digits):
    network = vae.VAE(dim_z=5, n_hidden=16)
    enlarge([network.encoder_output])
    z, axes_labels = plot_utils.PlotData(network, digits, small_flags("--dim_z=5")).latent_points
    mean = network.encode(digits.test.inputs).numpy()
    mean = mean - mean.mean(axis=0)
    _, sizes, components = np.linalg.svd(mean)
    np.testing.assert_allclose(np.abs(z), np.abs(mean @ components[:2].T), atol=1e-3)
    shares = sizes**2 / (sizes**2).sum()
    assert axes_labels == (
        f"first principal component of z, {shares[0]:.0%} of the variance",
        f"second principal component of z, {shares[1]:.0%} of the variance",
    )
    pictures = plot_utils.draw(run_main.TrainingState(network, HISTORY), digits, small_flags("--dim_z=5"))
    assert set(pictures) == ALWAYS | DIGITS | {"latent_map.png"}


@pytest.mark.parametrize("arguments", [("--dim_z=1",), ("--dim_z=5", "--PMLR=False")])
def test_latent_map_is_left_out(digits, arguments):
    flags = small_flags(*arguments)
    state = run_main.TrainingState(vae.VAE(dim_z=flags.dim_z, n_hidden=16), HISTORY)
    assert set(plot_utils.draw(state, digits, flags)) == ALWAYS | DIGITS


class LabelNetwork:
    """An encoder that takes images of two pixels, adds the label, and notes how many it gets at a time."""

    def __init__(self):
        self.sizes = []

    def encode(self, x, labels):
        self.sizes.append(len(x))
        return x + labels[:, None]


def test_mean_is_of_all_test_digits_a_thousand_at_a_time():
    x, x_corrupted = np.random.default_rng(0).random((2, 2_100, 2))
    labels = np.arange(2_100) % 10
    network = LabelNetwork()
    data = plot_utils.PlotData(network, digits_of(x, x_corrupted, labels), small_flags())
    np.testing.assert_array_equal(data.mean, x_corrupted + labels[:, None])
    assert network.sizes == [1_000, 1_000, 100]


def test_interpolations_join_different_classes(state, digits):
    one_class = plot_utils.PlotData(state.network, digits, small_flags())
    one_class.labels = np.zeros(60)
    _, _, ends = one_class.interpolations
    assert len(ends) == plot_utils.N_INTERPOLATIONS  # they have to end somewhere
    mixed = plot_utils.PlotData(state.network, digits, small_flags())
    mixed.labels = np.random.default_rng(0).integers(0, 2, 60)
    starts, _, ends = mixed.interpolations
    label_of = dict(zip([image.tobytes() for image in digits.test.inputs], mixed.labels, strict=True))
    for start, end in zip(starts, ends, strict=True):
        assert label_of[start.tobytes()] != label_of[end.tobytes()]


# --- Classes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conditional():
    """A network whose images depend on z and on the class."""
    network = vae.Conditional(dim_z=2, n_hidden=16)
    enlarge([network.encoder_output, network.decoder_output])
    return network


def picture_of(draw, network, digits, *flags):
    """Returns what a function draws of a network with classes: (height, width)."""
    data = plot_utils.PlotData(network, digits, small_flags("--model=conditional", *flags))
    return decode(draw(data))[..., 0]


def test_classes_have_a_column_per_class_and_a_row_per_z(conditional, digits):
    z = np.repeat(conditional.prior.sample(2, 2, (0, 1)), 10, axis=0)
    expected = plot_utils.tile(conditional.decode(z, np.arange(20) % 10).numpy(), 10, 2)
    assert len(np.unique(expected.reshape(2, 28, 10, 28).swapaxes(1, 2).reshape(20, -1), axis=0)) == 20
    picture = picture_of(plot_utils.draw_classes, conditional, digits, "--PRR_n_img_y=2")
    np.testing.assert_allclose(picture.astype(int), expected, atol=1)


def test_analogies_have_the_style_of_a_test_digit_in_all_classes(conditional, digits):
    picture = picture_of(plot_utils.draw_analogies, conditional, digits).astype(int)
    x = digits.test.inputs[:2]
    z = conditional.encode(x, digits.test.labels[:2])
    images = conditional.decode(np.repeat(z, 10, axis=0), np.arange(20) % 10).numpy()
    np.testing.assert_array_equal(picture[:, :28], plot_utils.tile(x, 1, 2))
    assert (picture[:, 28 : 28 + plot_utils.GAP] == 255).all()
    np.testing.assert_allclose(picture[:, 28 + plot_utils.GAP :], plot_utils.tile(images, 10, 2), atol=1)


def test_manifold_has_a_plane_per_class(conditional, digits):
    flags = small_flags("--model=conditional")
    planes, z_x, z_y = plot_utils.PlotData(conditional, digits, flags).manifold
    assert planes.shape == (10, 20, 784)
    grid = np.stack([np.tile(z_x, 4), np.repeat(z_y, 5)], axis=1)
    picture = picture_of(plot_utils.draw_manifold, conditional, digits)
    frame = plot_utils.frame(conditional, digits, flags)
    for label, images in enumerate(planes):
        np.testing.assert_allclose(images, conditional.decode(grid, np.full(20, label)), atol=1e-5)
        plane = plot_utils.tile(images, 5, 4)
        assert contains(picture, plane)
        row, column = divmod(label, 5)
        own = frame[row * 4 * 28 : (row + 1) * 4 * 28, column * 5 * 28 : (column + 1) * 5 * 28]
        np.testing.assert_array_equal(own, plane)


def test_interpolations_stay_in_a_class(conditional, digits):
    data = plot_utils.PlotData(conditional, digits, small_flags("--model=conditional"))
    _, lines, ends = data.interpolations
    # The labels are 0 to 9, again and again.
    np.testing.assert_array_equal(ends, digits.test.inputs[10:20])
    labels = np.arange(10)
    first = conditional.reconstruct(digits.test.inputs[:10], labels)
    last = conditional.reconstruct(digits.test.inputs[10:20], labels)
    np.testing.assert_allclose(lines[:, 0], first, atol=1e-5)
    np.testing.assert_allclose(lines[:, -1], last, atol=1e-5)


def test_layers_show_the_upper_latents_alone_and_both(digits):
    network = vae.Ladder(dim_z=2, n_hidden=16, dim_z_lower=4)
    enlarge([network.encoder_output, network.z_2_output, network.z_1_prior_output, network.decoder_output])
    png = plot_utils.draw_layers(plot_utils.PlotData(network, digits, small_flags("--model=ladder")))
    x = digits.test.targets[:6]
    x_corrupted = digits.test.inputs[:6]
    upper = network.decode(network.encode(x_corrupted)).numpy()
    both = network.reconstruct(x_corrupted).numpy()
    assert np.abs(upper - both).max() > 0.1
    expected = plot_utils.stacked_rows([x, upper, both], 3, 2)
    np.testing.assert_allclose(decode(png), decode(expected), atol=1)


MAPS = {"manifold.png", "latent_map.png"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model=ladder",), ALWAYS | DIGITS | MAPS | {"layers.png"}),  # without posterior.png
        (("--model=ladder", "--PRR=False", "--PMLR=False"), ALWAYS),
        (("--model=stick_breaking",), ALWAYS | DIGITS | PLANE | {"simplex.png"}),
        (("--model=stick_breaking", "--PMLR=False"), ALWAYS | DIGITS),
        (("--model=stick_breaking", "--dim_z=3"), ALWAYS | DIGITS | {"latent_map.png"}),
    ],
)
def test_models_have_pictures_of_their_own(digits, arguments, expected):
    flags = small_flags(*arguments)
    network_class = getattr(vae, run_main.MODELS[flags.model].class_name)
    state = run_main.TrainingState(network_class(dim_z=flags.dim_z, n_hidden=16), HISTORY)
    assert set(plot_utils.draw(state, digits, flags)) == expected


def test_pictures_show_images_of_another_side():
    digits = random_digits(14**2)
    flags = small_flags("--add_noise", "--animate")
    network = vivid_network(vae.VAE, n_pixels=14**2)
    frame = plot_utils.frame(network, digits, flags)
    assert frame.shape == (4 * 14, 5 * 14)
    state = run_main.TrainingState(network, HISTORY, [frame])
    pictures = {}
    for name, content in plot_utils.draw(state, digits, flags).items():
        pictures[name] = decode(content)[..., 0]
    assert set(pictures) == ALWAYS | DIGITS | NOISY | PLANE | {"manifold.gif"}
    x = (255 * digits.test.targets[:6]).round().reshape(6, 14, 14)
    expected = np.block([[x[0], x[1], x[2]], [x[3], x[4], x[5]]])
    np.testing.assert_array_equal(pictures["input.png"], expected)
    for name in ("input_noise.png", "reconstruction.png", "samples.png"):
        assert pictures[name].shape == (2 * 14, 3 * 14)
    np.testing.assert_array_equal(pictures["denoising.png"][:14], expected[:14])
    assert pictures["denoising.png"].shape == (6 * 14 + plot_utils.GAP, 3 * 14)
    width = 14 * (plot_utils.INTERPOLATION_STEPS + 2) + 2 * plot_utils.GAP
    assert pictures["interpolation.png"].shape == (14 * plot_utils.N_INTERPOLATIONS, width)
    assert contains(pictures["manifold.png"], frame)
    np.testing.assert_allclose(pictures["manifold.gif"], frame, atol=9)  # of 16 shades of grey
    few = plot_utils.reconstruction_pairs(digits.test.targets[:3], digits.test.targets[:3], 1)
    np.testing.assert_array_equal(decode(few)[..., 0], np.vstack([expected[:14], expected[:14]]))


def test_ladder_shows_images_of_another_side():
    network = vae.Ladder(dim_z=2, n_hidden=16, n_pixels=14**2)
    data = plot_utils.PlotData(network, random_digits(14**2), small_flags("--model=ladder"))
    assert decode(plot_utils.draw_layers(data)).shape == (6 * 14 + plot_utils.GAP, 3 * 14, 3)


def test_pictures_do_not_depend_on_rcparams(state, digits):
    flags = small_flags("--add_noise", "--animate")
    expected = plot_utils.draw(state, digits, flags)
    changed = {"figure.facecolor": "red", "font.size": 20, "lines.linewidth": 5, "savefig.dpi": 50}
    with mpl.rc_context(changed | {"image.origin": "lower", "axes.grid": True}):
        before = mpl.rcParams.copy()
        pictures = plot_utils.draw(state, digits, flags)
        assert mpl.rcParams.copy() == before  # without a copy, its backend would be chosen
    assert pictures == expected


METHODS = ("encode", "decode", "reconstruct", "sample", "log_joint")


@pytest.fixture
def calls(monkeypatch):
    """The names of VAE's METHODS in the order in which they are called."""
    calls = []

    def counted(name, method):
        def call(*arguments, **options):
            calls.append(name)
            return method(*arguments, **options)

        return call

    for name in METHODS:
        monkeypatch.setattr(vae.VAE, name, counted(name, getattr(vae.VAE, name)))
    return calls


def test_pictures_share_what_they_compute(state, digits, calls):
    plot_utils.draw(state, digits, small_flags("--add_noise"))
    # encode: the test digits, the validation digits, the reconstructed ones. decode: the manifold, the
    # interpolations, the reconstructions.
    counts = {"encode": 3, "decode": 3, "reconstruct": 1, "sample": 1, "log_joint": plot_utils.N_POSTERIORS}
    assert {name: calls.count(name) for name in METHODS} == counts


# --- The posterior ------------------------------------------------------------------------------------


class CorrelatedPosterior(vae.GaussianPosterior):
    """The density of a Gaussian whose two dimensions are correlated."""

    CORRELATION = 0.6

    def log_prob(self, z, q):
        mean, log_var = q
        x, y = tf.unstack((z - mean) * tf.exp(-log_var / 2), axis=-1)
        determinant = 1 - self.CORRELATION**2
        squares = (x**2 - 2 * self.CORRELATION * x * y + y**2) / determinant
        log_volume = tf.reduce_sum(log_var, axis=-1) + math.log(determinant) + 2 * math.log(2 * math.pi)
        return -0.5 * (squares + log_volume)


class CorrelatedVAE(vae.VAE):
    def make_posterior(self):
        return CorrelatedPosterior()


def network_with_posterior(network_class):
    """Returns a network whose q(z|x) has standard deviations of about 1 and 0.6, others for each digit."""
    network = vivid_network(network_class)
    output = network.encoder_output
    output.kernel.assign(output.kernel * [1, 1, 0.02, 0.02])
    output.bias.assign([0, 0, 0, -1])
    return network


def gaussian(network, x, correlation):
    """Returns mean, (2,), and covariance, (2, 2), of the encoder's Gaussian of an image x: (1, n_pixels)."""
    mean, log_var = network.encoder(x)
    std = np.exp(log_var[0] / 2)
    return mean[0].numpy(), np.outer(std, std) * [[1, correlation], [correlation, 1]]


def assert_is_ellipse(path, mean, covariance, deviations):
    """Asserts that a Matplotlib path is the ellipse some standard deviations away from a Gaussian's mean."""
    assert len(path.vertices) > 20
    offsets = path.vertices - mean
    squares = (offsets @ np.linalg.inv(covariance) * offsets).sum(axis=1)
    np.testing.assert_allclose(np.sqrt(squares), deviations, rtol=0.05)
    for angle in np.arange(0, 2 * np.pi, np.pi / 4):
        direction = np.array([np.cos(angle), np.sin(angle)])
        std = np.sqrt(direction @ covariance @ direction)
        assert (offsets @ direction).max() == pytest.approx(deviations * std, rel=0.05)


@pytest.mark.parametrize(("network_class", "correlation"), [(vae.VAE, 0), (CorrelatedVAE, 0.6)])
def test_posterior_is_of_the_test_digit(digits, network_class, correlation):
    network = network_with_posterior(network_class)
    steps = plot_utils.POSTERIOR_STEPS
    window, log_joint, log_q, log_q_at_mean = plot_utils.PlotData(network, digits, small_flags()).posterior(1)
    assert window.shape == (steps, 2)
    assert log_joint.shape == log_q.shape == (steps, steps)
    mean, covariance = gaussian(network, digits.test.inputs[1:2], correlation)
    largest_std = np.sqrt(covariance.diagonal().max())
    np.testing.assert_allclose(window.mean(axis=0), mean, atol=1e-4)
    np.testing.assert_allclose(np.ptp(window, axis=0), 12 * largest_std, rtol=1e-4)
    q = stats.multivariate_normal(mean, covariance)
    assert log_q_at_mean == pytest.approx(q.logpdf(mean), rel=1e-4)
    for row, z_2 in enumerate(window[:, 1]):
        z = np.stack([window[:, 0], np.full(steps, z_2)], axis=1)
        expected = network.log_joint(digits.test.targets[1:2], z)[0]
        np.testing.assert_allclose(log_joint[row], expected, rtol=1e-5)
        np.testing.assert_allclose(log_q[row], q.logpdf(z), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("network_class", "correlation"), [(vae.VAE, 0), (CorrelatedVAE, 0.6)])
def test_posterior_contours_are_one_and_two_standard_deviations_from_the_mean(
    digits, figures, network_class, correlation
):
    network = network_with_posterior(network_class)
    figure = plot_utils.draw_posterior(plot_utils.PlotData(network, digits, small_flags()))
    assert len(figure.axes) == plot_utils.N_POSTERIORS
    for i, axes in enumerate(figure.axes):
        mean, covariance = gaussian(network, digits.test.inputs[i : i + 1], correlation)
        (contours,) = axes.collections
        outer, inner = contours.get_paths()
        assert_is_ellipse(inner, mean, covariance, 1)
        assert_is_ellipse(outer, mean, covariance, 2)


def test_posterior_picture_shows_the_density_around_the_mean(digits, figures):
    network = vivid_network(vae.VAE, n_pixels=14**2)
    data = plot_utils.PlotData(network, random_digits(14**2), small_flags())
    log_joint = np.random.default_rng(0).normal(-100, 1, (plot_utils.POSTERIOR_STEPS,) * 2)
    posterior = data.posterior

    def posterior_with_random_density(i):
        window, _, log_q, log_q_at_mean = posterior(i)
        return window, log_joint - i, log_q, log_q_at_mean

    data.posterior = posterior_with_random_density
    for i, axes in enumerate(plot_utils.draw_posterior(data).axes):
        window, _, _, _ = posterior(i)
        left, bottom = window[0]
        right, top = window[-1]
        (image,) = axes.images
        np.testing.assert_allclose(image.get_array(), np.exp(log_joint - log_joint.max()))
        assert image.origin == "lower"
        assert image.get_extent() == pytest.approx([left, right, bottom, top])
        assert axes.get_xlim() == pytest.approx((left, right))
        assert axes.get_ylim() == pytest.approx((bottom, top))
        assert not axes.lines  # particles
        (inset,) = axes.child_axes
        np.testing.assert_array_equal(inset.images[0].get_array(), data.test.targets[i].reshape(14, 14))


def test_posterior_picture_shows_the_particles_of_stein(digits, figures):
    network = vae.Stein(dim_z=2, n_hidden=16)
    data = plot_utils.PlotData(network, digits, small_flags("--model=stein", "--seed=5"))
    particles = network.particles(digits.test.inputs[: plot_utils.N_POSTERIORS], 100, seed=(0, 1)).numpy()
    for i, axes in enumerate(plot_utils.draw_posterior(data).axes):
        (dots,) = axes.lines
        np.testing.assert_allclose(dots.get_xydata(), particles[:, i], atol=1e-5)
        assert (dots.get_linestyle(), dots.get_marker()) == ("None", ".")


# --- Frames of the animation --------------------------------------------------------------------------


def test_animation_is_of_the_frames_in_the_state(state, digits):
    gif = Image.open(io.BytesIO(plot_utils.draw(state, digits, small_flags("--animate"))["manifold.gif"]))
    assert gif.n_frames == len(state.frames)
    for n, frame in enumerate(state.frames):
        gif.seek(n)
        np.testing.assert_array_equal(np.asarray(gif.convert("L")), frame)


def test_frame_is_the_manifold_in_limited_size(state, digits):
    flags = small_flags("--animate")
    (images,), _, _ = plot_utils.PlotData(state.network, digits, flags).manifold
    frame = plot_utils.frame(state.network, digits, flags)
    assert frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, plot_utils.tile(images, 5, 4))
    flags = small_flags("--PMLR_n_img_x=20", "--PMLR_n_img_y=10")
    assert plot_utils.frame(state.network, digits, flags).shape == (200, 400)


@pytest.mark.parametrize(
    ("side", "columns", "rows", "shape"),
    [(14, 20, 10, (140, 280)), (14, 50, 10, (80, 400)), (28, 10, 20, (400, 200)), (28, 1, 1, (28, 28))],
)
def test_longer_side_of_a_frame_has_at_most_400_pixels(side, columns, rows, shape):
    network = vae.VAE(dim_z=2, n_hidden=16, n_pixels=side**2)
    flags = small_flags(f"--PMLR_n_img_x={columns}", f"--PMLR_n_img_y={rows}")
    assert plot_utils.frame(network, random_digits(side**2), flags).shape == shape


def test_frame_computes_the_manifold_only(state, digits, calls):
    assert plot_utils.frame(state.network, digits, small_flags()).shape == (4 * 28, 5 * 28)
    assert calls == ["encode", "decode"]
