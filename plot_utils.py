"""The pictures: arrays in, the bytes of a PNG or GIF out.

Digits are white on black. A batch of them is (n, 784) with values in [0, 1], and fills a grid of n_x
columns and n_y rows from the top left, row by row.
"""

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image  # comes with Matplotlib
from scipy.ndimage import zoom
from scipy.special import ndtr, ndtri

DPI = 100
GAP = 6  # pixels between groups of digits

# An animation's frame of 20 by 20 digits takes some 35 kB as a GIF: with all grey levels it would be 80 kB.
FRAME_SIZE = 400  # pixels, the longer side
FRAME_LEVELS = 16  # shades of grey
FRAME_SECONDS = 0.2
LAST_FRAME_SECONDS = 2

# The ten colours of Petroff (arXiv:2107.02270), chosen to differ for colour-blind readers too. Digits that
# lie close in the latent plane (3, 5 and 8; 4, 7 and 9) have the ones that differ most.
DIGIT_COLOURS = (
    "#92dadd",
    "#717581",
    "#832db6",
    "#94a4a2",
    "#3f90da",
    "#ffa90e",
    "#b9ac70",
    "#e76300",
    "#bd1f01",
    "#a96b59",
)


def tile(images, n_x, n_y, resize_factor=1.0):
    """Returns n_x * n_y images: (n_x * n_y, 784), each resized, as one picture: (height, width, 3) uint8."""
    images = images.reshape(-1, 28, 28)
    if resize_factor != 1:
        images = zoom(images, (1, resize_factor, resize_factor), order=3, mode="nearest", grid_mode=True)
    levels = np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)
    height, width = levels.shape[1:]
    canvas = levels.reshape(n_y, n_x, height, width).swapaxes(1, 2).reshape(n_y * height, n_x * width)
    return np.stack([canvas] * 3, axis=-1)  # RGB: through a colour map, levels may come out one darker


def image_grid(images, n_x, n_y, resize_factor=1.0):
    """PNG of n_x * n_y images: (n_x * n_y, 784), one pixel of it a pixel of theirs times resize_factor."""
    return png_of_pixels(tile(images, n_x, n_y, resize_factor))


def comparison(batches, n_x, n_y, resize_factor=1.0):
    """PNG of batches of images: (n_x * n_y, 784) each; a digit of the first has those of the others below."""
    grids = [tile(images, n_x, n_y, resize_factor) for images in batches]
    rows = [np.split(grid, n_y) for grid in grids]
    groups = np.stack([np.concatenate(group) for group in zip(*rows, strict=True)])
    groups = np.pad(groups, ((0, 0), (0, GAP), (0, 0), (0, 0)), constant_values=255)
    return png_of_pixels(np.concatenate(groups)[:-GAP])


def interpolation(starts, lines, ends):
    """PNG with a row a pair of images: its start: (n, 784), its line: (n, steps, 784), its end: (n, 784)."""
    n, n_steps, _ = lines.shape
    gap = np.full((28 * n, GAP, 3), 255, np.uint8)
    line = tile(lines.reshape(n * n_steps, 784), n_steps, n)
    return png_of_pixels(np.concatenate([tile(starts, 1, n), gap, line, gap, tile(ends, 1, n)], axis=1))


def manifold_axes(n_x, n_y, z_range):
    """Returns the z values of a manifold's columns, left to right, and of its rows, top to bottom.

    They run from -z_range to z_range (upwards, for the rows) in equal steps of probability under the
    prior, through the inverse Gaussian CDF, as in figure 4 of Kingma and Welling.
    """

    def quantiles(n):
        return ndtri(np.linspace(ndtr(-z_range), ndtr(z_range), n)) if n > 1 else np.zeros(1)

    return quantiles(n_x), quantiles(n_y)[::-1]


