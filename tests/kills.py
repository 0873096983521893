"""Kills runs and damages checkpoints at random: --resume has to end in the bits of an undisturbed run.

    python tests/kills.py

Prints what it found; the exit status is 1 if anything was lost or read as something else.
"""

import argparse
import contextlib
import csv
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402

import mnist_data  # noqa: E402
import run_main  # noqa: E402

run_main.import_tensorflow()

# A small network, so that much of the time goes into writing; its small frames are part of the checkpoint.
FLAGS = (*conftest.SMALL, "--keep_prob=0.8", "--animate", "--PMLR_n_img_x=5", "--PMLR_n_img_y=5")
NPY_HEADER = 128  # bytes before the numbers of an array in a checkpoint


def arrays_of(path):
    """Returns what a checkpoint holds, {name: (type, shape, bytes)}, without the seconds of its history."""
    with np.load(path) as file:
        arrays = dict(file)
    rows = json.loads(str(arrays.pop("history")))
    arrays["history"] = np.array(json.dumps([row | {"seconds": 0} for row in rows]))
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def read_events(path):
    """Returns the numbers in an event file, {(name, epoch): number}, without times."""
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(path, Path(folder, "events"))  # whose name TensorFlow can read
        for event in run_main.tf.compat.v1.train.summary_iterator(str(copy)):
            for value in event.summary.value:
                if value.HasField("simple_value") and value.tag != "seconds":
                    assert (value.tag, event.step) not in numbers
                    numbers[value.tag, event.step] = value.simple_value
    return numbers


def what_is_left(folder):
    """Returns all that a run left, {name: content}, without times and paths."""
    left = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir():
            left[name] = "a folder"
        elif path.match(run_main.EVENT_FILES):
            left["events"] = read_events(path)
        elif path.parent.name == "checkpoint":
            left |= {f"{name}: {array}": content for array, content in arrays_of(path).items()}
        elif name == "vae.keras":
            with zipfile.ZipFile(path) as archive:
                members = set(archive.namelist()) - {"metadata.json"}  # which has a date
                left |= {f"{name}: {member}": archive.read(member) for member in members}
        elif name == "log.csv":
            with path.open() as file:
                left[name] = [row | {"seconds": ""} for row in csv.DictReader(file)]
        elif name == "config.json":
            config = json.loads(path.read_text())
            left[name] = config | {"flags": config["flags"] | {"results_path": ""}}
        else:
            left[name] = path.read_bytes()
    return left


def differences(one, other):
    """Returns the names of what differs in `what_is_left` of two runs."""
    return sorted(name for name in one | other if one.get(name) != other.get(name))


# --- kills --------------------------------------------------------------------------------------------


