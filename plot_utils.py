"""The pictures: `draw` makes all that the flags ask for, as the bytes of a PNG or GIF each.

Digits are white on black. A batch of them is (n, 784) with values in [0, 1], and fills a grid of n_x
columns and n_y rows from the top left, row by row.
"""

import io
import math

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image  # comes with Matplotlib
from scipy.ndimage import zoom
from scipy.special import ndtr, ndtri

DPI = 100
GAP = 6  # pixels between groups of digits
N_INTERPOLATIONS, INTERPOLATION_STEPS = 10, 10
N_POSTERIORS, POSTERIOR_REACH, POSTERIOR_STEPS = 6, 6, 61  # digits; deviations to each side; points across

# An animation's frame of 20 by 20 digits takes some 35 kB as a GIF: with all grey levels it would be 80 kB.
FRAME_SIZE, FRAME_LEVELS = 400, 16  # pixels, the longer side; shades of grey
FRAME_SECONDS, LAST_FRAME_SECONDS = 0.2, 2

# The ten colours of Petroff (arXiv:2107.02270), chosen to differ for colour-blind readers too. Digits that
# lie close in the latent plane (3, 5 and 8; 4, 7 and 9) have the ones that differ most.
COLOURS = "92dadd 717581 832db6 94a4a2 3f90da ffa90e b9ac70 e76300 bd1f01 a96b59".split()  # noqa: SIM905

PICTURES = {  # file name: (whether the flags f ask for it, how it is drawn from the scene s)
    "input.png": (lambda f: f.PRR, lambda s: png(tile(s.x, *s.grid))),
    "input_noise.png": (lambda f: f.PRR and f.add_noise, lambda s: png(tile(s.x_corrupted, *s.grid))),
    "reconstruction.png": (lambda f: f.PRR, lambda s: png(tile(s.restored, *s.grid))),
    "denoising.png": (
        lambda f: f.PRR and f.add_noise,
        lambda s: comparison([s.x, s.x_corrupted, s.restored], *s.grid),
    ),
    "manifold.png": (lambda f: f.PMLR, lambda s: manifold(*s.manifold(), s.flags.PMLR_resize_factor)),
    "manifold.gif": (lambda f: f.PMLR and f.animate, lambda s: animation(s.state.frames)),
    "latent_map.png": (lambda f: f.PMLR is not False and f.dim_z > 1, lambda s: latent_map(*s.points())),
    "samples.png": (lambda f: True, lambda s: png(tile(s.samples, *s.grid))),
    "interpolation.png": (lambda f: True, lambda s: interpolation(*s.lines())),
    "posterior.png": (lambda f: f.PMLR and f.model != "ladder", lambda s: posterior(*s.posteriors())),
    "simplex.png": (lambda f: f.PMLR and f.model == "stick_breaking", lambda s: simplex(*s.sticks())),
    "layers.png": (
        lambda f: f.PRR and f.model == "ladder",
        lambda s: comparison([s.x, s.decode(s.mean[: len(s.x)]), s.restored], *s.grid),
    ),
    "elbo.png": (lambda f: True, lambda s: elbo_curves(s.state.history, s.flags.keep_prob)),
}


@matplotlib.style.context("default")  # whatever matplotlibrc says
def draw(state, digits, flags):
    """Returns all pictures that the flags ask for, {file name: bytes}, of a state of training."""
    scene = Scene(state, digits, flags)
    return {name: picture(scene) for name, (wanted, picture) in PICTURES.items() if wanted(flags)}


