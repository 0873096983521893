"""The user's own digits, as photographed and as filed by strangers; missing data and packages."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_mentions, files, one_line
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter

import mnist_data
import run_main
from mnist_data import UserError, read_digits

SIDE = 600  # pixels of a simulated photograph


# --- Photographs: grey levels (height, width) from 0 to 255 -------------------------------------------


def scan(digits, places, size=(SIDE, SIDE), height=300):
    """A clean scan of digits, (n, 28, 28) uint8, at places (top, left): dark ink on white paper."""
    grey = np.full(size, 255.0)
    for digit, (top, left) in zip(digits, places, strict=True):
        large = Image.fromarray(digit).resize((height, height), Image.Resampling.LANCZOS)
        grey[top : top + height, left : left + height] -= 215 / 255 * np.asarray(large, float)
    return grey


def saved(grey, **options):
    """The same, saved to a file and read again."""
    file = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(file, **options)
    return np.asarray(Image.open(file), float)


def light_from_one_side(grey):
    return grey * np.linspace(1, 0.75, grey.shape[1])


def vignette(grey):
    y, x = np.mgrid[-1 : 1 : len(grey) * 1j, -1 : 1 : grey.shape[1] * 1j]
    return grey * (1 - 0.2 * (x**2 + y**2))


def shadow(grey):
    y, x = np.mgrid[: len(grey), : grey.shape[1]]
    return grey * gaussian_filter(np.where(2 * x + y > 1_000, 0.6, 1), 6)


def squared_paper(grey):
    grey = grey.copy()
    for k in range(15, len(grey), 40):
        grey[k : k + 2] = np.minimum(grey[k : k + 2], 200)
        grey[:, k : k + 2] = np.minimum(grey[:, k : k + 2], 200)
    return grey


def frame(grey):
    return np.pad(grey[8:-8, 8:-8], 8, constant_values=20)


def printed_box(grey):
    return np.pad(frame(grey[25:-25, 25:-25]), 25, constant_values=255)


def edge_of_the_sheet(grey):
    y, x = np.mgrid[: len(grey), : grey.shape[1]]
    return np.where(y + 0.1 * x > 580, 60, grey)


def dust(grey):
    rng = np.random.default_rng(1)
    grey = grey.copy()
    for y, x in rng.integers(5, len(grey) - 9, (12, 2)):
        grey[y : y + 4, x : x + 3] = 40
    return grey


def noise(grey):
    return grey + np.random.default_rng(0).normal(0, 8, grey.shape)


def blur(grey):
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(2)), float)


def jpeg(grey):
    return saved(grey, format="JPEG", quality=30)


def chalk(grey):
    return noise(255 - 0.7 * grey)


def glare(grey):
    y, x = np.mgrid[: len(grey), : grey.shape[1]]
    return grey / 2 + 130 * np.exp(-((x - 80) ** 2 + (y - 80) ** 2) / 5_000)


def everything(grey):
    return jpeg(noise(vignette(light_from_one_side(edge_of_the_sheet(squared_paper(dust(grey)))))))


PHOTOGRAPHS = [light_from_one_side, vignette, shadow, squared_paper, frame, printed_box, edge_of_the_sheet]
PHOTOGRAPHS += [dust, noise, blur, jpeg, chalk, glare, everything]


def read(grey, tmp_path):
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(tmp_path / "photo.png")
    return read_digits([tmp_path / "photo.png"])


@pytest.fixture(scope="module")
def digits(mnist):
    return mnist.test_images[:20].reshape(-1, 28, 28)


@pytest.mark.parametrize("photograph", PHOTOGRAPHS)
def test_a_digit_is_the_same_in_every_photograph(digits, tmp_path, photograph):
    """As in a clean scan; a pixel of the box in which it is cut out shifts it by half a pixel."""
    errors = []
    for digit in digits[:10]:
        clean = scan([digit], [(160, 150)])
        (expected,), _ = read(clean, tmp_path)
        assert np.abs(expected - digit.reshape(784) / 255).mean() < 0.07
        (x,), names = read(photograph(clean), tmp_path)
        assert names == [str(tmp_path / "photo.png")]
        errors.append(np.abs(x - expected).mean())
    assert np.median(errors) < 0.02
    assert max(errors) < 0.08


def test_a_digit_may_fill_the_picture(digits, tmp_path):
    for digit in digits:
        rows, columns = np.nonzero(digit)
        cut = np.pad(digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1], 2)
        large = Image.fromarray(255 - cut).resize(
            (20 * cut.shape[1], 20 * cut.shape[0]), Image.Resampling.BICUBIC
        )
        (x,), _ = read(np.asarray(large), tmp_path)
        assert np.abs(x - digit.reshape(784) / 255).mean() < 0.08


@pytest.mark.parametrize("height", [100, 280])
@pytest.mark.parametrize("photograph", [squared_paper, noise, chalk], ids=lambda function: function.__name__)
def test_several_digits_are_rows_in_reading_order(digits, tmp_path, height, photograph):
    """Two lines of writing, neither of them quite level."""
    places = [(30, 40), (45, 340), (25, 640), (390, 80), (370, 400), (395, 700)]
    shuffled = [4, 0, 5, 2, 1, 3]
    page = scan(digits[shuffled], [places[i] for i in shuffled], (720, 1_000), height)
    x, names = read(photograph(page), tmp_path)
    assert names == [f"{tmp_path / 'photo.png'}[{i}]" for i in range(6)]
    distances = np.abs(x[:, np.newaxis] - digits[:6].reshape(6, 784) / 255).mean(axis=-1)
    assert distances.argmin(axis=1).tolist() == list(range(6))
    assert distances.diagonal().max() < 0.09


def test_pieces_of_a_digit_stay_together(tmp_path):
    """A 5, whose bar is near to the rest, and a 1 farther away."""
    page = np.full((300, 400), 255.0)
    page[60:160, 80:95] = page[145:160, 80:150] = page[145:240, 135:150] = page[225:240, 80:150] = 0
    page[60:75, 104:150] = 0
    page[60:240, 300:315] = 0
    x, _ = read(page, tmp_path)
    assert len(x) == 2
    five, one = (x.reshape(-1, 28, 28) > 0.5).any(axis=1).sum(axis=1)
    assert (five, one) == (8, 2)
    page[60:75, 104:150] = 255
    page[20:35, 104:150] = 0  # a separate digit
    assert len(read(page, tmp_path)[0]) == 3


PAPER = np.full((SIDE, SIDE), 200.0)
BLANK = {
    "even": PAPER,
    "noise": noise(PAPER),
    "light": jpeg(noise(vignette(light_from_one_side(PAPER)))),
    "speck": np.pad(np.zeros((3, 3)), 200, constant_values=255),
}


@pytest.mark.parametrize("photograph", BLANK.values(), ids=BLANK)
def test_a_photograph_without_a_digit_is_an_error(tmp_path, photograph):
    with pytest.raises(UserError, match=r"photo.png: .*use a picture of [^\n]*$"):
        read(photograph, tmp_path)


# --- Files of pictures --------------------------------------------------------------------------------

STORED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how an upright picture is transposed, by orientation


def exif(*entries):
    """Returns an EXIF block of entries (tag, type, count, four bytes), little-endian."""
    block = b"Exif\0\0II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        block += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little") + value
    return block + bytes(4)


def orientation(kind=3, count=1, number=6):
    return 0x112, kind, count, number.to_bytes(4, "little")


ODD = {
    "of signed long": [orientation(kind=9)],
    "of bytes": [orientation(kind=1)],
    "of two": [orientation(count=2)],
    "signed width": [(0x100, 8, 1, b"\xff\xff\0\0"), orientation()],
    "text as resolution": [orientation(), (0x11A, 2, 4, b"abc\0")],
    "beyond the end": [orientation(), (0x131, 2, 9_999, b"\xff\xff\0\0")],
    "unknown type": [(0x10F, 99, 1, b"abcd"), orientation()],
    "odd sub-block": [orientation(), (0x8769, 2, 4, b"\xf0\xff\xff\xff")],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_orientation_is_read_from_odd_metadata(digits, tmp_path, capfd, name, suffix):
    grey = scan(digits[:1], [(160, 150)])
    image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    image.save(tmp_path / "upright.png")
    rotated = image.transpose(Image.Transpose.ROTATE_90)
    rotated.save(tmp_path / f"photo.{suffix}", exif=exif(*ODD[name]), quality=95)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, _ = read_digits([tmp_path / "upright.png", tmp_path / f"photo.{suffix}"])
    assert not caught
    assert capfd.readouterr().err == ""
    assert np.abs(x[0] - x[1]).mean() < 0.02


@pytest.mark.parametrize("number", range(1, 9))
def test_all_orientations(digits, tmp_path, number):
    image = Image.fromarray(scan(digits[:1], [(160, 150)]).clip(0, 255).astype(np.uint8))
    image.save(tmp_path / "0.png")
    stored = image if number == 1 else image.transpose(STORED[number])
    for name in ("1.png", "2.tif"):
        stored.save(tmp_path / name, exif=exif(orientation(number=number))[6:])
    x, _ = read_digits([tmp_path])
    np.testing.assert_array_equal(x[1:], x[[0, 0]])


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp"])
def test_further_frames_are_digits(digits, tmp_path, name):
    frames = [Image.fromarray(255 - digit) for digit in digits[:3]]
    options = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    x, names = read_digits([tmp_path / name])
    np.testing.assert_allclose(x, digits[:3].reshape(3, 784) / 255, atol=0.01)
    assert names == [f"{tmp_path / name}[{i}]" for i in range(3)]


def test_the_thumbnail_in_a_tiff_is_no_digit(digits, tmp_path):
    page, thumbnail = [Image.fromarray(255 - digit) for digit in digits[:2]]
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    page.save(tmp_path / "a.tif", save_all=True, append_images=[thumbnail])
    with Image.open(tmp_path / "a.tif") as image:
        image.seek(1)
        assert image.tag_v2[254] == 1
    assert len(read_digits([tmp_path / "a.tif"])[0]) == 1


# --- Folders and arrays -------------------------------------------------------------------------------


@pytest.fixture
def folder(digits, tmp_path):
    """Digits in a stranger's folder, in the order of the test set, and other files."""
    folder = tmp_path / "mine"
    names = ["2.png", "10.png", "class 2/IMG_9.PNG", "class 2/IMG_10.PNG", "class 10/1.png"]
    for name, digit in zip(names, digits, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit).save(folder / name)
    np.save(folder / "more.npy", digits[5:7])
    (folder / "Thumbs.db").write_bytes(b"thumbs")
    (folder / "class 2" / "read me").write_text("mine")
    for hidden in (".hidden.png", "class 2/._IMG_9.PNG"):
        (folder / hidden).write_bytes(b"no picture")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "1.png").write_bytes(b"no picture")
    return folder


