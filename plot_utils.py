"""The pictures: `draw` returns those that the flags ask for, each as the bytes of a PNG or GIF.

Digits are white on black. A batch of them is (n, n_pixels) with values in [0, 1], and fills a grid of n_x
columns and n_y rows from the top left, row by row.
"""

import contextlib
import io
import math
from functools import cached_property
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.backend_bases import MouseButton, TimerBase
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image  # comes with Matplotlib
from scipy.ndimage import zoom

DPI = 100
GAP = 6  # pixels between groups of digits
N_INTERPOLATIONS = 10  # rows
INTERPOLATION_STEPS = 10  # images per row
PLANES_PER_ROW = 5  # if each class has its own plane
PLANE_GAP = 30  # pixels
N_POSTERIORS = 6  # digits
POSTERIOR_REACH = 6  # standard deviations to each side of the mean
POSTERIOR_STEPS = 61  # points across
N_PARTICLES = 100

FRAME_SIZE = 400  # pixels, the longer side of a plane; half of that if each class has its own
FRAME_LEVELS = 16  # shades of grey: a frame of 20 by 20 digits takes 35 kB, with all 256 levels 80 kB
FRAME_SECONDS = 0.2
LAST_FRAME_SECONDS = 2

# The ten colours of Petroff (arXiv:2107.02270), which colour-blind readers can tell apart, too. Digits that
# lie close in the latent plane (3, 5 and 8; 4, 7 and 9) have the ones that differ most.
COLOURS = (
    "#92dadd", "#717581", "#832db6", "#94a4a2", "#3f90da",  # 0 to 4
    "#ffa90e", "#b9ac70", "#e76300", "#bd1f01", "#a96b59",  # 5 to 9
)  # fmt: skip
N_CLASSES = len(COLOURS)


@matplotlib.style.context("default")  # whatever matplotlibrc says
def draw(state, digits, flags, measured=None, names=None):
    """Returns the pictures that the flags ask for, {file name: bytes}, or of these only the named ones.

    measured: the measurements of each test digit after training, {name: (n, ...)}.
    """
    data = PlotData(state.network, digits, flags, state.history, state.frames, measured)
    pictures = {}
    for name, draw_picture in PICTURES.items():
        if names is not None and name not in names:
            continue
        content = draw_picture(data)
        if content is not None:
            pictures[name] = content
    return pictures


def frame(network, digits, flags):
    """Returns the manifold as a frame of the animation: (height, width) uint8."""
    planes, z_x, z_y = PlotData(network, digits, flags).manifold
    size = FRAME_SIZE if len(planes) == 1 else FRAME_SIZE / 2
    longer_side = math.isqrt(planes.shape[-1]) * max(len(z_x), len(z_y))
    pictures = [tile(images, len(z_x), len(z_y), min(1, size / longer_side)) for images in planes]
    rows = [pictures[i : i + PLANES_PER_ROW] for i in range(0, len(pictures), PLANES_PER_ROW)]
    return np.block(rows)