class Scene:
    """What is on the pictures: test digits and what the network makes of them, as arrays."""

    def __init__(self, state, digits, flags):
        self.network, self.state, self.flags = state.network, state, flags
        n = flags.PRR_n_img_x * flags.PRR_n_img_y
        self.grid = flags.PRR_n_img_x, flags.PRR_n_img_y, flags.PRR_resize_factor
        self.clean, self.inputs = digits.test
        self.x, self.x_corrupted, self.labels = self.clean[:n], self.inputs[:n], digits.test_labels
        self.mean = np.concatenate([self.network.encode(part) for part in np.array_split(self.inputs, 10)])
        self.restored = self.network.reconstruct(self.x_corrupted).numpy()
        self.samples = self.network.sample(n, (flags.seed, 0)).numpy()

    def decode(self, z):
        """Returns the images (..., 784) of latent vectors z: (..., dim_z)."""
        return self.network.decode(z.reshape(-1, z.shape[-1])).numpy().reshape(*z.shape[:-1], -1)

    def lines(self):
        """Digits, images decoded along the line from their latent means to those of others, these others."""
        n, other = N_INTERPOLATIONS, self.labels[:, None] != self.labels[:N_INTERPOLATIONS]
        ends = [n + i + np.argmax(other[n + i :, i]) for i in range(n)]  # the next ones of another class
        z = np.linspace(self.mean[:n], self.mean[ends], INTERPOLATION_STEPS, axis=1)
        return self.inputs[:n], self.decode(z), self.inputs[ends]

    def points(self):
        """The map's points, (n, 2), labels, (n,), and axes: z, or its first two principal components."""
        n, centred = self.flags.PMLR_n_samples, self.mean - self.mean.mean(axis=0)
        if self.mean.shape[1] == 2:
            return self.mean[:n], self.labels[:n], ("$z_1$", "$z_2$")
        variances, components = np.linalg.eigh(np.cov(centred.T))
        first, second = variances[:-3:-1] / variances.sum()
        text = "{} principal component of z, {:.0%} of the variance"
        axes = text.format("first", first), text.format("second", second)
        return (centred @ components[:, :-3:-1])[:n], self.labels[:n], axes

    def posteriors(self):
        """Digits, windows of the plane, log p(x, z) there, the encoder's means and deviations, particles."""
        x, inputs, network = self.clean[:N_POSTERIORS], self.inputs[:N_POSTERIORS], self.network
        mean, log_var = (array.numpy() for array in network.encoder(inputs))
        std = np.exp(log_var / 2)
        steps = np.linspace(-POSTERIOR_REACH, POSTERIOR_REACH, POSTERIOR_STEPS, dtype=np.float32)
        windows = mean[:, None] + steps[:, None] * std.max(axis=1)[:, None, None]  # (n, steps, 2)
        grids = [np.stack(np.meshgrid(*window.T), axis=-1).reshape(-1, 2) for window in windows]
        log_joints = [network.log_joint(x[i : i + 1], grid)[0] for i, grid in enumerate(grids)]
        draws = getattr(network, "particles", None)  # of a model whose q is no Gaussian
        particles = draws(inputs, 100, seed=(self.flags.seed, 1)) if draws else None
        return x, windows, log_joints, mean, std, particles

    def sticks(self):
        """The three sticks that the test digits' latent means stand for, (n, 3), and the labels, (n,)."""
        n = self.flags.PMLR_n_samples
        return self.network.sticks(self.mean[:n]).numpy(), self.labels[:n]

    def manifold(self):
        """The images decoded on a grid, (rows * columns, 784), and the z of its columns and of its rows."""
        flags = self.flags
        width = np.maximum(1, self.mean.std(axis=0))  # the prior's, or the digits' if that is wider
        z_x = manifold_axis(flags.PMLR_n_img_x, flags.PMLR_z_range, width[0])
        z_y = manifold_axis(flags.PMLR_n_img_y, flags.PMLR_z_range, width[1])[::-1]
        return self.decode(np.stack(np.meshgrid(z_x, z_y), axis=-1).reshape(-1, 2)), z_x, z_y


def grey_levels(images):
    """Returns images in [0, 1] as uint8 from 0 to 255; what is outside is clipped."""
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)


def tile(images, n_x, n_y, resize_factor=1.0):
    """Returns n_x * n_y images, (..., 784), each resized, as one picture: (height, width) uint8."""
    images = images.reshape(-1, 28, 28)
    if resize_factor != 1:
        images = zoom(images, (1, resize_factor, resize_factor), order=3, mode="nearest", grid_mode=True)
    levels = grey_levels(images)
    height, width = levels.shape[1:]
    return levels.reshape(n_y, n_x, height, width).swapaxes(1, 2).reshape(n_y * height, n_x * width)