def start(*flags):
    """Starts the program."""
    command = [sys.executable, str(ROOT / "run_main.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=conftest.environment())


def kill(run, rng):
    """Kills a run in the second after one of its first lines; returns False if it ended before."""
    for _ in range(rng.randrange(8)):
        run.stdout.readline()
    try:
        run.wait(timeout=rng.random())
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
        return True
    return False


def train(folder, flags, n_kills=0, rng=None):
    """Trains in a folder, kills and resumes the run up to n_kills times; returns the number of kills."""
    kills = 0
    while True:
        has_config = (folder / "config.json").exists()
        with start(f"--results_path={folder}", *(["--resume"] if has_config else flags)) as run:
            if kills < n_kills and kill(run, rng):
                kills += 1
                continue
            _, err = run.communicate()
        if run.returncode or err:
            raise RuntimeError(f"after {kills} kills, the status is {run.returncode}: {err}")
        return kills


def try_kills(folder, undisturbed, flags, n_kills, rng):
    """Spreads n_kills over runs in new folders; yields the number of kills of each and what they changed."""
    expected = what_is_left(undisturbed)
    while n_kills:
        killed = folder / f"{n_kills}_kills_left"
        kills = train(killed, flags, n_kills, rng)
        n_kills -= kills
        yield kills, differences(expected, what_is_left(killed))


# --- damage -------------------------------------------------------------------------------------------


def starts(path):
    """Returns where the arrays of a checkpoint start and end: each is a .npy file in a .zip file."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            lengths = np.frombuffer(content, "<u2", 2, member.header_offset + 26)
            first = member.header_offset + 30 + int(lengths.sum())
            yield first, first + member.file_size


def damaged(path, n_flips, rng):
    """Yields (kind of damage, content after it) of a checkpoint. Half of the flips are in its headers."""
    content = path.read_bytes()
    headers = np.ones(len(content), bool)
    yield "truncated", content[: len(content) // 2]
    yield "truncated", content[:-1]
    yield "empty", b""
    yield "zeroed", bytes(len(content))
    flips = []
    for first, last in starts(path):
        headers[first + NPY_HEADER : last] = False
        flips.append((first + 8, 4))  # as if the array started 16 bytes earlier, within spaces
    positions = rng.choices(np.flatnonzero(headers).tolist(), k=n_flips // 2)
    positions += rng.choices(range(len(content)), k=n_flips - n_flips // 2)
    flips += [(position, rng.randrange(8)) for position in positions]
    for position, bit in flips:
        byte = bytes([content[position] ^ 1 << bit])
        yield f"bit {bit} of byte {position} flipped", content[:position] + byte + content[position + 1 :]


def make_load(folder):
    """Returns a function that restores a run's state; it returns all values in it, and what was printed."""
    flags = run_main.parse_flags(["--resume", f"--results_path={folder}"])
    run_main.import_tensorflow()
    digits = run_main.prepare_digits(mnist_data.load_mnist(flags.data_dir), flags)
    network = run_main.build_network(digits, flags)
    variables = run_main.state_variables(network)

    def load():
        for variable in variables:
            variable.assign(np.zeros_like(variable))
        state = run_main.TrainingState(network)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run_main.restore_state(state, folder)
        arrays = [variable.numpy() for variable in variables] + state.frames
        values = [(array.dtype, array.shape, array.tobytes()) for array in arrays]
        return [state.history, values], printed.getvalue()

    return load


def try_damage(folder, n_flips, rng):
    """Damages the newest of a run's two checkpoints in many ways, and loads it.

    Returns {outcome: number of times} and the problems: what was read as other values, and errors other than
    UserErrors.
    """
    load = make_load(folder)
    aside = folder / "aside"
    newest = max(run_main.checkpoint_files(folder).items())[1]
    expected, _ = load()
    newest.rename(aside)
    before, _ = load()
    outcomes = Counter()
    problems = []
    for kind, bad in damaged(aside, n_flips, rng):
        newest.write_bytes(bad)
        try:
            found, printed = load()
        except run_main.UserError:
            outcomes["refused"] += 1
        except Exception as error:
            problems.append(f"{kind}: {type(error).__name__}: {error}")
        else:
            if found == expected and "flipped" in kind:
                outcomes["read as they were"] += 1
            elif found == before and f"{newest.name} is damaged" in printed:
                outcomes["passed over for the older one"] += 1
            else:
                problems.append(f"{kind}: read as something else")
    aside.replace(newest)
    return outcomes, problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the bits")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    problems = []
    mnist_data.load_mnist(ROOT / "data")
    with tempfile.TemporaryDirectory() as folder:
        flags = (*FLAGS, f"--data_dir={ROOT / 'data'}", "--num_epochs=12")
        undisturbed = Path(folder, "undisturbed")
        train(undisturbed, flags)
        for kills, changed in try_kills(Path(folder), undisturbed, flags, arguments.kills, rng):
            print(f"a run killed {kills} times: {len(changed)} differences", *changed, flush=True)
            problems += changed
        outcomes, wrong = try_damage(undisturbed, arguments.flips, rng)
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
    print(f"damaged checkpoints: {counts}, {len(wrong)} wrong", *wrong, sep="\n")
    sys.exit(bool(problems + wrong))


if __name__ == "__main__":
    main()
