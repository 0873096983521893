import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


class Listener:
    """A console that keeps what it is told."""

    def __init__(self):
        self.lines, self.bars = [], []

    def line(self, text):
        self.lines.append(text)

    def bar(self, what, done, total):
        self.bars.append((what, done, total))


def build(data, flags):
    """The strategy and the state to train, as the program makes them for one machine."""
    import run_main

    strategy = run_main.tf.distribute.get_strategy()
    return strategy, run_main.build(strategy, data.train_images, flags)


def environment():
    """The environment variables as run_main finds them; it sets this one where a test imports TensorFlow."""
    return {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}


@pytest.fixture
def console():
    return Listener()


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real MNIST, which comes by itself as it does for a user."""
    import mnist_data

    mnist_data.load_mnist(ROOT / "data", Listener())
    return ROOT / "data"


@pytest.fixture(scope="session")
def mnist(data_dir):
    import mnist_data

    return mnist_data.load_mnist(data_dir, Listener())


@pytest.fixture
def program(tmp_path):
    """A function that starts the real program, or another script, with flags, in an empty folder.

    None outlives its test.
    """
    started = []

    def start(*flags, env=None, script=ROOT / "run_main.py", **options):
        command = [sys.executable, str(script), *map(str, flags)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        pipes["env"] = environment() | (env or {})
        started.append(subprocess.Popen(command, **pipes | options))
        return started[-1]

    yield start
    for run in started:
        run.kill()