def comparison(batches, n_x, n_y, resize_factor=1.0):
    """PNG of batches of images, (n_x * n_y, 784): below each of the first its counterparts in the others."""
    pictures = [tile(images, n_x, n_y, resize_factor) for images in batches]
    groups = np.concatenate([picture.reshape(n_y, -1, picture.shape[1]) for picture in pictures], axis=1)
    groups = np.pad(groups, ((0, 0), (0, GAP), (0, 0)), constant_values=255)
    return png(np.concatenate(groups)[:-GAP])


def pairs(x, reconstructed, resize_factor):
    """PNG of the first 100 of images x: (n, 784), each above its reconstruction."""
    n = min(len(x), 100)
    n_x, n_y = min(n, 10), math.ceil(n / 10)
    batches = [np.pad(images[:n], ((0, n_x * n_y - n), (0, 0))) for images in (x, reconstructed)]
    return comparison(batches, n_x, n_y, resize_factor)


def interpolation(starts, lines, ends):
    """PNG with one row per pair of images: starts (n, 784), lines (n, steps, 784) and ends (n, 784)."""
    n, n_steps, _ = lines.shape
    gap = np.full((28 * n, GAP), 255, np.uint8)
    return png(np.hstack([tile(starts, 1, n), gap, tile(lines, n_steps, n), gap, tile(ends, 1, n)]))


def manifold_axis(n, z_range, width):
    """Returns n numbers from -z_range to z_range, in equal steps of probability under N(0, width^2)."""
    # The lower half, mirrored: near 1, probabilities lose digits.
    lower = width * ndtri(np.linspace(0.5, ndtr(-z_range / width), n)[::-1][::2])
    return np.concatenate([lower, -lower[::-1][n % 2 :]])


