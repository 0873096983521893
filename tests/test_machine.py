"""Settings of the machine change nothing for the program, and the program changes none of another's."""

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import keras
import pytest
from conftest import ROOT, SMALL, assert_mentions, one_line
from kills import differences, what_is_left

import run_main

MATPLOTLIBRC = """
image.origin: lower
savefig.dpi: 50
savefig.bbox: tight
figure.autolayout: True
text.usetex: True
font.size: 30
"""
KERAS_JSON = {"floatx": "float16", "epsilon": 0.1, "backend": "jax", "image_data_format": "channels_first"}
UNUSUAL_NAME = os.fsdecode("b\\a[d*\xe9t\xe9".encode() + b"\xff")  # not even UTF-8

# Another program with unusual settings. It calls main five times and then prints what it found, as JSON.
GUEST = """
import dataclasses, gc, json, os, pathlib, random, signal, sys

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import config

import mnist_data
import run_main

run_main.import_tensorflow()
tf.config.list_physical_devices()
data_dir, n_train = sys.argv[1], int(sys.argv[2])
mnist = mnist_data.load_mnist(pathlib.Path(data_dir))
few_digits = dataclasses.replace(
    mnist, train_images=mnist.train_images[:n_train], train_labels=mnist.train_labels[:n_train]
)
mnist_data.load_mnist = lambda folder: few_digits

matplotlib.use("svg")
matplotlib.rcParams["font.size"] = 30
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("mixed_bfloat16")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.default_int_handler)

def settings():
    stderr = os.fstat(2)
    return {
        "environment": dict(os.environ),
        "current folder": os.getcwd(),
        "sys.path": list(sys.path),
        "streams": [id(sys.stdout), id(sys.stderr), stderr.st_dev, stderr.st_ino],
        "signal handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "garbage collection": [gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()],
        "backend of Matplotlib": matplotlib.get_backend(),
        "settings of Matplotlib": str(matplotlib.rcParams),
        "settings of Keras": [keras.config.floatx(), keras.config.dtype_policy().name],
        "determinism of TensorFlow": config.is_op_determinism_enabled(),
    }

def draw_random_numbers():
    keras_number = keras.random.uniform((), dtype="float32")
    return [random.random(), np.random.rand(), float(tf.random.uniform(())), float(keras_number)]

def memory():
    gc.collect()
    n_pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return n_pages * os.sysconf("SC_PAGESIZE") / 1e6

print("first call", file=sys.stderr, flush=True)
before = settings()
keras.utils.set_random_seed(7)
megabytes = []
for call in range(5):
    assert run_main.main([*sys.argv[3:], f"--results_path={call}"]) == 0
    megabytes.append(memory())
found = {"before": before, "after": settings(), "megabytes": megabytes}
found["random numbers after"] = draw_random_numbers()
keras.utils.set_random_seed(7)
found["random numbers"] = draw_random_numbers()

keras.config.set_floatx("float32")
keras.config.set_dtype_policy("float32")
model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
model.compile("sgd", "mse")
found["loss"] = model.fit(np.ones((8, 2)), np.ones(8), verbose=0).history["loss"]
found["data set"] = keras.utils.get_file("digits", pathlib.Path(sys.argv[0]).as_uri())
print(json.dumps(found))
"""


@pytest.fixture
def unusual_keras():
    """Within the test, this process has unusual settings of Keras."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def test_settings_of_the_environment_and_of_keras(program, unusual_keras, data_dir, tmp_path):
    """A program in an unusual environment and a thread beside an unusual Keras compute the same bits."""
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras" / "keras.json").write_text(json.dumps(KERAS_JSON))
    (tmp_path / "matplotlibrc").write_text(MATPLOTLIBRC)
    env = {
        "HOME": str(tmp_path),
        "MATPLOTLIBRC": str(tmp_path),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "KERAS_BACKEND": "jax",
        "TF_USE_LEGACY_KERAS": "1",
        "PYTHONIOENCODING": "ascii",
        "PYTHONSAFEPATH": "1",
    }
    flags = [f"--data_dir={data_dir}", *SMALL, "--num_epochs=1"]
    run = program(*flags, f"--results_path={UNUSUAL_NAME}", env=env)

    statuses = []
    folder = tmp_path / "thread"

    def call_main():
        statuses.append(run_main.main([*flags, f"--results_path={folder}"]))

    thread = threading.Thread(target=call_main)
    thread.start()
    thread.join()
    assert statuses == [0]
    _, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    assert differences(what_is_left(tmp_path / UNUSUAL_NAME), what_is_left(folder)) == []


def test_a_guest_changes_nothing_and_is_silent(program, data_dir, tmp_path):
    """Main, called in another program, leaves its settings alone, warns of nothing, and frees its memory.

    With fewer digits, the memory grows less.
    """
    script = tmp_path / "guest.py"
    script.write_text(GUEST)
    flags = ("--n_hidden=16", "--batch_size=1000", "--num_epochs=1", "--PMLR=False", "--PRR=False")
    env = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "1"}
    guest = program(data_dir, 20_000, *flags, script=script, env=env)
    out, err = guest.communicate(timeout=300)
    assert guest.returncode == 0, err
    _, messages = err.split("first call\n")
    assert messages == ""

    found = json.loads(out.splitlines()[-1])
    assert found["after"] == found["before"]
    assert found["random numbers after"] == found["random numbers"]
    assert not found["before"]["determinism of TensorFlow"]
    assert len(found["loss"]) == 1
    assert Path(found["data set"]).is_relative_to(tmp_path / ".keras" / "datasets")
    megabytes = found["megabytes"]
    assert (megabytes[4] - megabytes[1]) / 3 < 60, megabytes


def test_tests_are_collected_without_modules_of_posix():
    """As on Windows."""
    script = """
import sys
sys.modules |= dict.fromkeys(["fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"])
import pytest
sys.exit(pytest.main(["--collect-only", "--quiet", "tests"]))
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_another_backend_of_keras_is_a_user_error(run, monkeypatch, capsys):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    assert run() == 2
    assert_mentions(one_line(capsys.readouterr().err), "jax KERAS_BACKEND=tensorflow")


def test_closed_stderr(program, data_dir, tmp_path):
    flags = (f"--data_dir={data_dir}", *SMALL, "--num_epochs=1", "--PMLR=False", "--PRR=False")
    run = program(*flags, "--results_path=run", preexec_fn=functools.partial(os.close, 2))
    out, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    assert "all results are in run" in out


def test_fatal_messages_of_tensorflow_are_shown(program, data_dir):
    run = program(f"--data_dir={data_dir}", env={"TF_XLA_FLAGS": "--no_such_flag"})
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "no_such_flag" in err
    assert "oneDNN" not in err  # a start-up message


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket", ""])
@pytest.mark.parametrize("flag", ["results_path", "data_dir", "load", "reconstruct"])
def test_remote_and_empty_paths_are_user_errors(capsys, flag, path):
    assert run_main.main([f"--{flag}={path}"]) == 2
    assert f"--{flag}" in one_line(capsys.readouterr().err)


def test_tilde_is_the_home_folder():
    assert run_main.parse_flags(["--data_dir=~/mnist"]).data_dir == Path.home() / "mnist"


def test_too_long_a_name_is_a_user_error(capsys, tmp_path):
    assert run_main.main([f"--results_path={tmp_path / ('x' * 300)}"]) == 2
    assert "name too long" in one_line(capsys.readouterr().err)
