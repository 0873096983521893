"""--explore: the window on the latent space, with events of a mouse and a keyboard but without a screen."""

import contextlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_mentions, environment, files, one_line
from matplotlib.backend_bases import KeyEvent, MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import mnist_data
import run_main

run_main.import_tensorflow()
plot_utils = run_main.plot_utils
PLACES = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
LABELS = np.arange(50) % 10


class Network:
    """Stands in for decode and examine; counts their calls."""

    def __init__(self, found=-1):
        self.decoded = []
        self.examined = []
        self.found = found  # the class of a written digit

    def decode(self, z, label):
        self.decoded.append(z)
        self.label = label
        return np.full((1, 784), 0.1 * len(self.decoded))

    def examine(self, ink):
        self.examined.append(ink)
        return PLACES[0], np.full(784, 0.5), -123.25, self.found


def make_explorer(mean=PLACES, network=None, has_classes=False):
    network = network or Network()
    figure = Figure((12, 7), dpi=50)
    FigureCanvasAgg(figure)
    explorer = plot_utils.Explorer(figure, mean, LABELS, network.decode, network.examine, has_classes)
    figure.canvas.draw()
    return explorer, network


def mouse(explorer, name, axes, point, button=None):
    """Sends an event at a point in an axes' coordinates."""
    canvas = explorer.figure.canvas
    x, y = axes.transData.transform(point)
    canvas.callbacks.process(name, MouseEvent(name, canvas, x, y, button))


def write(explorer, *points):
    """Writes with the left button from point to point of the paper."""
    paper = explorer.paper.axes
    mouse(explorer, "button_press_event", paper, points[0], button=1)
    for point in points[1:]:
        mouse(explorer, "motion_notify_event", paper, point, button=1)
    mouse(explorer, "button_release_event", paper, points[-1], button=1)


def pixels(explorer):
    return np.asarray(explorer.figure.canvas.buffer_rgba()).astype(int)


@pytest.mark.quick
def test_moving_over_the_map_decodes_there():
    explorer, network = make_explorer()
    before = pixels(explorer)
    mouse(explorer, "motion_notify_event", explorer.map, (0.5, -0.25))
    assert network.decoded == []  # an event only notes the place
    explorer.update()
    np.testing.assert_allclose(network.decoded, [[[0.5, -0.25]]], atol=0.02)  # within a pixel
    assert (explorer.decoded.get_array() == 0.1).all()
    box = explorer.decoded.axes.bbox
    changed = np.argwhere((pixels(explorer) != before).any(axis=2))
    height = len(before)
    assert len(changed) > 1_000
    assert changed[:, 1].min() >= box.x0 - 1 and changed[:, 1].max() <= box.x1 + 1
    assert height - changed[:, 0].max() >= box.y0 - 1 and height - changed[:, 0].min() <= box.y1 + 1


def press(explorer, key):
    canvas = explorer.figure.canvas
    canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, key))


@pytest.mark.quick
def test_keys_choose_the_class_that_is_decoded():
    explorer, network = make_explorer(network=Network(found=7), has_classes=True)
    press(explorer, "4")  # nothing is there to be decoded yet
    explorer.update()
    assert network.decoded == []
    mouse(explorer, "motion_notify_event", explorer.map, (0.5, -0.25))
    explorer.update()
    assert network.label == [4]
    press(explorer, "9")
    explorer.update()
    assert network.label == [9]
    np.testing.assert_array_equal(network.decoded[0], network.decoded[1])
    assert "class 9" in explorer.decoded_class.get_text()
    write(explorer, (20, 20), (100, 100))
    explorer.update()
    assert explorer.elbo.get_text() == "class 7, ELBO -123.2 nats"


@pytest.mark.quick
def test_keys_choose_nothing_without_classes():
    explorer, network = make_explorer()
    mouse(explorer, "motion_notify_event", explorer.map, (0.5, -0.25))
    press(explorer, "4")
    explorer.update()
    assert network.label == [0]
    assert explorer.decoded_class.get_text() == ""


@pytest.mark.quick
def test_events_do_not_pile_up():
    explorer, network = make_explorer()
    for x in np.linspace(-1, 1, 100):
        mouse(explorer, "motion_notify_event", explorer.map, (x, 0))
    explorer.update()
    explorer.update()
    (z,) = network.decoded
    np.testing.assert_allclose(z, [[1, 0]], atol=0.02)