def manifold(images, z_x, z_y, resize_factor=1.0):
    """PNG of the images decoded at each z of a grid: (len(z_y) * len(z_x), 784), with z along the axes."""
    canvas = tile(images, len(z_x), len(z_y), resize_factor)
    height, width = canvas.shape
    left, bottom, right, top = 60, 50, 10, 10  # pixels around the digits, which stay one to one
    size = np.array([left + width + right, bottom + height + top])
    figure = Figure(size / DPI, dpi=DPI)
    axes = figure.add_axes((*(left, bottom) / size, *(width, height) / size), frame_on=False)
    # A unit of the axes is a digit, since equal steps of probability are no equal steps of z.
    edges = (-0.5, len(z_x) - 0.5, len(z_y) - 0.5, -0.5)
    axes.imshow(np.stack([canvas] * 3, axis=-1), interpolation="none", aspect="auto", extent=edges)
    axes.tick_params(length=0)  # marks would reach into the outer digits
    for axis, z, space in ((axes.xaxis, z_x, width // 50), (axes.yaxis, z_y, height // 20)):
        n_ticks = min(len(z), 10, max(2, space))  # more run into each other
        ticks = np.rint(np.linspace(0, len(z) - 1, n_ticks)).astype(int)
        axis.set_ticks(ticks, [f"{z[tick]:.2f}" for tick in ticks])
    axes.set_xlabel("$z_1$")
    axes.set_ylabel("$z_2$", labelpad=0)
    return file_content(figure.savefig, format="png")


def frame(state, digits, flags):
    """Returns the manifold as a frame of the animation: (height, width) uint8."""
    images, z_x, z_y = Scene(state, digits, flags).manifold()
    return tile(images, len(z_x), len(z_y), min(1, FRAME_SIZE / (28 * max(len(z_x), len(z_y)))))


def animation(frames):
    """GIF of frames: (n, height, width) uint8, over and over, with a rest at the last."""
    step = 255 / (FRAME_LEVELS - 1)
    levels = np.rint(np.rint(np.stack(frames) / step) * step).astype(np.uint8)
    first, *others = map(Image.fromarray, levels)
    milliseconds = [1_000 * FRAME_SECONDS] * len(others) + [1_000 * LAST_FRAME_SECONDS]
    more = {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0}
    return file_content(first.save, format="gif", **more)


def latent_map(z, labels, axes_labels=("$z_1$", "$z_2$")):
    """PNG of points z: (n, 2) of the latent space, coloured by their labels: (n,) from 0 to 9."""
    figure = Figure((8, 7), dpi=DPI)
    axes = figure.add_axes((0.08, 0.08, 0.8, 0.9))  # a layout engine would take half of the time
    scatter(axes, z, labels)
    axes.set_aspect("equal", "datalim")
    axes.set(xlabel=axes_labels[0], ylabel=axes_labels[1])
    return file_content(figure.savefig, format="png")


def posterior(x, windows, log_joints, means, stds, particles=None):
    """PNG of p(z|x) in the plane for some digits, exact up to its grid, and what the encoder makes of it.

    x: (n, 784); windows: (n, steps, 2), the grid's z along both axes; log_joints: (steps^2,) each, row by
    row. The ellipses are one and two deviations, (n, 2), from the encoder's mean, (n, 2).
    """
    figure = Figure((9, 6.2), dpi=DPI)
    angles = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    for i, axes in enumerate(figure.subplots(2, math.ceil(len(x) / 2)).flat):
        n_steps, log_joint = len(windows[i]), np.asarray(log_joints[i])
        density = np.exp(log_joint - log_joint.max()).reshape(n_steps, n_steps)
        extent = windows[i][[0, -1]].T.ravel()
        axes.imshow(density, origin="lower", extent=extent, aspect="auto", cmap="magma")
        for deviations in (1, 2):
            axes.plot(*(means[i][:, None] + deviations * stds[i][:, None] * circle), "c-", linewidth=1)
        if particles is not None:
            axes.plot(*np.asarray(particles)[:, i].T, "c.", markersize=3)
        axes.set(xlim=extent[:2], ylim=extent[2:])
        axes.tick_params(labelsize=7)
        inset = axes.inset_axes((0.02, 0.72, 0.26, 0.26))
        inset.imshow(x[i].reshape(28, 28), cmap="gray")
        inset.set_axis_off()
    figure.subplots_adjust(0.04, 0.05, 0.99, 0.98)  # a layout engine would take a second
    return file_content(figure.savefig, format="png")


def simplex(sticks, labels):
    """PNG of sticks: (n, 3), which add up to 1, in the triangle of their shares, coloured by labels: (n,)."""
    corners = np.array([[0, 0], [1, 0], [0.5, math.sqrt(0.75)]])
    figure = Figure((8, 7), dpi=DPI)
    axes = figure.add_axes((0.05, 0.05, 0.83, 0.9))
    scatter(axes, sticks @ corners, labels)
    axes.plot(*corners[[0, 1, 2, 0]].T, color="black", linewidth=0.8)
    names, aligned = ("first stick", "second stick", "the rest"), ("top", "top", "bottom")
    for corner, name, align in zip(corners, names, aligned, strict=True):
        axes.text(*corner, name, ha="center", va=align)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return file_content(figure.savefig, format="png")


def scatter(axes, points, labels):
    """Draws points: (n, 2), coloured by their labels: (n,) from 0 to 9, with a legend."""
    for digit, colour in enumerate(COLOURS):
        axes.scatter(*points[labels == digit].T, s=5, color=f"#{colour}", label=str(digit), linewidths=0)
    axes.legend(title="digit", markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))


def elbo_curves(history, keep_prob):
    """PNG of the training and the validation ELBO by epoch, from the rows of log.csv."""
    figure = Figure((7, 5), dpi=DPI)
    axes = figure.add_axes((0.13, 0.1, 0.85, 0.88))
    epochs, dropout = [row["epoch"] for row in history], "with annealed" if keep_prob < 1 else "without"
    curves = {part: [row[f"{part}_elbo"] for row in history] for part in ("train", "valid")}
    axes.plot(epochs, curves["train"], "o--", markersize=3, label=f"training, {dropout} dropout")
    axes.plot(epochs, curves["valid"], "o-", markersize=3, label="validation, without dropout")
    # From a fifth of the epochs on: the first ones would press the curves together.
    shown = np.array([curve[(len(epochs) - 1) // 5 :] for curve in curves.values()])
    margin = 0.05 * np.ptp(shown) + 0.1
    axes.set_ylim(shown.min() - margin, shown.max() + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", ylabel="ELBO, nats per image")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return file_content(figure.savefig, format="png")


def file_content(save, **options):
    """Returns as bytes what save(file, **options) writes."""
    file = io.BytesIO()
    save(file, **options)
    return file.getvalue()


def png(pixels):
    """Returns grey levels: (height, width) uint8 as the bytes of a PNG."""
    return file_content(Image.fromarray(pixels).save, format="png")