def test_a_folder_is_read_in_natural_order(digits, folder, capsys):
    x, names = read_digits([folder])
    order = ["2.png", "10.png", "class 2/IMG_9.PNG", "class 2/IMG_10.PNG", "class 10/1.png"]
    assert names == [str(folder / name) for name in [*order, "more.npy[0]", "more.npy[1]"]]
    np.testing.assert_allclose(x, digits[:7].reshape(7, 784) / 255, atol=0.01)
    (line,) = capsys.readouterr().out.splitlines()
    assert_mentions(line, ["skipped", "Thumbs.db", "read me"])


def test_a_damaged_picture_in_a_folder_is_an_error(folder):
    (folder / "class 2" / "IMG_10.PNG").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"IMG_10\.PNG: cannot identify"):
        read_digits([folder])


def test_a_folder_without_digits_says_so(tmp_path):
    (tmp_path / "mine").mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="mine: the folder has no pictures or arrays"):
            read_digits([tmp_path / "mine"])
        (tmp_path / "mine" / "Thumbs.db").touch()


def test_a_data_folder_gives_its_images(data_dir):
    """And not its labels."""
    _, names = read_digits([data_dir])
    assert (len(names), names[10_000]) == (70_000, f"{data_dir / mnist_data.TRAIN_IMAGES}[0]")