@pytest.mark.quick
def test_in_many_dimensions_the_map_is_of_principal_components():
    mean = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32) * [3, 1, 1, 1, 5] + 7
    explorer, network = make_explorer(mean)
    mouse(explorer, "motion_notify_event", explorer.map, (0, 0))
    explorer.update()
    np.testing.assert_allclose(network.decoded[0], mean.mean(axis=0)[np.newaxis], atol=0.2)
    plane = plot_utils.latent_plane(mean)
    assert np.abs(plane.directions[4]).max() > 0.9  # along the widest dimension
    z = plane.origin + plane.directions @ [1.5, -0.5]
    np.testing.assert_allclose(plane.project(z), [1.5, -0.5], atol=1e-5)


@pytest.mark.quick
def test_a_written_digit_is_examined_and_shown():
    explorer, network = make_explorer()
    write(explorer, (70, 30), (70, 110))
    explorer.update()
    (ink,) = network.examined
    assert ink.shape == (plot_utils.PAPER_SIDE, plot_utils.PAPER_SIDE)
    assert (ink[30:110, 70] == 1).all()  # rows are counted from the top, as on the paper
    assert ink[:20].max() == ink[:, :60].max() == ink[:, 80:].max() == 0
    np.testing.assert_array_equal(explorer.paper.get_array(), ink)
    assert (explorer.restored.get_array() == 0.5).all()
    assert explorer.elbo.get_text() == "ELBO -123.2 nats"
    np.testing.assert_allclose(np.ravel(explorer.marker.get_data()), PLACES[0])
    write(explorer, (20, 20), (40, 20))  # a second stroke is not joined to the first
    assert explorer.ink[60, 30] == 0
    assert explorer.ink[20, 30] == 1


@pytest.mark.quick
def test_a_stroke_needs_the_left_button_on_the_paper():
    explorer, network = make_explorer()
    for button in (None, 2, 3):
        mouse(explorer, "motion_notify_event", explorer.paper.axes, (70, 70), button)
    mouse(explorer, "motion_notify_event", explorer.restored.axes, (70, 70), button=1)
    explorer.update()
    assert not explorer.ink.any()
    assert network.examined == network.decoded == []


@pytest.mark.quick
def test_e_erases_and_no_key_of_the_toolbar_is_e():
    explorer, network = make_explorer()
    write(explorer, (70, 30), (70, 110))
    explorer.update()
    canvas = explorer.figure.canvas
    canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, "p"))
    assert explorer.ink.any()
    canvas.callbacks.process("key_press_event", KeyEvent("key_press_event", canvas, "e"))
    explorer.update()
    assert not explorer.ink.any()
    assert explorer.elbo.get_text() == ""
    assert len(explorer.marker.get_xdata()) == 0
    assert len(network.examined) == 1
    params = run_main.plot_utils.matplotlib.rcParamsDefault
    keys = [key for name in params if name.startswith("keymap.") for key in params[name]]
    assert "p" in keys
    assert "e" not in keys


@pytest.mark.quick
def test_nothing_happens_while_the_toolbar_pans_or_zooms():
    explorer, network = make_explorer()
    explorer.figure.canvas.widgetlock(explorer)  # as the toolbar does
    mouse(explorer, "motion_notify_event", explorer.map, (0, 0))
    write(explorer, (70, 30), (70, 110))
    explorer.update()
    assert network.decoded == network.examined == []
    assert not explorer.ink.any()


@pytest.mark.quick
def test_without_blitting_the_backend_draws(monkeypatch):
    """As WebAgg does."""
    monkeypatch.setattr(FigureCanvasAgg, "supports_blit", False)
    explorer, _ = make_explorer()
    drawn = []
    monkeypatch.setattr(explorer.figure.canvas, "draw_idle", lambda: drawn.append(1))
    mouse(explorer, "motion_notify_event", explorer.map, (0, 0))
    explorer.update()
    assert drawn == [1]
    before = pixels(explorer)
    explorer.figure.canvas.draw()
    assert (pixels(explorer) != before).any()


# --- The program --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore") / "run"
    assert run("--num_epochs=1", "--dim_z=3", f"--results_path={folder}") == 0
    return folder


