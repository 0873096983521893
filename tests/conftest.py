import csv
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ("--n_hidden=32", "--batch_size=500")  # a network whose epochs take a fraction of a second

# `python -m pytest` without arguments runs these files in a second process: most of the time goes into
# compiling, which uses one core.
SECOND_PROCESS = (
    "test_compare.py",
    "test_distribute.py",
    "test_edits.py",
    "test_machine.py",
    "test_watch.py",
)
second_process = pytest.StashKey[subprocess.Popen]()
output = pytest.StashKey[TextIO]()


def pytest_collection_modifyitems(config, items):
    """Starts the second process, and leaves its tests to it."""
    if config.invocation_params.args:
        return
    others = [item for item in items if item.path.name in SECOND_PROCESS]
    items[:] = [item for item in items if item.path.name not in SECOND_PROCESS]
    config.hook.pytest_deselected(items=others)
    files = [ROOT / "tests" / name for name in SECOND_PROCESS]
    command = [sys.executable, "-m", "pytest", "-q", *files]
    config.stash[output] = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, cwd=ROOT, stdout=config.stash[output], stderr=subprocess.STDOUT)
    config.stash[second_process] = process


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Waits for the second process; its failures are the session's."""
    stash = session.config.stash
    if second_process in stash:
        status = stash[second_process].wait()
        stash[output].seek(0)
        print(f"\n{stash[output].read()}")
        session.exitstatus = session.exitstatus or status


def environment():
    """Returns the environment variables, without one that would hide messages of TensorFlow."""
    return {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}


def read_log(folder):
    """Returns the rows of a run's log.csv, {column: number}."""
    with (folder / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def files(folder):
    """Returns all files in a folder and in those below it, {relative path: bytes}."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    """Returns the names of what a folder holds, with * for the variable part of an event file's."""
    return {re.sub(r"(?<=tfevents\.).+(?=\.run_main)", "*", path.name) for path in folder.iterdir()}


def one_line(err):
    """Returns the content of stderr, which must be a single error message of the program."""
    assert err.startswith("run_main.py: error: ")
    assert err.count("\n") == 1
    return err


def assert_mentions(text, words):
    """Asserts that a text has each of the words, a list or a string with spaces between them."""
    words = words.split() if isinstance(words, str) else words
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in {text!r}"


@pytest.fixture(scope="session")
def data_dir():
    """The folder of the real MNIST, which is downloaded if needed, as for a user."""
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
    sizes = {"train": 2_000, "valid": 1_000, "test": 1_000}
    cut = {}
    for part, n in sizes.items():
        for kind in ("images", "labels"):
            cut[f"{part}_{kind}"] = getattr(mnist, f"{part}_{kind}")[:n]
    return dataclasses.replace(mnist, **cut)


@pytest.fixture(scope="module")
def small_mnist(few_digits, data_dir):
    """Makes `run_main.main` in this process train on few_digits, which `data_dir` then seems to hold."""
    import mnist_data

    load_mnist = mnist_data.load_mnist

    def load_few_digits(folder):
        return few_digits if Path(folder) == data_dir else load_mnist(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_data, "load_mnist", load_few_digits)
        yield few_digits


@pytest.fixture(scope="module")
def run(small_mnist, data_dir):
    """A function that runs the program in this process, on few digits; a new run gets a small network."""
    import run_main

    def run(*flags):
        reuses_flags = any(str(flag).startswith(("--resume", "--load")) for flag in flags)
        own = [] if reuses_flags else [f"--data_dir={data_dir}", *SMALL]
        return run_main.main([*own, *flags])

    return run


@pytest.fixture
def program(tmp_path):
    """A function that starts the real program, or another script, with flags, in an empty folder.

    Its processes are killed at the end of the test.
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
