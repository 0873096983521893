"""The pictures: decoded again, their pixels compared with the arrays they were made from."""

import io
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import stats
from scipy.ndimage import gaussian_filter, zoom

import plot_utils
import run_main
import vae

COLOURS = [f"#{colour}" for colour in plot_utils.COLOURS]


def decode(png):
    """Returns a PNG's pixels (height, width, 3) from 0 to 255."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.fixture
def digits():
    """Six images, each different in every corner, so that no flip or transposition goes unseen."""
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28))
    return images, images.reshape(6, 784) / 255


def test_tiles_have_the_digits_pixels(digits):
    images, batch = digits
    picture = decode(plot_utils.png(plot_utils.tile(batch, n_x=3, n_y=2)))
    expected = np.block([[images[0], images[1], images[2]], [images[3], images[4], images[5]]])
    for channel in range(3):
        np.testing.assert_array_equal(picture[..., channel], expected)
    faint = np.full((1, 784), 0.2)
    assert (plot_utils.tile(faint, 1, 1) == 51).all()  # whatever the range of the images


@pytest.mark.parametrize("factor", [0.5, 1.5, 3.0])
def test_resized_digits(factor):
    images = np.zeros((2, 28, 28))
    images[0, :14] = images[1, :, :14] = 1  # upper half, left half
    side = round(28 * factor)
    picture = decode(plot_utils.png(plot_utils.tile(images.reshape(2, 784), 2, 1, factor)))[..., 0]
    assert picture.shape == (side, 2 * side)
    middle, edge = side // 2, max(2, round(2 * factor))
    assert (picture[: middle - edge, :side] > 240).all()
    assert (picture[middle + edge :, :side] < 15).all()
    assert (picture[:, side : side + middle - edge] > 240).all()
    assert (picture[:, side + middle + edge :] < 15).all()


def test_comparison_has_each_digit_above_its_counterparts(digits):
    images, batch = digits
    picture = decode(plot_utils.comparison([batch, 1 - batch, batch], n_x=3, n_y=2))[..., 0]
    first, second = (np.hstack(images[row]) for row in (slice(0, 3), slice(3, 6)))
    gap = np.full((plot_utils.GAP, 3 * 28), 255)
    expected = np.vstack([first, 255 - first, first, gap, second, 255 - second, second])
    np.testing.assert_array_equal(picture, expected)


def test_interpolation_has_one_row_per_pair(digits):
    images, batch = digits
    lines = np.stack([batch[[2, 3, 0]], batch[[3, 2, 1]]])
    picture = decode(plot_utils.interpolation(batch[:2], lines, batch[4:]))[..., 0]
    gap = np.full((28, plot_utils.GAP), 255)
    rows = [
        np.hstack([images[0], gap, *images[[2, 3, 0]], gap, images[4]]),
        np.hstack([images[1], gap, *images[[3, 2, 1]], gap, images[5]]),
    ]
    np.testing.assert_array_equal(picture, np.vstack(rows))


def test_pairs_fill_their_last_row_with_black():
    x = np.random.default_rng(0).integers(0, 256, (13, 784)) / 255
    picture = plot_utils.pairs(x, 1 - x, 1)
    padded = [np.concatenate([images, np.zeros((7, 784))]) for images in (x, 1 - x)]
    assert picture == plot_utils.comparison(padded, 10, 2)
    assert plot_utils.pairs(x[:3], x[:3], 1) == plot_utils.comparison([x[:3], x[:3]], 3, 1)
    many = np.tile(x, (10, 1))
    assert plot_utils.pairs(many, many, 1) == plot_utils.comparison([many[:100]] * 2, 10, 10)


def test_animation_has_every_frame_in_order():
    blocks = np.random.default_rng(0).integers(0, 2, (30, 4, 4))
    frames = np.kron(255 * blocks, np.ones((28, 28), int)).astype(np.uint8)
    gif = Image.open(io.BytesIO(plot_utils.animation(frames)))
    assert (gif.n_frames, gif.info["loop"]) == (30, 0)
    for n, frame in enumerate(frames):
        gif.seek(n)
        np.testing.assert_array_equal(np.asarray(gif.convert("L")), frame)
        assert gif.info["duration"] == (2_000 if n == 29 else 200)


def test_an_animation_stays_small():
    """A hundred frames of 400 digits, none of which resembles the one before."""
    rng = np.random.default_rng(0)
    strokes = gaussian_filter(1.0 * (zoom(rng.random((400, 7, 7)), (1, 4, 4), order=3) > 0.6), (0, 1, 1))
    frames = [plot_utils.tile(rng.permutation(strokes), 20, 20, 400 / 560) for _ in range(10)]
    assert 10 * len(plot_utils.animation(frames)) < 8e6


@pytest.mark.parametrize(("n", "z_range", "width"), [(5, 2, 1), (4, 2, 1), (20, 8, 1), (5, 2, 3)])
def test_manifold_axis_has_equal_steps_of_probability(n, z_range, width):
    z = plot_utils.manifold_axis(n, z_range, width)
    assert (z[0], z[-1]) == pytest.approx((-z_range, z_range))
    steps = np.diff(stats.norm(0, width).cdf(z))
    assert steps == pytest.approx(np.full(n - 1, steps[0]))


def test_manifold_axis_of_one_digit_is_the_centre():
    assert plot_utils.manifold_axis(1, 2.0, 1).tolist() == [0]


def test_manifold_holds_the_digits_one_to_one(digits):
    images, batch = digits
    picture = decode(plot_utils.manifold(batch, np.array([-2, 0, 2]), np.array([2, -2])))[..., 0]
    expected = np.block([[images[0], images[1], images[2]], [images[3], images[4], images[5]]])
    windows = np.lib.stride_tricks.sliding_window_view(picture, expected.shape)
    assert (windows == expected).all(axis=(2, 3)).sum() == 1


@pytest.fixture
def figures(monkeypatch):
    """Lets the functions that draw with Matplotlib return their figures instead of PNGs."""
    monkeypatch.setattr(plot_utils, "file_content", lambda save, **_: save.__self__)


def test_manifold_labels_carry_z(digits, figures):
    (axes,) = plot_utils.manifold(digits[1], np.array([-2, 0, 2]), np.array([2, -2])).axes
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
    for digit, colour in enumerate(COLOURS):
        rgb = (255 * np.array(to_rgb(colour))).round()
        found = np.argwhere(np.abs(picture - rgb).max(axis=2) <= 1)
        assert len(found) > 50
        rows[digit], columns[digit] = found.mean(axis=0)
    assert (np.argsort(columns) == np.argsort(x[::100])).all()
    assert (np.argsort(-rows) == np.argsort(y[::100])).all()


def test_latent_map_has_a_legend_of_all_digits(figures):
    (axes,) = plot_utils.latent_map(np.zeros((1, 2)), np.array([7])).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [str(digit) for digit in range(10)]


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
    seen = [lab(colour, COLOUR_VISION[vision]) for colour in COLOURS]
    for (a, first), (b, second) in combinations(enumerate(seen), 2):
        overlap = {a, b} <= {3, 5, 8} or {a, b} <= {4, 7, 9}
        assert np.linalg.norm(first - second) > (30 if overlap else 15), f"digits {a} and {b}"


HISTORY = [
    {"epoch": epoch, "train_elbo": train, "valid_elbo": valid}
    for epoch, train, valid in ((1, -200, -180), (2, -150, -145), (3, -140, -138))
]


def test_elbo_curves_go_up_where_the_elbo_does():
    picture = decode(plot_utils.elbo_curves(HISTORY, 0.9))
    blue, orange = (31, 119, 180), (255, 127, 14)
    for colour in (blue, orange):
        rows, columns = np.nonzero(np.abs(picture - colour).max(axis=2) <= 2)
        assert rows[columns == columns.min()].min() > 200
        assert rows[columns > 600].min() < 60


def test_elbo_curves_show_the_history_by_epoch(figures):
    (axes,) = plot_utils.elbo_curves(HISTORY, 0.9).axes
    training, validation = (line.get_xydata().tolist() for line in axes.lines)
    assert training == [[1, -200], [2, -150], [3, -140]]
    assert validation == [[1, -180], [2, -145], [3, -138]]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training, with annealed dropout", "validation, without dropout"]
    (axes,) = plot_utils.elbo_curves(HISTORY, 1).axes
    assert axes.get_legend().get_texts()[0].get_text() == "training, without dropout"


def test_elbo_curves_leave_out_first_epochs_that_would_press_them_together(figures):
    elbo = [-5_000.0, *np.linspace(-150, -140, 19)]
    history = [{"epoch": n, "train_elbo": y - 3, "valid_elbo": y} for n, y in enumerate(elbo, 1)]
    (axes,) = plot_utils.elbo_curves(history, 0.9).axes
    low, high = axes.get_ylim()
    assert -155 < low < -150
    assert -140 < high < -138


# --- what a network and the flags make of it ----------------------------------------------------------


@pytest.fixture(scope="module")
def scene():
    """A state of training and test digits, all that `draw` takes besides the flags."""
    x, x_corrupted = np.random.default_rng(0).random((2, 60, 784)).astype(np.float32)
    network = vae.VAE(dim_z=2, n_hidden=16)
    for layer in network.encoder_output, network.decoder_output:  # otherwise all z would look the same
        layer.kernel.assign(60 * layer.kernel)
    frames = [np.zeros((56, 84), np.uint8), np.full((56, 84), 255, np.uint8)]
    state = SimpleNamespace(network=network, history=HISTORY, frames=frames)
    return state, SimpleNamespace(test=(x, x_corrupted), test_labels=np.arange(60) % 10)


def parse(*flags):
    """Returns flags for small pictures: 3 by 2 digits, and a manifold of 5 by 4."""
    sizes = {"PRR_n_img_x": 3, "PRR_n_img_y": 2, "PMLR_n_img_x": 5, "PMLR_n_img_y": 4}
    return run_main.parse_flags([*(f"--{name}={n}" for name, n in sizes.items()), *flags])


ALWAYS = {"samples.png", "interpolation.png", "elbo.png"}
DIGITS = {"input.png", "reconstruction.png"}
PLANE = {"manifold.png", "latent_map.png", "posterior.png"}
NOISY = {"input_noise.png", "denoising.png"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), ALWAYS | DIGITS | PLANE),
        (("--add_noise", "--animate"), ALWAYS | DIGITS | NOISY | PLANE | {"manifold.gif"}),
        (("--add_noise", "--PRR=False"), ALWAYS | PLANE),
        (("--PMLR=False",), ALWAYS | DIGITS),
    ],
)
def test_flags_decide_what_is_drawn(scene, flags, expected):
    assert set(plot_names(" ".join(flags))) == expected
    if "--animate" in flags:
        pictures = plot_utils.draw(*scene, parse(*flags))
        assert set(pictures) == expected
        for name, content in pictures.items():
            assert Image.open(io.BytesIO(content)).format == name.rpartition(".")[2].upper()


def test_pictures_show_the_test_digits_and_what_the_network_makes_of_them(scene):
    state, digits = scene
    pictures = plot_utils.draw(state, digits, parse("--add_noise", "--PRR_resize_factor=2", "--seed=5"))
    x, x_corrupted = (images[:6] for images in digits.test)
    restored = state.network.reconstruct(x_corrupted).numpy()
    ends = digits.test[1][[0, 10]]  # the labels are 0 to 9, again and again
    ends[1] = digits.test[1][11]  # so 10 is a 0 as well, and the next digit of another class is 11
    z = state.network.encode(ends).numpy()
    line = state.network.decode(np.linspace(*z, plot_utils.INTERPOLATION_STEPS)).numpy()
    expected = {
        "input.png": plot_utils.png(plot_utils.tile(x, 3, 2, 2)),
        "input_noise.png": plot_utils.png(plot_utils.tile(x_corrupted, 3, 2, 2)),
        "reconstruction.png": plot_utils.png(plot_utils.tile(restored, 3, 2, 2)),
        "denoising.png": plot_utils.comparison([x, x_corrupted, restored], 3, 2, 2),
        "samples.png": plot_utils.png(plot_utils.tile(state.network.sample(6, (5, 0)).numpy(), 3, 2, 2)),
        "interpolation.png": plot_utils.interpolation(ends[:1], line[None], ends[1:]),
    }
    for name, png in expected.items():
        shown = decode(pictures[name])
        if name == "interpolation.png":
            assert len(shown) == 28 * plot_utils.N_INTERPOLATIONS
            shown = shown[:28]  # the first line
        np.testing.assert_allclose(shown, decode(png), atol=1)  # batches of other sizes round differently


def test_pictures_of_the_latent_plane_show_the_means_and_a_grid(scene, monkeypatch):
    state, digits = scene
    for name in ("manifold", "latent_map"):
        monkeypatch.setattr(plot_utils, name, lambda *arguments: arguments)
    flags = parse("--PMLR_n_samples=40", "--PMLR_resize_factor=2", "--PMLR_z_range=1.5")
    pictures = plot_utils.draw(state, digits, flags)
    mean = state.network.encode(digits.test[1]).numpy()
    z, labels, axes = pictures["latent_map.png"]
    assert axes == ("$z_1$", "$z_2$")
    np.testing.assert_allclose(z, mean[:40], atol=1e-5)
    np.testing.assert_array_equal(labels, digits.test_labels[:40])

    images, z_x, z_y, resize_factor = pictures["manifold.png"]
    widths = np.maximum(1, mean.std(axis=0))  # of a Gaussian that holds the digits, too
    assert widths.max() > widths.min() + 0.1
    np.testing.assert_allclose(z_x, plot_utils.manifold_axis(5, 1.5, widths[0]), rtol=1e-4)
    np.testing.assert_allclose(z_y, plot_utils.manifold_axis(4, 1.5, widths[1])[::-1], rtol=1e-4)
    grid = [[x, y] for y in z_y for x in z_x]
    np.testing.assert_allclose(images, state.network.decode(grid), atol=1e-5)
    assert resize_factor == 2


def test_posteriors_are_of_the_test_digits(scene):
    """The picture's window, the density in it and the encoder's Gaussian."""
    state, digits = scene
    x, windows, log_joints, mean, std, particles = plot_utils.Scene(state, digits, parse()).posteriors()
    n = plot_utils.N_POSTERIORS
    np.testing.assert_array_equal(x, digits.test[0][:n])
    means, log_vars = state.network.encoder(digits.test[1][:n])
    np.testing.assert_allclose(mean, means)
    np.testing.assert_allclose(std**2, np.exp(log_vars), rtol=1e-5)
    assert particles is None
    steps = len(windows[1])
    np.testing.assert_allclose(windows[1].mean(axis=0), mean[1], atol=1e-4)
    density = np.asarray(log_joints[1]).reshape(steps, steps)
    z = np.array([[windows[1][7, 0], windows[1][50, 1]]])  # a column and a row
    assert density[50, 7] == pytest.approx(float(state.network.log_joint(x[1:2], z)[0, 0]), rel=1e-5)


def test_layers_are_of_the_upper_z_and_of_both(scene):
    _, digits = scene
    network = vae.Ladder(dim_z=2, n_hidden=16, dim_z_lower=4)
    for output in network.encoder_output, network.upper_output, network.lower_output, network.decoder_output:
        output.kernel.assign(60 * output.kernel)
    state = SimpleNamespace(network=network, history=HISTORY, frames=[])
    _, layers = plot_utils.PICTURES["layers.png"]
    png = layers(plot_utils.Scene(state, digits, parse("--model=ladder")))
    x, x_corrupted = (images[:6] for images in digits.test)
    upper, both = network.decode(network.encode(x_corrupted)), network.reconstruct(x_corrupted)
    assert np.abs(upper - both).max() > 0.1
    expected = plot_utils.comparison([x, upper.numpy(), both.numpy()], 3, 2)
    np.testing.assert_allclose(decode(png).astype(int), decode(expected).astype(int), atol=1)


def test_lines_run_between_different_classes(scene):
    state, digits = scene
    labels = np.random.default_rng(0).integers(0, 2, 60)
    one_class = plot_utils.Scene(state, digits, parse())
    one_class.labels = np.zeros(60)
    assert len(one_class.lines()[2]) == plot_utils.N_INTERPOLATIONS  # they have to end somewhere
    mixed = plot_utils.Scene(state, digits, parse())
    mixed.labels = labels
    starts, _, ends = mixed.lines()
    of = {image.tobytes(): label for image, label in zip(digits.test[1], labels, strict=True)}
    for start, end in zip(starts, ends, strict=True):
        assert of[start.tobytes()] != of[end.tobytes()]


def test_a_map_of_many_dimensions_shows_the_principal_components(scene, monkeypatch):
    state, digits = scene
    monkeypatch.setattr(plot_utils, "latent_map", lambda *arguments: arguments)
    network = vae.VAE(dim_z=5, n_hidden=16)
    network.encoder_output.kernel.assign(60 * network.encoder_output.kernel)
    state = SimpleNamespace(network=network, history=HISTORY, frames=[])
    z, _, axes = plot_utils.draw(state, digits, parse("--dim_z=5"))["latent_map.png"]
    mean = network.encode(digits.test[1]).numpy()
    mean = mean - mean.mean(axis=0)
    _, sizes, components = np.linalg.svd(mean)
    np.testing.assert_allclose(np.abs(z), np.abs(mean @ components[:2].T), atol=1e-3)
    for name, size, axis in zip(("first", "second"), sizes, axes, strict=False):
        assert axis == f"{name} principal component of z, {size**2 / (sizes**2).sum():.0%} of the variance"
    for flags, wanted in (("--dim_z=1", False), ("--dim_z=5 --PMLR=False", False), ("--PMLR=False", False)):
        assert ("latent_map.png" in plot_names(flags)) == wanted


def plot_names(flags):
    """Returns the names of the pictures that flags ask for."""
    flags = parse(*flags.split())
    return [name for name, (wanted, _) in plot_utils.PICTURES.items() if wanted(flags)]


def test_animation_is_of_manifolds_of_limited_size(scene, monkeypatch):
    state, digits = scene
    for name in ("manifold", "animation"):
        monkeypatch.setattr(plot_utils, name, lambda *arguments: arguments)
    flags = parse("--animate")
    pictures = plot_utils.draw(state, digits, flags)
    assert pictures["manifold.gif"] == (state.frames,)
    frame = plot_utils.frame(state, digits, flags)
    expected = plot_utils.tile(pictures["manifold.png"][0], 5, 4)
    np.testing.assert_allclose(frame.astype(int), expected.astype(int), atol=1)
    assert plot_utils.frame(state, digits, parse("--PMLR_n_img_x=20", "--PMLR_n_img_y=10")).shape == (
        200,
        400,
    )
