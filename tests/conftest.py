import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ("--n_hidden=32", "--batch_size=500")  # a network whose epochs take a fraction of a second


def environment():
    """The environment variables, without one that run_main sets here, and that would hide messages there."""
    return {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}


def read_log(folder):
    """Returns the rows of a run's log.csv, {column: number}."""
    with (folder / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def files(folder):
    """Returns all files in a folder and in those below it, {relative path: bytes}."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(err):
    """Returns what is in stderr, which has to be one error of the program."""
    assert err.startswith("run_main.py: error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real MNIST, which comes by itself as it does for a user."""
    import mnist_data

    mnist_data.load_mnist(ROOT / "data")
    return ROOT / "data"


@pytest.fixture(scope="session")
def mnist(data_dir):
    import mnist_data

    return mnist_data.load_mnist(data_dir)


@pytest.fixture(scope="session")
def few_digits(mnist):
    """The real MNIST, cut to 2,000 training digits and 1,000 of the others each."""
    sizes = {"train_images": 2_000, "valid_images": 1_000, "test_images": 1_000}
    sizes |= {"train_labels": 2_000, "test_labels": 1_000}
    cut = {name: getattr(mnist, name)[:n] for name, n in sizes.items()}
    return type(mnist)(**cut, sha256=mnist.sha256)


@pytest.fixture(scope="module")
def small_mnist(few_digits, data_dir):
    """Makes `run_main.main` in this process train on few_digits, which `data_dir` then seems to hold."""
    import mnist_data

    real = mnist_data.load_mnist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mnist_data,
            "load_mnist",
            lambda folder: few_digits if Path(folder) == data_dir else real(folder),
        )
        yield few_digits


@pytest.fixture(scope="module")
def run(small_mnist, data_dir):
    """A function that runs the program in this process, on few digits; a new run gets a small network."""
    import run_main

    def run(*flags):
        goes_on = any(str(flag).startswith(("--resume", "--load")) for flag in flags)
        return run_main.main([*flags] if goes_on else [f"--data_dir={data_dir}", *SMALL, *flags])

    return run


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