class PlotData:
    """What the pictures show: test digits, and arrays computed from them, each when it is first used."""

    def __init__(self, network, digits, flags, history=(), frames=(), measured=None):
        self.network = network
        self.flags = flags
        self.history = history
        self.frames = frames
        self.measured = measured
        self.valid = digits.valid
        self.test = digits.test
        self.labels = digits.test.labels
        self.grid = (flags.PRR_n_img_x, flags.PRR_n_img_y, flags.PRR_resize_factor)
        self.n_shown = flags.PRR_n_img_x * flags.PRR_n_img_y
        self.x = digits.test.targets[: self.n_shown]
        self.x_corrupted = digits.test.inputs[: self.n_shown]

    def decode(self, z, labels=None):
        """Returns the images (..., n_pixels) for latent vectors z: (..., dim_z).

        labels: their classes, (...), for a network that has classes.
        """
        labels = None if labels is None else np.ravel(labels)
        images = self.network.decode(z.reshape(-1, z.shape[-1]), labels).numpy()
        return images.reshape(*z.shape[:-1], images.shape[-1])

    def decode_as_every_class(self, z):
        """Returns the images, (n, 10, n_pixels), for each of z: (n, dim_z) together with each class."""
        labels = np.tile(np.arange(N_CLASSES), (len(z), 1))
        return self.decode(np.repeat(z[:, np.newaxis], N_CLASSES, axis=1), labels)

    @cached_property
    def mean(self):
        """Latent means of all test digits: (n, dim_z)."""
        if self.measured:
            return self.measured["mean"]
        return self.encode(self.test)

    def encode(self, batch):
        """Returns the latent means of a batch of any size: (n, dim_z)."""
        parts = []
        for start in range(0, len(batch.labels), 1_000):  # the particles of 10,000 digits would take 1 GB
            rows = slice(start, start + 1_000)
            parts.append(self.network.encode(batch.inputs[rows], batch.labels[rows]))
        return np.concatenate(parts)

    @cached_property
    def restored(self):
        """Reconstructions of the digits that are shown: (n_shown, n_pixels)."""
        return self.network.reconstruct(self.x_corrupted, self.labels[: self.n_shown]).numpy()

    @cached_property
    def samples(self):
        """Decoded draws from the prior: (n_shown, n_pixels)."""
        return self.network.sample(self.n_shown, (self.flags.seed, 0)).numpy()

    @cached_property
    def interpolations(self):
        """Start digits (n, n_pixels), images decoded along the lines (n, steps, n_pixels), and end digits.

        The first n digits are starts. Line i ends at the first digit from number n + i on that is of another
        class. In a network with classes, where z holds only the style, it ends at one of the same class and
        stays in it. If there is no such digit, it ends at number n + i.
        """
        n = N_INTERPOLATIONS
        has_classes = self.network.has_classes
        ends = []
        for start in range(n):
            is_same_class = self.labels[n + start :] == self.labels[start]
            is_candidate = is_same_class if has_classes else ~is_same_class
            ends.append(n + start + np.argmax(is_candidate))  # the first candidate; 0 if there is none
        z = np.linspace(self.mean[:n], self.mean[ends], INTERPOLATION_STEPS, axis=1)
        labels = np.repeat(self.labels[:n], INTERPOLATION_STEPS) if has_classes else None
        return self.test.inputs[:n], self.decode(z, labels), self.test.inputs[ends]

    @cached_property
    def latent_points(self):
        """The latent map's points, (n, 2), and the labels of both axes."""
        plane = latent_plane(self.mean)
        return plane.project(self.mean[: self.flags.PMLR_n_samples]), plane.axis_labels

    @cached_property
    def manifold(self):
        """The images decoded on a grid, and the z of its columns and rows.

        The images are (planes, rows * columns, n_pixels), with a plane for each class if there are classes.
        """
        mean = self.encode(self.valid)  # half as many as test digits, since frames need them every epoch
        z_x = self.manifold_axis(mean[:, 0], self.flags.PMLR_n_img_x)
        z_y = self.manifold_axis(mean[:, 1], self.flags.PMLR_n_img_y)[::-1]  # upwards
        z = grid_points(z_x, z_y)
        if self.network.has_classes:
            return self.decode_as_every_class(z).swapaxes(0, 1), z_x, z_y
        return self.decode(z)[np.newaxis], z_x, z_y

    def manifold_axis(self, mean, n):
        """Returns n numbers from -z_range to z_range, in equal steps of probability under the prior.

        The prior is stretched to the standard deviation of the digits' means, (n_digits,), if that is above
        1, so that all classes show. A prior without quantiles is replaced by the distribution of the means.
        """
        z_range = self.flags.PMLR_z_range
        prior = self.network.prior
        if prior.quantile is None:
            p = equal_steps(np.mean(mean < -z_range), np.mean(mean <= z_range), n)
            return np.clip(np.quantile(mean, p), -z_range, z_range)
        width = max(1.0, mean.std())
        z = width * prior.quantile(equal_steps(prior.cdf(-z_range / width), prior.cdf(z_range / width), n))
        if n > 1:
            z[[0, -1]] = -z_range, z_range  # exactly, although probabilities near 1 lose precision
        return z

    def posterior(self, i):
        """The exact p(z|x) and the encoder's q(z|x) of test digit i, on a grid of the plane around q's mean.

        Returns the grid's z along both axes, (steps, 2); log p(x, z) and log q(z|x), (steps, steps) each, a
        row for each z_2; and log q at its mean.
        """
        row = slice(i, i + 1)
        posterior = self.network.posterior
        q = self.network.encoder(self.test.inputs[row], self.labels[row])
        mean, log_var = posterior.moments(q)
        reach = POSTERIOR_REACH * np.exp(np.max(log_var) / 2)
        steps = np.linspace(-reach, reach, POSTERIOR_STEPS, dtype=np.float32)
        window = np.asarray(mean) + steps[:, None]
        z = grid_points(window[:, 0], window[:, 1])
        shape = (POSTERIOR_STEPS, POSTERIOR_STEPS)
        log_joint = self.network.log_joint(self.test.targets[row], z).numpy().reshape(shape)
        log_q = posterior.log_prob(z, q).numpy().reshape(shape)
        return window, log_joint, log_q, float(posterior.log_prob(mean, q)[0])

    @cached_property
    def particles(self):
        """A Stein VAE's draws of z for the first digits: (N_PARTICLES, N_POSTERIORS, 2)."""
        inputs = self.test.inputs[:N_POSTERIORS]
        return self.network.particles(inputs, N_PARTICLES, seed=(0, 1)).numpy()


