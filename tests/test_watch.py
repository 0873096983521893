"""What one sees of a run while it trains: progress, pictures, TensorBoard."""

import csv
import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from conftest import ROOT, environment, files, names

import run_main
import vae

run_main.import_tensorflow()

CLEAR_LINE = "\x1b[2K"


# --- Progress -----------------------------------------------------------------------------------------


def on_terminal(script, columns=80, **env):
    """Returns what a Python script prints on a terminal, its stderr included."""
    fcntl = pytest.importorskip("fcntl", reason="needs pseudo-terminals")
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, np.array([25, columns, 0, 0], np.uint16).tobytes())
    command = [sys.executable, "-c", textwrap.dedent(script)]
    terminal = environment() | {"TERM": "xterm"} | env
    terminal.pop("COLUMNS", None)
    streams = {"stdin": child, "stdout": child, "stderr": child}
    process = subprocess.Popen(command, env=terminal, cwd=ROOT, **streams)
    os.close(child)
    printed = b""
    try:
        while data := os.read(parent, 10_000):
            printed += data
    except OSError:  # how Linux ends it
        pass
    process.wait()
    os.close(parent)
    return printed.decode()


def without_control_codes(printed):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed)


LOOP = """
    import time
    from mnist_data import progress

    def status():
        return "train -123.45"

    for i in progress(range(10), "epoch [red]3[/red]", status):
        time.sleep(0.05)
        if i == 5:
            print("a line")
    print("the end")
"""


@pytest.mark.quick
def test_progress_is_one_line_that_gives_way():
    printed = on_terminal(LOOP)
    assert printed.count("\n") < 6  # of the lines printed, and of the cursor's moves
    text = without_control_codes(printed)
    assert "epoch [red]3[/red]  train -123.45 " in text
    assert re.search(r"[1-9]0% 0:00:0\d", text)
    assert re.search(re.escape(CLEAR_LINE) + r"the end\r\n$", printed)  # in place of the line
    assert "a line\r\n" in text


@pytest.mark.quick
def test_progress_fits_a_narrow_terminal():
    lines = re.split(r"[\r\n]+", without_control_codes(on_terminal(LOOP, columns=40)))
    assert max(map(len, lines)) <= 40
    assert any("train -123.45" in line for line in lines)


@pytest.mark.quick
def test_progress_gives_way_to_an_exception():
    script = """
        import mnist_data, run_main

        def run(flags, load_tensorflow):
            for i in mnist_data.progress(range(3), "epoch 1"):
                raise KeyboardInterrupt

        run_main.run = run
        run_main.main([])
    """
    printed = on_terminal(script)
    assert "epoch 1" in printed
    assert f"{CLEAR_LINE}interrupted: " in printed


@pytest.mark.quick
@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TTY_COMPATIBLE": "0"}])
def test_progress_is_silent_on_a_terminal_without_control_codes(env):
    assert on_terminal(LOOP, **env) == "a line\r\nthe end\r\n"