def test_explore_shows_what_the_network_computes(trained, few_digits, monkeypatch):
    """Without the data, and without a change on disk."""
    figure = Figure((12, 7), dpi=50)
    FigureCanvasAgg(figure)
    shown = []
    monkeypatch.setattr(plot_utils, "window", lambda: contextlib.nullcontext(figure))
    monkeypatch.setattr(plot_utils.Explorer, "show", lambda explorer: shown.append(explorer))  # noqa: PLW0108
    monkeypatch.setattr(mnist_data, "load_mnist", None)
    before = files(trained)
    assert run_main.main(["--explore", f"--load={trained}"]) == 0
    assert files(trained) == before
    (explorer,) = shown
    monkeypatch.undo()
    network, _ = run_main.load(trained)
    mean = network.encode(few_digits.test_images / np.float32(255)).numpy()
    np.testing.assert_allclose(explorer.plane.origin, mean.mean(axis=0), atol=1e-4)
    figure.canvas.draw()
    explorer.place = np.array([0.5, -0.5])
    explorer.is_decoded = False
    write(explorer, (70, 30), (70, 110))
    explorer.update()
    z = explorer.plane.origin + explorer.plane.directions @ [0.5, -0.5]
    expected = network.decode(z[np.newaxis]).numpy().reshape(28, 28)
    np.testing.assert_allclose(explorer.decoded.get_array(), expected, atol=1e-5)
    x = mnist_data.crop_and_centre(explorer.ink).reshape(1, 784)
    np.testing.assert_allclose(
        explorer.restored.get_array(), network.reconstruct(x).numpy().reshape(28, 28), atol=1e-5
    )
    place = explorer.plane.project(network.encode(x).numpy())[0]
    np.testing.assert_allclose(np.ravel(explorer.marker.get_data()), place, atol=1e-5)
    negative_elbo, _, _ = network.negative_elbo(x, seed=(0, 0))
    assert explorer.elbo.get_text() == f"ELBO {-float(negative_elbo[0]):.1f} nats"


def test_a_network_with_classes_decodes_the_chosen_one_and_finds_that_of_a_written_digit():
    network = run_main.vae.Conditional(n_hidden=16)
    decode, examine = run_main.functions_to_explore(network)
    z = np.array([[0.5, -0.5]], np.float32)
    for label in (3, 8):
        np.testing.assert_allclose(decode(z, np.array([label])), network.decode(z, [label]), atol=1e-5)
    ink = np.zeros((plot_utils.PAPER_SIDE, plot_utils.PAPER_SIDE))
    ink[30:110, 60:75] = 1
    x = mnist_data.crop_and_centre(ink).reshape(1, 784)
    z, restored, elbo, label = examine(ink)
    assert label == network.classify(x)[0]
    np.testing.assert_allclose(z, network.encode(x)[0], atol=1e-5)
    np.testing.assert_allclose(restored, network.reconstruct(x)[0], atol=1e-5)
    negative_elbo, _, _ = network.negative_elbo(x, seed=(0, 0))
    assert elbo == pytest.approx(-float(negative_elbo[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("", "display"),
        ("module://matplotlib_inline", "display"),
        ("nonsense", "nonsense"),
    ],
)
def test_without_a_display_one_line_names_webagg(trained, backend, words):
    """A notebook's backend does not count."""
    env = environment() | {"MPLBACKEND": backend}
    env.pop("DISPLAY", None)
    env.pop("WAYLAND_DISPLAY", None)
    command = [sys.executable, ROOT / "run_main.py", "--explore", f"--load={trained}"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert_mentions(one_line(result.stderr), ["--explore", "MPLBACKEND=webagg", "tornado", words])
    assert "loading TensorFlow" not in result.stdout


def test_a_run_without_latents_or_a_plane_is_one_line(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "latent.npz").write_bytes(b"damaged")
    assert run_main.main(["--explore", f"--load={copy}"]) == 2
    assert_mentions(one_line(capsys.readouterr().err), ["latent.npz", str(copy)])
    config = json.loads((copy / "config.json").read_text())
    config["flags"]["dim_z"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    assert run_main.main(["--explore", f"--load={copy}"]) == 2
    assert_mentions(one_line(capsys.readouterr().err), "--explore --dim_z")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--explore"], "--load"), (["--explore", "--load=x", "--n_generate=3"], "--explore --n_generate")],
)
def test_wrong_arguments_are_one_line(capsys, arguments, words):
    assert run_main.main(arguments) == 2
    assert_mentions(one_line(capsys.readouterr().err), words)


@pytest.mark.quick
def test_without_an_event_loop_no_figure_stays_open():
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    before = plt.get_fignums()
    with pytest.raises(RuntimeError, match="no display"), plot_utils.window():
        pass
    assert plt.get_fignums() == before