class LatentPlane(NamedTuple):
    """The plane of z that a map shows: z = origin + directions @ point."""

    origin: np.ndarray  # (dim_z,)
    directions: np.ndarray  # (dim_z, 2), orthonormal
    axis_labels: tuple[str, str]

    def project(self, z):
        """Returns the points, (n, 2), of latent vectors z: (n, dim_z)."""
        return (z - self.origin) @ self.directions


def latent_plane(mean):
    """Returns the plane for latent means, (n, dim_z): z itself, or its first two principal components."""
    if mean.shape[1] == 2:
        return LatentPlane(np.zeros(2, mean.dtype), np.eye(2, dtype=mean.dtype), ("$z_1$", "$z_2$"))
    variances, components = np.linalg.eigh(np.cov(mean.T))  # in ascending order
    shares = variances / variances.sum()
    first = f"first principal component of z, {shares[-1]:.0%} of the variance"
    second = f"second principal component of z, {shares[-2]:.0%} of the variance"
    return LatentPlane(mean.mean(axis=0), components[:, [-1, -2]], (first, second))


def equal_steps(low, high, n):
    """Returns n numbers from low to high, or their middle if n is 1."""
    return np.linspace(low, high, n) if n > 1 else np.array([(low + high) / 2])


def grid_points(z_x, z_y):
    """Returns the points of a grid, row by row: (len(z_y) * len(z_x), 2)."""
    grid_x, grid_y = np.meshgrid(z_x, z_y)
    return np.stack([grid_x.ravel(), grid_y.ravel()], axis=1)


# --- One function per picture: each returns a file's bytes, or None where the flags do not ask for it --


def draw_input(data):
    """The first test digits."""
    return png(tile(data.x, *data.grid)) if data.flags.PRR else None


def draw_input_noise(data):
    """The same digits with noise."""
    return png(tile(data.x_corrupted, *data.grid)) if data.flags.PRR and data.flags.add_noise else None


def draw_reconstruction(data):
    """Their reconstructions."""
    return png(tile(data.restored, *data.grid)) if data.flags.PRR else None


def draw_denoising(data):
    """Clean, noisy and restored digits, one above the other."""
    if not (data.flags.PRR and data.flags.add_noise):
        return None
    return stacked_rows([data.x, data.x_corrupted, data.restored], *data.grid)


def draw_layers(data):
    """Digits, their reconstructions from a ladder's upper z alone, and those from both layers."""
    if not (data.flags.PRR and data.flags.model == "ladder"):
        return None
    upper = data.decode(data.mean[: data.n_shown])
    return stacked_rows([data.x, upper, data.restored], *data.grid)


def draw_samples(data):
    """Decoded draws from the prior."""
    return png(tile(data.samples, *data.grid))


def draw_interpolation(data):
    """Straight lines in the latent space, a row per pair of digits: see `PlotData.interpolations`."""
    starts, lines, ends = data.interpolations
    n, n_steps, _ = lines.shape
    return png(side_by_side([tile(starts, 1, n), tile(lines, n_steps, n), tile(ends, 1, n)]))


def draw_classes(data):
    """Draws of z from the prior, each decoded as all ten classes: a row per z, a column per class."""
    if not data.network.has_classes:
        return None
    n = data.flags.PRR_n_img_y
    z = data.network.prior.sample(n, data.flags.dim_z, (data.flags.seed, 1)).numpy()
    return png(tile(data.decode_as_every_class(z), N_CLASSES, n, data.flags.PRR_resize_factor))


def draw_analogies(data):
    """The first test digits, as the encoder sees them, and the z of each, its style, as all ten classes."""
    if not (data.flags.PRR and data.network.has_classes):
        return None
    n = data.flags.PRR_n_img_y
    images = data.decode_as_every_class(data.mean[:n])
    factor = data.flags.PRR_resize_factor
    inputs = data.x_corrupted[:n]
    return png(side_by_side([tile(inputs, 1, n, factor), tile(images, N_CLASSES, n, factor)]))