@pytest.mark.quick
def test_progress_is_silent_where_output_is_no_terminal():
    forced = environment() | {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm"}
    command = [sys.executable, "-c", textwrap.dedent(LOOP)]
    assert subprocess.check_output(command, env=forced, cwd=ROOT, text=True) == "a line\nthe end\n"


def test_training_and_evaluation_show_their_progress(run, tmp_path, monkeypatch):
    """On a terminal; in what order, with how many items, and with what beside them."""
    shown = []

    def record(items, what, status=None):
        for item in items:
            yield item
            shown.append((what, len(items), status() if status else None))

    monkeypatch.setattr(run_main, "progress", record)
    monkeypatch.setattr(run_main, "STEPS_PER_CALL", 3)
    more = ["--dim_z=3", "--num_epochs=1", "--n_importance=1", "--n_generate=20000"]
    assert run(*more, f"--results_path={tmp_path / 'run'}") == 0
    epoch = [line for line in shown if line[0] == "epoch 1"]
    assert [n for _, n, _ in epoch] == [2, 2]  # 4 steps of 500 digits
    assert re.fullmatch(r"train -\d+\.\d\d", epoch[0][2])
    elbos = [float(status.split()[1]) for _, _, status in epoch]
    with (tmp_path / "run" / "log.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert elbos[-1] == pytest.approx(float(row["train_elbo"]), abs=0.0051)
    assert elbos[0] < elbos[-1]
    counts = {what: n for what, n, _ in shown}
    assert counts == {"epoch 1": 2, "log p(x)": 50, "new digits": 2}


def test_workers_show_no_running_elbo(few_digits, monkeypatch):
    """Reading it is an exchange between all workers, but only the chief may have a terminal."""
    flags = run_main.parse_flags(["--n_hidden=8", "--batch_size=500", "--num_epochs=1"])
    digits = run_main.prepare_digits(few_digits, flags)
    found = []

    def record(items, what, status=None):
        found.append(status)
        return items

    monkeypatch.setattr(run_main, "progress", record)
    state = run_main.TrainingState(run_main.build_network(digits, flags))
    flags.distribute = "multi_worker"
    list(run_main.train(state, digits, flags, run_main.tf.distribute.get_strategy()))
    assert found == [None]


def test_bits_do_not_depend_on_the_steps_per_call(few_digits, monkeypatch):
    noise = ["--binarize", "--add_noise"]
    flags = run_main.parse_flags(["--n_hidden=16", "--batch_size=100", "--num_epochs=2", *noise])
    digits = run_main.prepare_digits(few_digits, flags)
    found = []
    for n_steps in (1_000, 3):
        monkeypatch.setattr(run_main, "STEPS_PER_CALL", n_steps)
        state = run_main.TrainingState(run_main.build_network(digits, flags))
        strategy = run_main.tf.distribute.get_strategy()
        rows = [row | {"seconds": 0} for row in run_main.train(state, digits, flags, strategy)]
        variables = [variable.numpy().tobytes() for variable in run_main.state_variables(state.network)]
        found.append((rows, variables))
    assert found[0] == found[1]


# --- Pictures while training --------------------------------------------------------------------------


@pytest.fixture
def trained_state(few_digits):
    """A state after two epochs of three, its digits and its flags."""
    flags = run_main.parse_flags(["--n_hidden=16", "--num_epochs=3", "--PRR_n_img_x=3", "--epoch_plots"])
    digits = run_main.prepare_digits(few_digits, flags)
    state = run_main.TrainingState(vae.VAE(n_hidden=16))
    row = {"train_elbo": -150.0, "valid_elbo": -149.0, "seconds": 6.0}
    state.history = [{"epoch": 1} | row, {"epoch": 2} | row]
    return state, digits, flags


PROGRESS = {"reconstruction.png", "samples.png", "manifold.png", "latent_map.png", "elbo.png"}


@pytest.mark.quick
def test_pictures_are_drawn_while_training_if_that_costs_little(trained_state, tmp_path):
    state, digits, flags = trained_state
    flags.epoch_plots = False
    run_main.start_events(state, tmp_path)
    state.history[0]["seconds"] = 3  # 9 in all
    run_main.draw_epoch(state, digits, flags, tmp_path)
    assert names(tmp_path) == {run_main.EVENT_FILES}
    state.history[0]["seconds"] = 4
    state.drawing_seconds = 0.31
    run_main.draw_epoch(state, digits, flags, tmp_path)
    assert names(tmp_path) == {run_main.EVENT_FILES}
    state.drawing_seconds = 0.29
    run_main.draw_epoch(state, digits, flags, tmp_path)
    assert names(tmp_path) == {run_main.EVENT_FILES} | PROGRESS
    assert state.drawing_seconds > 0.3
    expected = run_main.plot_utils.draw(state, digits, flags)
    for name in PROGRESS:
        assert (tmp_path / name).read_bytes() == expected[name]


@pytest.mark.quick
def test_a_removed_picture_is_not_drawn_while_training(trained_state, tmp_path, monkeypatch):
    """As after an edit of PICTURES."""
    state, digits, flags = trained_state
    run_main.start_events(state, tmp_path)
    monkeypatch.delitem(run_main.plot_utils.PICTURES, "samples.png")
    monkeypatch.delitem(run_main.plot_utils.PICTURES, "manifold.png")
    run_main.draw_epoch(state, digits, flags, tmp_path)
    assert PROGRESS - names(tmp_path) == {"samples.png", "manifold.png"}
    assert names(tmp_path / "epochs") == {"PRR_epoch_02.png"}


@pytest.mark.quick
def test_the_last_epoch_draws_nothing_since_the_end_does(trained_state, tmp_path):
    state, digits, flags = trained_state
    flags.num_epochs = 2
    flags.epoch_plots = False
    run_main.start_events(state, tmp_path)
    run_main.draw_epoch(state, digits, flags, tmp_path)
    assert names(tmp_path) == {run_main.EVENT_FILES}


def test_epoch_plots_keeps_the_pictures_of_each_epoch(run, tmp_path):
    folder = tmp_path / "run"
    assert run("--num_epochs=1", "--epoch_plots", f"--results_path={folder}") == 0
    first = files(folder / "epochs")
    assert names(folder / "epochs") == {"PRR_epoch_01.png", "PMLR_epoch_01.png"}
    assert (folder / "epochs" / "PMLR_epoch_01.png").read_bytes() == (folder / "manifold.png").read_bytes()
    assert run("--resume", "--num_epochs=2", f"--results_path={folder}") == 0
    second = files(folder / "epochs")
    assert first.items() < second.items()
    assert {str(path) for path in second.keys() - first} == {"PRR_epoch_02.png", "PMLR_epoch_02.png"}
    (folder / "epochs" / "mine.png").touch()
    overwrite = ["--overwrite", "--num_epochs=1", "--PMLR=False", "--PRR=False"]
    assert run(*overwrite, f"--results_path={folder}") == 0
    assert names(folder / "epochs") == {"mine.png"}


@pytest.mark.quick
def test_a_frame_encodes_no_test_digits(trained_state):
    state, digits, flags = trained_state
    digits.test = None
    with pytest.raises(AttributeError):
        run_main.plot_utils.draw(state, digits, flags)
    digits.test = vae.Batch(*[np.full_like(array, np.nan) for array in digits.valid[:2]], digits.valid.labels)
    assert run_main.plot_utils.frame(state.network, digits, flags).std() > 0


# --- TensorBoard --------------------------------------------------------------------------------------


def read_events(folder):
    """Returns the only event file's values: a list of (step, name, number or PNG)."""
    (file,) = folder.glob(run_main.EVENT_FILES)
    first, *events = run_main.tf.compat.v1.train.summary_iterator(str(file))
    assert first.file_version == "brain.Event:2"
    values = []
    for event in events:
        assert event.wall_time > 1e9
        for value in event.summary.value:
            is_number = value.HasField("simple_value")
            content = value.simple_value if is_number else value.image.encoded_image_string
            if not is_number:
                height, width, _ = run_main.tf.io.decode_png(content).shape
                assert (value.image.height, value.image.width) == (height, width)
            values.append((event.step, value.tag, content))
    return values


def test_event_file_has_the_log_the_metrics_and_the_pictures(run, tmp_path):
    folder = tmp_path / "run"
    assert run("--num_epochs=2", "--animate", "--PRR=False", f"--results_path={folder}") == 0
    assert run("--num_epochs=3", "--resume", f"--results_path={folder}") == 0
    values = read_events(folder)
    numbers = {(step, name): value for step, name, value in values if isinstance(value, float)}
    pictures = {name: value for _, name, value in values if isinstance(value, bytes)}
    assert len(numbers) + len(pictures) == len(values)  # each epoch is there once
    with (folder / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    metrics = json.loads((folder / "metrics.json").read_text())
    expected = {(3, name): value for name, value in metrics.items()}
    for row in log:
        epoch = int(row.pop("epoch"))
        expected |= {(epoch, name): float(value) for name, value in row.items()}
    assert numbers == pytest.approx(expected)
    assert pictures == {path.name: path.read_bytes() for path in folder.glob("*.png")}

    before = files(folder)
    assert run(f"--load={folder}") == 0
    assert files(folder) == before