def test_repeated_flags_add_up():
    flags = run_main.parse_flags(["--reconstruct", "a", "b", "--reconstruct", "c"])
    assert flags.reconstruct == [Path("a"), Path("b"), Path("c")]
    assert run_main.parse_flags([]).reconstruct is None


# --- The program --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("--num_epochs=1", f"--results_path={folder}") == 0
    return folder


def test_each_row_has_its_file(trained, folder, tmp_path):
    out = tmp_path / "out"
    command = [f"--load={trained}", f"--results_path={out}", "--reconstruct", folder / "2.png"]
    assert run_main.main([*command, "--reconstruct", folder / "more.npy"]) == 0
    with np.load(out / "reconstructed.npz") as arrays:
        names = [str(folder / "2.png"), f"{folder / 'more.npy'}[0]", f"{folder / 'more.npy'}[1]"]
        assert arrays["file"].tolist() == names
        assert arrays["images"].shape == (3, 28, 28)
        assert len(arrays["z"]) == len(arrays["elbo"]) == 3


def test_many_digits_are_reconstructed_in_parts(trained, mnist, tmp_path, monkeypatch):
    np.save(tmp_path / "mine.npy", mnist.test_images[:2_500])
    network, _ = run_main.load(trained)
    sizes = set()
    reconstruct = type(network).reconstruct

    def counted(self, x, labels=None):
        sizes.add(len(x))
        return reconstruct(self, x, labels)

    monkeypatch.setattr(type(network), "reconstruct", counted)
    out = tmp_path / "out"
    flags = [f"--load={trained}", f"--results_path={out}", "--reconstruct", tmp_path / "mine.npy"]
    assert run_main.main(flags) == 0
    assert max(sizes) == 1_000
    with np.load(out / "reconstructed.npz") as arrays:
        expected = 255 * reconstruct(network, mnist.test_images[2_000:2_010] / np.float32(255))
        np.testing.assert_allclose(arrays["images"][2_000:2_010].reshape(10, 784), expected, atol=0.51)