def draw_manifold(data):
    """The decoded latent plane with its z along the axes, after figure 4 of Kingma and Welling.

    If there are classes, each has a plane: 0 to 4 above, 5 to 9 below.
    """
    if not data.flags.draws_manifold:
        return None
    planes, z_x, z_y = data.manifold
    n_columns = min(len(planes), PLANES_PER_ROW)
    n_rows = len(planes) // n_columns
    canvases = [tile(images, len(z_x), len(z_y), data.flags.PMLR_resize_factor) for images in planes]
    height, width = canvases[0].shape
    left, bottom, right, top = 60, 50, 10, 10  # pixels around the digits, which stay one to one
    total_width = left + n_columns * width + (n_columns - 1) * PLANE_GAP + right
    total_height = bottom + n_rows * height + (n_rows - 1) * PLANE_GAP + top
    figure = Figure((total_width / DPI, total_height / DPI), dpi=DPI)
    # A unit of the axes is a digit, since equal steps of probability are not equal steps of z.
    edges = (-0.5, len(z_x) - 0.5, len(z_y) - 0.5, -0.5)
    for i, canvas in enumerate(canvases):
        row, column = divmod(i, n_columns)
        x = left + column * (width + PLANE_GAP)
        y = bottom + (n_rows - 1 - row) * (height + PLANE_GAP)
        box = (x / total_width, y / total_height, width / total_width, height / total_height)
        axes = figure.add_axes(box, frame_on=False)
        rgb = np.stack([canvas, canvas, canvas], axis=-1)
        axes.imshow(rgb, interpolation="none", aspect="auto", extent=edges)
        axes.tick_params(length=0)  # marks would reach into the outer digits
        axes.set(xticks=[], yticks=[])
        if row == n_rows - 1:
            label_with_z(axes.xaxis, z_x, width // 50)
            axes.set_xlabel("$z_1$")
        if column == 0:
            label_with_z(axes.yaxis, z_y, height // 20)
            axes.set_ylabel("$z_2$", labelpad=0)
    return file_content(figure.savefig, format="png")


def label_with_z(axis, z, n_fitting):
    """Labels an axis of digits with their z: (n,), at no more than ten ticks and no more than fit."""
    n_ticks = min(len(z), 10, max(2, n_fitting))
    ticks = np.rint(np.linspace(0, len(z) - 1, n_ticks)).astype(int)
    rounded = np.round(z[ticks], 2) + 0.0  # without the sign of -0.00
    axis.set_ticks(ticks, [f"{number:.2f}" for number in rounded])


def draw_animation(data):
    """A GIF of the manifold, epoch by epoch: looping, pausing on the last frame."""
    if not (data.flags.draws_manifold and data.flags.animate):
        return None
    step = 255 / (FRAME_LEVELS - 1)
    levels = np.rint(np.rint(np.stack(data.frames) / step) * step).astype(np.uint8)
    images = [Image.fromarray(pixels) for pixels in levels]
    milliseconds = [1_000 * FRAME_SECONDS] * len(images)
    milliseconds[-1] = 1_000 * LAST_FRAME_SECONDS
    options = {"save_all": True, "append_images": images[1:], "duration": milliseconds, "loop": 0}
    return file_content(images[0].save, format="gif", **options)


def draw_latent_map(data):
    """The test digits' latent means, coloured by class."""
    if not data.flags.draws_latent_map:
        return None
    points, axis_labels = data.latent_points
    figure = Figure((8, 7), dpi=DPI)
    axes = figure.add_axes((0.08, 0.08, 0.8, 0.9))  # a layout engine would double the time
    scatter(axes, points, data.labels[: len(points)])
    axes.set_aspect("equal", "datalim")
    axes.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
    return file_content(figure.savefig, format="png")


def draw_posterior(data):
    """p(z|x) of some test digits, exact up to the grid, and the encoder's q(z|x) as contours.

    On these, log q is 1/2 and 2 below its value at the mean: for a Gaussian, one and two standard deviations.
    """
    if not (data.flags.draws_manifold and data.network.has_log_joint):
        return None
    figure = Figure((9, 6.2), dpi=DPI)
    side = math.isqrt(data.network.n_pixels)
    for i, axes in enumerate(figure.subplots(2, N_POSTERIORS // 2).flat):
        window, log_joint, log_q, log_q_at_mean = data.posterior(i)
        z_1 = window[:, 0]
        z_2 = window[:, 1]
        density = np.exp(log_joint - log_joint.max())
        extent = (z_1[0], z_1[-1], z_2[0], z_2[-1])
        axes.imshow(density, origin="lower", extent=extent, aspect="auto", cmap="magma")
        levels = (log_q_at_mean - 2, log_q_at_mean - 0.5)
        axes.contour(z_1, z_2, log_q, levels, colors="c", linestyles="solid", linewidths=1)
        if data.flags.model == "stein":
            axes.plot(data.particles[:, i, 0], data.particles[:, i, 1], "c.", markersize=3)
        axes.set(xlim=extent[:2], ylim=extent[2:])
        axes.tick_params(labelsize=7)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("$z_1$", labelpad=1)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("$z_2$", labelpad=1)
        inset = axes.inset_axes((0.02, 0.72, 0.26, 0.26))
        inset.imshow(data.test.targets[i].reshape(side, side), cmap="gray")
        inset.set_axis_off()
    title = "p(z|x), and contours of the encoder's q(z|x) at one and two standard deviations"
    if data.flags.model == "stein":
        title += "; dots: its particles"
    figure.suptitle(title, fontsize="medium")
    figure.subplots_adjust(0.06, 0.07, 0.99, 0.94)  # a layout engine would take a second
    return file_content(figure.savefig, format="png")


def draw_simplex(data):
    """The test digits by the lengths of their three pieces of the stick, in a triangle, coloured by class."""
    if not (data.flags.draws_manifold and data.flags.model == "stick_breaking"):
        return None
    sticks = data.network.sticks(data.mean[: data.flags.PMLR_n_samples]).numpy()  # (n, 3), which sum to 1
    corners = np.array([[0, 0], [1, 0], [0.5, math.sqrt(0.75)]])
    outline = corners[[0, 1, 2, 0]]
    figure = Figure((8, 7), dpi=DPI)
    axes = figure.add_axes((0.05, 0.05, 0.83, 0.9))
    scatter(axes, sticks @ corners, data.labels[: len(sticks)])
    axes.plot(outline[:, 0], outline[:, 1], color="black", linewidth=0.8)
    axes.text(*corners[0], "first piece", ha="center", va="top")
    axes.text(*corners[1], "second piece", ha="center", va="top")
    axes.text(*corners[2], "the rest", ha="center", va="bottom")
    axes.set_aspect("equal")
    axes.set_axis_off()
    return file_content(figure.savefig, format="png")


def scatter(axes, points, labels):
    """Draws points: (n, 2), coloured by their labels: (n,) from 0 to 9, with a legend."""
    for digit, colour in enumerate(COLOURS):
        own = points[labels == digit]
        axes.scatter(own[:, 0], own[:, 1], s=5, color=colour, label=str(digit), linewidths=0)
    axes.legend(title="digit", markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_worst(data):
    """The test digits with the lowest ELBO, each above its reconstruction."""
    if not (data.flags.PRR and data.measured):
        return None
    worst = np.argsort(data.measured["elbo"], kind="stable")[: data.n_shown]
    decoded = data.network.reconstruct(data.test.inputs[worst], data.labels[worst]).numpy()
    return stacked_rows([data.test.targets[worst], decoded], *data.grid)


def draw_elbo(data):
    """Training and validation ELBO by epoch."""
    figure = Figure((7, 5), dpi=DPI)
    axes = figure.add_axes((0.13, 0.1, 0.85, 0.88))
    epochs = [row["epoch"] for row in data.history]
    train = [row["train_elbo"] for row in data.history]
    valid = [row["valid_elbo"] for row in data.history]
    dropout = "with annealed" if data.flags.keep_prob < 1 else "without"
    axes.plot(epochs, train, "o--", markersize=3, label=f"training, {dropout} dropout")
    axes.plot(epochs, valid, "o-", markersize=3, label="validation, without dropout")
    axes.set_ylim(elbo_limits([train, valid]))
    label_curves(axes, "ELBO, nats per image")
    return file_content(figure.savefig, format="png")


def label_curves(axes, ylabel):
    """Labels the axes of curves by epoch, and the curves."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def elbo_limits(curves):
    """Returns the limits of an axis that shows curves of ELBOs, lists of one value per epoch."""
    # The first fifth of the epochs would press the curves together.
    shown = np.concatenate([curve[(len(curve) - 1) // 5 :] for curve in curves])
    margin = 0.05 * np.ptp(shown) + 0.1
    return np.min(shown) - margin, np.max(shown) + margin


PICTURES = {
    "input.png": draw_input,
    "input_noise.png": draw_input_noise,
    "reconstruction.png": draw_reconstruction,
    "denoising.png": draw_denoising,
    "layers.png": draw_layers,
    "samples.png": draw_samples,
    "interpolation.png": draw_interpolation,
    "classes.png": draw_classes,
    "analogies.png": draw_analogies,
    "manifold.png": draw_manifold,
    "manifold.gif": draw_animation,
    "latent_map.png": draw_latent_map,
    "posterior.png": draw_posterior,
    "simplex.png": draw_simplex,
    "worst.png": draw_worst,
    "elbo.png": draw_elbo,
}
# Those that are drawn while the network is trained.
PROGRESS_PICTURES = (
    "reconstruction.png",
    "denoising.png",
    "samples.png",
    "manifold.png",
    "latent_map.png",
    "elbo.png",
)
# Those of every epoch with --epoch_plots, and the beginnings of their names: as in the well-known example.
EPOCH_PICTURES = {"reconstruction.png": "PRR", "manifold.png": "PMLR"}


# --- Arrays to pictures -------------------------------------------------------------------------------


def grey_levels(images):
    """Returns images in [0, 1] as uint8 from 0 to 255; values outside are clipped."""
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)


def tile(images, n_x, n_y, resize_factor=1.0):
    """Returns n_x * n_y images, (..., n_pixels), each resized, as one picture: (height, width) uint8."""
    side = math.isqrt(images.shape[-1])
    images = images.reshape(-1, side, side)
    if resize_factor != 1:
        images = zoom(images, (1, resize_factor, resize_factor), order=3, mode="nearest", grid_mode=True)
    _, height, width = images.shape
    rows = grey_levels(images).reshape(n_y, n_x, height, width).swapaxes(1, 2)
    return rows.reshape(n_y * height, n_x * width)


def side_by_side(pictures):
    """Returns pictures of the same height as one, with gaps between them: (height, width) uint8."""
    gap = np.full((len(pictures[0]), GAP), 255, np.uint8)
    parts = []
    for picture in pictures:
        parts += [picture, gap]
    return np.hstack(parts[:-1])


def stacked_rows(batches, n_x, n_y, resize_factor=1.0):
    """PNG of batches of images, (n_x * n_y, n_pixels): each image of the first above its counterparts."""
    pictures = [tile(images, n_x, n_y, resize_factor) for images in batches]
    height = len(pictures[0]) // n_y
    gap = np.full((GAP, pictures[0].shape[1]), 255, np.uint8)
    strips = []
    for row in range(n_y):
        strips += [picture[row * height : (row + 1) * height] for picture in pictures]
        strips.append(gap)
    return png(np.concatenate(strips[:-1]))


def reconstruction_pairs(x, reconstructed, resize_factor):
    """PNG of the first 100 of images x: (n, n_pixels), each above its reconstruction."""
    n = min(len(x), 100)
    n_x = min(n, 10)
    n_y = math.ceil(n / 10)
    missing = np.zeros((n_x * n_y - n, x.shape[1]))  # black, to fill the last row
    batches = [np.concatenate([images[:n], missing]) for images in (x, reconstructed)]
    return stacked_rows(batches, n_x, n_y, resize_factor)


def file_content(save, **options):
    """Returns as bytes what save(file, **options) writes."""
    file = io.BytesIO()
    save(file, **options)
    return file.getvalue()


def png(pixels):
    """Returns grey levels, (height, width) uint8, as the bytes of a PNG."""
    return file_content(Image.fromarray(pixels).save, format="png")


# --- Comparing runs -----------------------------------------------------------------------------------


@matplotlib.style.context("default")
def draw_comparison(groups, labels):
    """PNG of validation curves and, below, of the pictures in the runs' folders.

    The runs of a group differ by the seed alone: the curve is their mean, the band their range. labels: for
    each group, the list of settings that tell it from the others, or else the name of its folder.
    """
    rows = [("reconstruction.png",), ("samples.png",), ("classes.png", "manifold.png", "latent_map.png")]
    n = len(groups)
    figure = Figure((max(8, 3 * n), 15), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1 + len(rows), n, height_ratios=[1.5, 1, 1, 1])
    curves = figure.add_subplot(grid[0, :])
    all_elbos = []  # of each run
    for group, label in zip(groups, labels, strict=True):
        elbos = np.array([[epoch["valid_elbo"] for epoch in run.history] for run in group])
        epochs = np.arange(1, elbos.shape[1] + 1)
        name = ", ".join(label)
        if len(group) > 1:
            name += f" ({len(group)} seeds)"
        (curve,) = curves.plot(epochs, elbos.mean(axis=0), "o-", markersize=3, label=name)
        curves.fill_between(epochs, elbos.min(axis=0), elbos.max(axis=0), color=curve.get_color(), alpha=0.2)
        all_elbos += list(elbos)
    label_curves(curves, "validation ELBO, nats per image")
    curves.set_ylim(elbo_limits(all_elbos))
    for i, names in enumerate(rows, 1):
        for j, group in enumerate(groups):
            axes = figure.add_subplot(grid[i, j])
            axes.set_axis_off()
            files = [run.folder / name for name in names for run in group]
            file = next((file for file in files if file.exists()), None)
            if file:
                axes.imshow(Image.open(file).convert("RGB"))
                # A line per setting, because columns are narrow.
                lines = [*labels[j], f"{file.parent.name}/{file.name}"]
                axes.set_title("\n".join(lines), fontsize="small", parse_math=False)
    return file_content(figure.savefig, format="png")


# --- Exploring the latent space -----------------------------------------------------------------------

PAPER_SIDE = 140  # pixels; the side of the square to write in, five times that of a digit
PEN_RADIUS = 6  # pixels
REDRAW_MILLISECONDS = 10


@contextlib.contextmanager
def window():
    """Yields a figure for a window, which `Explorer.show` opens; RuntimeError without a display."""
    import matplotlib.pyplot as plt

    figure = plt.figure("the latent space", figsize=(12, 7))
    try:
        if type(figure.canvas.new_timer()) is TimerBase:  # which never fires: the backend has no event loop
            raise RuntimeError("there is no display")
        yield figure
    finally:
        plt.close(figure)


class Explorer:
    """Decodes the point of the map under the mouse, and shows where a digit that the user writes lies on it.

    decode: from z, (1, dim_z), and a class, (1,), to an image, (1, n_pixels). examine: from ink in [0, 1],
    (PAPER_SIDE, PAPER_SIDE), to the written digit's z, its reconstruction, its ELBO and its class, -1 if that
    is not known. has_classes: whether keys choose the class that is decoded.
    """

    @matplotlib.style.context("default")
    def __init__(self, figure, mean, labels, decode, examine, has_classes):
        self.figure = figure
        self.decode = decode
        self.examine = examine
        self.plane = latent_plane(mean)
        self.map = figure.add_axes((0.05, 0.08, 0.43, 0.88))
        scatter(self.map, self.plane.project(mean), labels)
        self.map.set_aspect("equal", "datalim")
        self.map.set(xlabel=self.plane.axis_labels[0], ylabel=self.plane.axis_labels[1])
        blank = np.zeros((PAPER_SIDE, PAPER_SIDE))
        self.decoded = self.add_square((0.67, 0.56, 0.21, 0.38), "decoded under the mouse", blank)
        self.paper = self.add_square((0.56, 0.08, 0.21, 0.38), "write a digit here; e erases it", blank)
        self.restored = self.add_square((0.78, 0.08, 0.21, 0.38), "its reconstruction", blank)
        (self.marker,) = self.map.plot([], [], "k*", markersize=16, markeredgecolor="white")
        self.elbo = self.restored.axes.text(PAPER_SIDE / 2, 1.1 * PAPER_SIDE, "", ha="center")
        self.decoded_class = self.decoded.axes.text(PAPER_SIDE / 2, 1.1 * PAPER_SIDE, "", ha="center")
        self.has_classes = has_classes
        self.choose_class(0)
        # Where the backend supports it, only these are redrawn, on a copy of the rest: many times as fast.
        self.changing = [
            self.decoded,
            self.decoded_class,
            self.paper,
            self.restored,
            self.marker,
            self.elbo,
        ]
        for artist in self.changing:
            artist.set_animated(figure.canvas.supports_blit)
        self.background = None
        self.ink = blank
        self.pen = None  # where the pen touched the paper last, (2,)
        self.place = None  # of the mouse on the map, (2,)
        self.is_decoded = True  # whether the image of that place is shown
        self.ink_has_changed = False  # since it was examined
        for name in ("motion_notify_event", "button_press_event", "button_release_event"):
            figure.canvas.mpl_connect(name, self.on_mouse)
        figure.canvas.mpl_connect("key_press_event", self.on_key)
        figure.canvas.mpl_connect("draw_event", self.on_draw)
        # Events only note what is to be done, and the timer does it: they cannot pile up.
        self.timer = figure.canvas.new_timer(REDRAW_MILLISECONDS, [(self.update, (), {})])

    def add_square(self, box, title, image):
        """Adds an image with a title; returns the image."""
        axes = self.figure.add_axes(box)
        axes.set_title(title, fontsize="medium")
        axes.set(xticks=[], yticks=[])
        return axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, PAPER_SIDE, PAPER_SIDE, 0))

    def show(self):
        """Opens the window and waits until it is closed."""
        import matplotlib.pyplot as plt

        self.timer.start()
        plt.show(block=True)

    def on_mouse(self, event):
        """Notes where the mouse is; draws a stroke while its button is pressed on the paper."""
        if self.figure.canvas.widgetlock.locked():  # panning or zooming
            return
        point = np.array([event.xdata, event.ydata]) if event.inaxes else None
        if event.inaxes is self.map:
            self.place = point
            self.is_decoded = False
        is_pressed = event.button == MouseButton.LEFT and event.name != "button_release_event"
        if event.inaxes is self.paper.axes and is_pressed:
            self.write(point)
        else:
            self.pen = None

    def write(self, point):
        """Draws a stroke on the paper from where the pen was to a point."""
        start = point if self.pen is None else self.pen
        stroke = point - start
        centres = np.arange(PAPER_SIDE) + 0.5
        from_start = grid_points(centres, centres).reshape(PAPER_SIDE, PAPER_SIDE, 2) - start
        # Each pixel's nearest point of the stroke: 0 at its start, 1 at its end.
        along = np.clip(from_start @ stroke / max(stroke @ stroke, 1e-9), 0, 1)
        distance = np.linalg.norm(from_start - along[..., np.newaxis] * stroke, axis=-1)
        self.ink = np.maximum(self.ink, np.clip(PEN_RADIUS + 1 - distance, 0, 1))
        self.pen = point
        self.ink_has_changed = True

    def on_key(self, event):
        """The key e erases the digit; 0 to 9 choose the class. Matplotlib itself uses none of them."""
        if event.key == "e":
            self.ink = np.zeros_like(self.ink)
            self.ink_has_changed = True
        elif self.has_classes and event.key in list("0123456789"):
            self.choose_class(int(event.key))
            if self.place is not None:
                self.is_decoded = False  # the place is decoded again, as the new class
            self.draw_on_background(self.changing)

    def choose_class(self, label):
        """Sets the class that is decoded together with z."""
        self.label = np.array([label], np.int32)
        if self.has_classes:
            self.decoded_class.set_text(f"class {label}; press 0 to 9 to change it")

    def on_draw(self, event):
        """Keeps a copy of what does not change."""
        canvas = self.figure.canvas
        if canvas.supports_blit and not canvas.is_saving():
            self.background = canvas.copy_from_bbox(self.figure.bbox)
            self.draw_on_background(self.changing)

    def draw_on_background(self, artists):
        """Draws some of what changes, or lets the backend draw all of the figure."""
        canvas = self.figure.canvas
        if self.background is None:
            canvas.draw_idle()
            return
        if artists == [self.decoded]:  # which is opaque
            area = self.decoded.axes.bbox
        else:
            area = self.figure.bbox
            canvas.restore_region(self.background)
        for artist in artists:
            artist.axes.draw_artist(artist)
        canvas.blit(area)

    def update(self):
        """Decodes where the mouse is now and examines what is written now, if that has changed."""
        if not self.is_decoded:
            z = self.plane.origin + self.plane.directions @ self.place
            self.decoded.set_data(square(self.decode(z[np.newaxis].astype(np.float32), self.label)))
            self.is_decoded = True
            self.draw_on_background([self.decoded])
        if self.ink_has_changed:
            self.show_written()
            self.ink_has_changed = False
            self.draw_on_background(self.changing)

    def show_written(self):
        """Shows the written digit, where it lies on the map, its reconstruction and its ELBO."""
        self.paper.set_data(self.ink)
        if not self.ink.any():
            self.marker.set_data([], [])
            self.restored.set_data(self.ink)
            self.elbo.set_text("")
            return
        z, restored, elbo, label = self.examine(self.ink)
        point = self.plane.project(z)
        self.marker.set_data(point[:1], point[1:])
        self.restored.set_data(square(restored))
        found = f"class {label}, " if label >= 0 else ""
        self.elbo.set_text(f"{found}ELBO {elbo:.1f} nats")


def square(image):
    """Returns an image with n_pixels numbers as (side, side)."""
    side = math.isqrt(np.size(image))
    return np.reshape(image, (side, side))