def manifold(images, z_x, z_y, resize_factor=1.0):
    """PNG of the images decoded at each z of a grid: (len(z_y) * len(z_x), 784), with z along the axes."""
    canvas = tile(images, len(z_x), len(z_y), resize_factor)
    height, width, _ = canvas.shape
    left, bottom, right, top = 60, 50, 10, 10  # pixels around the digits, which stay one to one
    total_x, total_y = left + width + right, bottom + height + top
    figure = Figure((total_x / DPI, total_y / DPI), dpi=DPI)
    axes = figure.add_axes(
        (left / total_x, bottom / total_y, width / total_x, height / total_y), frame_on=False
    )
    # A unit of the axes is a digit, since equal steps of probability are no equal steps of z.
    edges = (-0.5, len(z_x) - 0.5, len(z_y) - 0.5, -0.5)
    axes.imshow(canvas, interpolation="none", aspect="auto", extent=edges)
    axes.tick_params(length=0)  # marks would reach into the outer digits
    for axis, z, space in ((axes.xaxis, z_x, width // 50), (axes.yaxis, z_y, height // 20)):
        n_ticks = min(len(z), 10, max(2, space))  # more run into each other
        ticks = np.rint(np.linspace(0, len(z) - 1, n_ticks)).astype(int)
        axis.set_ticks(ticks, [f"{z[tick]:.2f}" for tick in ticks])
    axes.set_xlabel("$z_1$")
    axes.set_ylabel("$z_2$", labelpad=0)
    return png_of(figure)


def frame(images, n_x, n_y):
    """Returns a manifold's images: (n_x * n_y, 784) as a frame of an animation: (height, width) uint8."""
    resize_factor = min(1, FRAME_SIZE / (28 * max(n_x, n_y)))
    return tile(images, n_x, n_y, resize_factor)[..., 0]


def animation(frames):
    """GIF of frames: (n, height, width) uint8, over and over, with a rest at the last."""
    steps = 255 / (FRAME_LEVELS - 1)
    first, *others = (
        Image.fromarray(np.rint(np.rint(frame / steps) * steps).astype(np.uint8)) for frame in frames
    )
    milliseconds = [1_000 * FRAME_SECONDS] * len(others) + [1_000 * LAST_FRAME_SECONDS]
    gif = io.BytesIO()
    first.save(gif, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)
    return gif.getvalue()


def latent_map(z, labels):
    """PNG of points z: (n, 2) in the latent plane, coloured by their labels: (n,) from 0 to 9."""
    figure = Figure((8, 7), dpi=DPI)
    axes = figure.add_axes((0.08, 0.08, 0.8, 0.9))  # a layout engine would take half of the time
    for digit, colour in enumerate(DIGIT_COLOURS):
        points = z[labels == digit]
        axes.scatter(*points.T, s=5, color=colour, label=str(digit), linewidths=0)
        if len(points):
            x, y = np.median(points, axis=0)
            outline = [withStroke(linewidth=3, foreground="white")]
            axes.text(
                x, y, str(digit), fontsize=18, weight="bold", ha="center", va="center", path_effects=outline
            )
    axes.set_aspect("equal", "datalim")
    axes.set_xlabel("$z_1$")
    axes.set_ylabel("$z_2$")
    axes.legend(title="digit", markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5))
    return png_of(figure)


def elbo_curves(train_elbo, valid_elbo):
    """PNG of the training and the validation ELBO in nats per image, a value an epoch each."""
    figure = Figure((7, 5), dpi=DPI)
    axes = figure.add_axes((0.13, 0.1, 0.85, 0.88))
    epochs = np.arange(1, len(train_elbo) + 1)
    for elbo, name, style in (
        (train_elbo, "training", "o--"),
        (valid_elbo, "validation", "o-"),
    ):
        axes.plot(epochs, elbo, style, markersize=3, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.set_ylabel("ELBO, nats per image")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return png_of(figure)


def png_of_pixels(pixels):
    """Returns pixels: (height, width, 3) uint8 as the bytes of a PNG."""
    png = io.BytesIO()
    imsave(png, pixels, format="png")
    return png.getvalue()


def png_of(figure):
    """Returns a figure as the bytes of a PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