@pytest.mark.parametrize("flag", ["--load={}", "--resume --results_path={}"])
def test_a_run_of_other_data_never_downloads_mnist(trained, tmp_path, capsys, monkeypatch, flag):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    config = json.loads((copy / "config.json").read_text())
    config["data_sha256"] = dict.fromkeys(config["data_sha256"], "0" * 64)
    config["flags"]["data_dir"] = str(tmp_path / "fashion")
    (copy / "config.json").write_text(json.dumps(config))
    before = files(tmp_path)
    monkeypatch.setattr(mnist_data, "download", None)
    assert run_main.main(flag.format(copy).split()) == 2
    error = one_line(capsys.readouterr().err)
    assert_mentions(error, [str(copy), f"--data_dir {tmp_path / 'fashion'} lacks", "not MNIST"])
    assert files(tmp_path) == before


@pytest.mark.parametrize("missing", ["numpy", "tensorflow"])
def test_without_a_package_a_line_says_what_to_install(tmp_path, missing):
    """In a Python that has the others only."""
    packages = Path(np.__file__).parent.parent
    for path in packages.iterdir():
        if path.name.partition(".")[0].partition("-")[0] != missing:
            (tmp_path / path.name).symlink_to(path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", str(ROOT / "run_main.py"), "--data_dir=new"]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert_mentions(one_line(result.stderr), [missing, "pip install -r", str(ROOT / "requirements.txt")])
    assert not (tmp_path / "new").exists()
