"""Trains a variational autoencoder on MNIST and shows what it is good for: flags, training, results.

`python run_main.py --help` lists the flags. What a run leaves behind is in its results folder.
"""

import argparse
import contextlib
import csv
import faulthandler
import gc
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

import mnist_data

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The recipe. At 20 epochs and dim_z 2 it gives a test ELBO of -140.9 with SGD; the same with all gradients
# clipped by one common norm, and the best rate for that, -148.
LEARN_RATE = {"sgd": 0.02, "adam": 0.002}  # at the start
MOMENTUM = 0.98  # Nesterov's
# In the first epochs, the norms of the gradients run from 1 (biases) over 4 (the decoder's first weights) to
# 50 (the latent layer's). One rate for all wastes one or ruins the other, so each is clipped on its own.
CLIP_NORM = 1.0

# In place of an epoch, for the random numbers of what comes after training: that counts from 1.
EVALUATION_EPOCH, NOISE_EPOCH, GENERATION_EPOCH = 0, -1, -2
EVALUATION_BLOCK = 1_000  # images at a time; divides the numbers of validation and of test digits
LOG_PX_BLOCK = 20  # images at a time; divides the number of test digits
IMAGES_BLOCK = 10_000  # images at a time
UPDATES_PER_EPOCH = 10  # of the progress bar

# All pictures together take a fifth of the seconds of a default epoch: they wait until their share is less.
PICTURES_SHARE = 0.03
N_LINES = 10  # of the picture of interpolations
LINE_STEPS = 10
MAX_FRAMES = 100  # of an animation; 60 take 1.7 MB
MAX_FRAME_DIGITS = 50  # from side to side

JOIN_SECONDS = 600  # that machines wait for each other at the start

PACKAGES = ("tensorflow", "keras", "numpy", "scipy", "matplotlib")
PICTURES = (
    *("input.png", "input_noise.png", "reconstruction.png", "denoising.png", "manifold.png"),
    *("manifold.gif", "latent_map.png", "samples.png", "interpolation.png", "elbo.png"),
)
MADE_ONCE = ("generated.npz", "reconstructed.npz", "reconstructed.png")
RESULTS = ("config.json", "log.csv", "metrics.json", *PICTURES, *MADE_ONCE, "checkpoint")
# What a resumed or loaded run may be given anew, as it may all flags of plots; the other flags are its own.
AFTERWARDS = ("n_importance", "n_generate", "reconstruct")
EITHER_MAY_CHANGE = ("animate", "data_dir", "distribute", "results_path", "overwrite", *AFTERWARDS)
RESUME_MAY_CHANGE = ("num_epochs", "resume", *EITHER_MAY_CHANGE)
LOAD_MAY_CHANGE = ("seed", "load", *EITHER_MAY_CHANGE)


class UserError(Exception):
    """What a user can do something about; the message is one line that says what."""

    status = 1


class FlagError(UserError):
    """A flag that the state of the disk makes wrong."""

    status = 2


# --- flags -------------------------------------------------------------------------------------------


def whole(low, high=2**31 - 1):
    """Returns an argparse type: a whole number from low to high."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")

    return parse


def real(low, high=math.inf):
    """Returns an argparse type: a finite number greater than low and at most high."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low < float(text) <= high and math.isfinite(float(text)):
                return float(text)
        limit = "" if high == math.inf else f" and at most {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number greater than {low}{limit}")

    return parse


def switch(text):
    """An argparse type: True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def folder_path(text):
    """An argparse type: the path of a folder."""
    if not text or set(text) & set("\0*?["):  # TensorFlow takes the last three for patterns
        raise argparse.ArgumentTypeError(f"{text!r} is not a name for a folder")
    return Path(text)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, and where if not on the command line."""

    where = ""

    def error(self, message):
        if message.startswith("unrecognized"):
            message += "; --help lists the flags"
        self.exit(2, f"{self.prog}: error: {self.where}{' '.join(message.split())}\n")


def make_parser():
    """Returns the parser of the flags."""
    parser = OneLineParser(description="Trains a variational autoencoder on MNIST.", allow_abbrev=False)

    def add(group, *names, default=None, help, **more):
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(*names, default=default, help=help + shown, **more)

    def add_switch(group, *names, default=None, help):
        add(
            group,
            *names,
            default=default,
            help=help,
            type=switch,
            nargs="?",
            const=True,
            metavar="True|False",
        )

    group = parser.add_argument_group("model")
    add(group, "--dim_z", type=whole(1, 10_000), default=2, help="length of a latent vector")
    add(group, "--n_hidden", type=whole(1, 100_000), default=500, help="units of a hidden layer")
    add(group, "--keep_prob", type=real(0.001, 1), default=0.9, help="chance that dropout keeps a unit")

    group = parser.add_argument_group("training")
    rates = ", ".join(f"{rate} for {name}" for name, rate in LEARN_RATE.items())
    add(group, "--optimizer", choices=LEARN_RATE, default="sgd", help="what follows the gradients")
    add(group, "--learn_rate", type=real(0), help=f"rate at the start; it decays to 0 (default: {rates})")
    add(group, "--num_epochs", type=whole(1), default=20, help="times to go through the training digits")
    add(group, "--batch_size", type=whole(1, mnist_data.N_TRAIN), default=128, help="digits a step")
    add(group, "--seed", type=whole(0), default=0, help="all random numbers are a function of it")
    choices = ("none", "mirrored", "multi_worker")
    help = "train on all local devices, or on all machines of TF_CONFIG"
    add(group, "--distribute", choices=choices, default="none", help=help)

    group = parser.add_argument_group("data")
    add(
        group,
        "--data_dir",
        type=folder_path,
        default="data",
        help="MNIST's folder; what it lacks is downloaded",
    )
    add_switch(group, "--add_noise", default=False, help="learn to restore digits from salt-and-pepper noise")
    noise = "chance that --add_noise replaces a pixel, by black or white at even odds"
    add(group, "--noise_level", type=real(0.001, 1), default=0.5, help=noise)

    def add_both(group, short, long, suffix, **more):
        add(group, f"--{short}_{suffix}", f"--{long}_{suffix}", **more)

    def add_grid(*names, n_img):
        add_both(*names, "n_img_x", type=whole(1, 1_000), default=n_img, help="digits from left to right")
        add_both(*names, "n_img_y", type=whole(1, 1_000), default=n_img, help="digits from top to bottom")
        size = "size of a digit, as a multiple of 28 pixels"
        add_both(*names, "resize_factor", type=real(0, 100), default=1.0, help=size)

    add_switch(group, "--augment", default=False, help="learn from 4 turned and shifted copies a digit, too")
    add_switch(group, "--binarize", default=False, help="draw pixels as black or white, by their grey levels")

    group = parser.add_argument_group("plot of reconstructions")
    add_switch(group, "--PRR", "--plot_reconstruction", default=True, help="draw test digits, in and out")
    add_grid(group, "PRR", "plot_reconstruction", n_img=10)

    group = parser.add_argument_group("plot of the manifold")
    help = "draw the latent plane, decoded and as a map (default: where --dim_z is 2)"
    add_switch(group, "--PMLR", "--plot_manifold", help=help)
    names = (group, "PMLR", "plot_manifold")
    add_grid(*names, n_img=20)
    help = "the manifold shows z from minus this to this"
    add_both(*names, "z_range", type=real(0, 8), default=2.0, help=help)
    add_both(*names, "n_samples", type=whole(1), default=5_000, help="test digits on the map")
    help = "keep how the manifold forms, a frame an epoch, in manifold.gif"
    add_switch(group, "--animate", default=False, help=help)

    group = parser.add_argument_group("run")
    help = "folder for what the run leaves behind (default: the next free one of results/run1, run2, ...)"
    add(group, "--results_path", type=folder_path, help=help)
    add_switch(group, "--resume", default=False, help="go on with the run in --results_path")
    help = "remove the run in --results_path first; if it is that of --load, replace only what is asked for"
    add_switch(group, "--overwrite", default=False, help=help)

    group = parser.add_argument_group("afterwards")
    help = "folder of a run to take the network from, in place of training"
    add(group, "--load", type=folder_path, metavar="RUN", help=help)
    help = "estimate log p(x) of the test digits with so many draws of z each"
    add(group, "--n_importance", type=whole(1), metavar="K", help=help)
    help = "write so many new images, and their z, to generated.npz"
    add(group, "--n_generate", type=whole(1, 10_000_000), metavar="N", help=help)
    help = "encode and decode the digits in a .npy, .npz or picture file"
    add(group, "--reconstruct", type=Path, metavar="FILE", help=help)

    return parser


def parse_flags(arguments=None):
    """Returns the flags, checked together. Wrong ones end the program with status 2 and one line."""
    parser = make_parser()
    flags = parser.parse_args(arguments)
    if flags.load and flags.resume:
        parser.error("--resume trains on and --load does not train: take one of them")
    if flags.resume and not flags.results_path:
        parser.error("--resume needs the run's folder: name it with --results_path")
    if flags.overwrite and not (flags.results_path or flags.load):
        parser.error("--overwrite needs the run's folder: name it with --results_path")
    if flags.resume and flags.overwrite:
        parser.error("--resume goes on with a run and --overwrite removes it: take one of them")
    if flags.resume:
        not_taken = ("n_generate", "reconstruct")  # what is made only once is asked for each time
        path = flags.results_path
        flags = flags_of_run(parser, arguments, "results_path", path, RESUME_MAY_CHANGE, not_taken)
        done = max(checkpoint_epochs(flags.results_path), default=0)
        if flags.num_epochs < done:
            run = f"the run in {flags.results_path}"
            parser.error(f"--num_epochs {flags.num_epochs}: {run} has {done} already; take no fewer")
    if flags.load:
        not_taken = ("results_path", "distribute", *AFTERWARDS)
        flags = flags_of_run(parser, arguments, "load", flags.load, LOAD_MAY_CHANGE, not_taken)
        if not checkpoint_epochs(flags.load):
            parser.error(f"--load {flags.load} has no checkpoint of a finished epoch; name another run")
        if not flags.results_path or flags.results_path.resolve() == flags.load.resolve():
            flags.results_path = flags.load
            if flags.seed != read_config(flags.load)["seed"]:
                parser.error(f"--seed {flags.seed} is not the run's: name a --results_path for other numbers")
    flags.learn_rate = flags.learn_rate or LEARN_RATE[flags.optimizer]
    if flags.PMLR is None:
        flags.PMLR = flags.dim_z == 2
    check_together(parser, flags)
    return flags


def check_together(parser, flags):
    """Ends the program with one line if flags do not go together."""
    if flags.PMLR and flags.dim_z != 2:
        parser.error(f"--PMLR draws a plane, and --dim_z is {flags.dim_z}: leave it out or take --dim_z 2")
    if flags.animate and not flags.PMLR:
        parser.error("--animate shows the manifold: it needs --PMLR and --dim_z 2")
    if flags.animate and flags.num_epochs > MAX_FRAMES:
        most = f"take --num_epochs {MAX_FRAMES} or fewer"
        parser.error(f"--animate keeps a frame an epoch, too many with {flags.num_epochs}: {most}")
    if flags.animate and max(flags.PMLR_n_img_x, flags.PMLR_n_img_y) > MAX_FRAME_DIGITS:
        parser.error(f"--animate: take at most {MAX_FRAME_DIGITS} for --PMLR_n_img_x and --PMLR_n_img_y")
    if flags.distribute != "none" and flags.load:
        parser.error(f"--distribute {flags.distribute} is for training, and --load does not train")
    try:
        is_chief(flags)
    except ValueError:
        example = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'
        run = "the run's " if flags.resume else ""
        needs = f"needs TF_CONFIG in the environment, like {example}, or take --distribute none"
        parser.error(f"{run}--distribute multi_worker {needs}")
    if flags.noise_level != parser.get_default("noise_level") and not flags.add_noise:
        parser.error(f"--noise_level {flags.noise_level} does nothing without --add_noise")
    for plot in ("PRR", "PMLR"):
        n_x, n_y, factor = (
            getattr(flags, f"{plot}_{name}") for name in ("n_img_x", "n_img_y", "resize_factor")
        )
        if n_x * n_y > mnist_data.N_TEST:
            size = f"{n_x} times {n_y} digits"
            parser.error(f"--{plot}_n_img_x and --{plot}_n_img_y: {size} are more than {mnist_data.N_TEST}")
        if 28 * factor < 1:
            parser.error(f"--{plot}_resize_factor {factor} leaves no pixel of a digit: take 0.04 or more")
        if 28 * factor * max(n_x, n_y) > 10_000:
            largest = f"with so many digits, take at most {10_000 / 28 / max(n_x, n_y):.2g}"
            parser.error(f"--{plot}_resize_factor {factor} makes a picture of over 10000 pixels: {largest}")
    if flags.PMLR_n_samples > mnist_data.N_TEST:
        parser.error(
            f"--PMLR_n_samples {flags.PMLR_n_samples} is more than the {mnist_data.N_TEST} test digits"
        )


def is_chief(flags):
    """Returns whether this process is the one that writes, of those that train together.

    Raises ValueError if TF_CONFIG does not describe such a cluster and this process's place in it.
    """
    if flags.distribute != "multi_worker":
        return True
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        workers, job, index = config["cluster"], config["task"]["type"], config["task"]["index"]
        addresses = list(itertools.chain(*workers.values()))
        ports = [int(re.fullmatch(r".+:(\d+)", address)[1]) for address in addresses]
        known = set(workers) <= {"chief", "worker"} and len(workers.get("chief", [])) <= 1
        here = type(index) is int and 0 <= index < len(workers[job])
        if not (known and here and len(set(addresses)) == len(addresses) and max(ports) < 2**16):
            raise ValueError
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError("TF_CONFIG") from None
    return index == 0 and job == ("chief" if "chief" in workers else "worker")


def fixed_flags(flags, may_change):
    """Returns the flags of a run that may not be given anew, as {name: value}; those of plots always may."""
    return {
        name: value
        for name, value in vars(flags).items()
        if name not in may_change and not name.startswith(("PRR", "PMLR"))
    }


def flags_of_run(parser, arguments, flag, folder, may_change, not_taken):
    """Returns the flags of the run in the folder, with those of the arguments that it may be given anew.

    flag: the one that names the folder. not_taken: flags of the run that count as not given.
    """
    config = read_config(folder)
    if not config or config["flags"].get("load"):
        parser.error(f"--{flag} {folder} has no run that was trained there, or its config.json is damaged")
    own = {name: value for name, value in config["flags"].items() if name not in not_taken}
    parser.where = f"{folder / 'config.json'}: "
    recorded = parser.parse_args([f"--{name}={value}" for name, value in own.items() if value is not None])
    parser.where = ""
    flags = parser.parse_args(arguments, argparse.Namespace(**vars(recorded)))  # keeps what is not given
    for name, value in fixed_flags(recorded, may_change).items():
        given = getattr(flags, name)
        if given != value:
            parser.error(f"--{name} is {given}, and the run in {folder} has {value}: leave it out")
    return flags


# --- the screen and the results folder ---------------------------------------------------------------


class Console:
    """Lines on standard output and, on a terminal, a moving bar below them; errors only if it is quiet."""

    def __init__(self, quiet=False):
        self.quiet = quiet
        self.terminal = sys.stdout.isatty() and not quiet

    def line(self, text, file=None):
        """Prints a line, on standard output if no file is given, in place of the bar."""
        if self.terminal:
            print("\r\033[K", end="", flush=True)
        if file or not self.quiet:
            print(text, file=file, flush=True)

    def bar(self, what, done, total):
        """Shows how much is done of a total, which may be unknown: None."""
        if self.terminal:
            share = f"[{'#' * (30 * done // total):30}] {done / total:4.0%}" if total else f"{done:,} bytes"
            print(f"\r\033[K{what} {share}", end="", flush=True)


def take_folder(flags):
    """Returns the folder for a run's results: --results_path or the next free results/runN.

    It is this program's alone until it ends.

    Raises FlagError if it cannot be written, if another program is at work in it, or if it holds a run or
    files of a run's names and the flags do not say what to do with them. The run of --load is one that the
    flags add to.
    """
    folder = flags.results_path or Path("results", "run1")
    if folder.exists() and not folder.is_dir():
        raise FlagError(f"--results_path {folder} is no folder; name another")
    try:
        if flags.results_path:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder.parent.mkdir(exist_ok=True)
            folder = next(filter(None, map(take_numbered, itertools.count(1))))
        tempfile.TemporaryFile(dir=folder).close()
        lock(folder)
    except OSError as error:
        problem = f"--results_path {folder} cannot be written: {mnist_data.reason(error)}"
        raise FlagError(f"{problem}; name another folder") from error
    if read_config(folder):
        if folder == flags.load or flags.resume:
            for name in MADE_ONCE:
                asked = flags.n_generate if name == "generated.npz" else flags.reconstruct
                if asked and (folder / name).exists() and not flags.overwrite:
                    other = "move it away" if flags.resume else "add --overwrite or a --results_path"
                    raise FlagError(f"{folder / name} is there already: {other}")
        elif not flags.overwrite:
            can_go_on = checkpoint_epochs(folder) or not (folder / "log.csv").exists()
            other = "add --resume" if can_go_on and not flags.load else "name another folder"
            raise FlagError(f"--results_path {folder} holds a run: {other}, or --overwrite to remove it")
        return folder
    for name in RESULTS:
        if (folder / name).exists():
            raise FlagError(f"--results_path {folder} holds a {name} that is of no run; name another folder")
    return folder


@contextlib.contextmanager
def results_folder(flags):
    """Yields the folder of take_folder; removes it at the end if it is a numbered one and still empty.

    Yields None for a worker that is not the chief: it writes nothing.
    """
    if not is_chief(flags):
        yield None
        return
    folder = take_folder(flags)
    try:
        yield folder
    finally:
        if not flags.results_path:
            with contextlib.suppress(OSError):  # something has been written into it
                folder.rmdir()


def lock(folder):
    """Keeps other programs from working in a folder until this one ends, however it ends.

    Raises FlagError if another one keeps this one from it.
    """
    if fcntl:
        try:
            fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FlagError(f"{folder}: another program is at work there; wait for it") from error
        except OSError:  # a file system without locks
            pass


def read_config(folder):
    """Returns the config.json that a run wrote into a folder, or None if that is missing or not a run's."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return config if config["flags"].items() and config["data_sha256"] else None
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def read_metrics(folder):
    """Returns what metrics.json says that was measured of a run: nothing if it is missing or damaged."""
    try:
        return dict(json.loads((folder / "metrics.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def remove_run(folder):
    """Removes what a run wrote into a folder, and nothing else.

    config.json stays until the next one replaces it, so that the folder can be told for a run's all the time.
    """
    for name in RESULTS:
        if name not in ("config.json", "checkpoint"):
            (folder / name).unlink(missing_ok=True)
    remove_unfinished(folder)
    remove_checkpoints(folder, checkpoint_epochs(folder))
    with contextlib.suppress(OSError):  # not there, or the user has put something into it
        (folder / "checkpoint").rmdir()


def remove_unfinished(folder):
    """Removes the temporary files that a killed run has left behind."""
    names = "|".join(map(re.escape, RESULTS))
    for path in (*folder.glob("*.part"), *(folder / "checkpoint").glob("epoch-*")):
        if re.fullmatch(rf"({names})\.[0-9a-f]{{8}}\.part|epoch-\d+\..+\.tempstate\d+", path.name):
            path.unlink()
        elif re.fullmatch(r"epoch-\d+_temp", path.name):
            shutil.rmtree(path)


def take_numbered(n):
    """Creates results/runN and returns it, or None if another run has it."""
    folder = Path("results", f"run{n}")
    try:
        folder.mkdir()
    except FileExistsError:
        return None
    return folder


def write_json(path, content):
    """Writes a dictionary to a JSON file, whole or not at all."""
    mnist_data.write_whole(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_log(path, history):
    """Writes one dictionary an epoch to a CSV file, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    mnist_data.write_whole(path, text.getvalue().encode())


def configuration(flags):
    """Returns what a run depends on: flags, versions and data."""
    return {
        "flags": vars(flags) | {"resume": False, "overwrite": False},
        "seed": flags.seed,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
        "data_sha256": mnist_data.SHA256,
    }


# --- checkpoints -------------------------------------------------------------------------------------


def checkpoint_epochs(folder):
    """Returns the epochs that a run's folder has checkpoints of, in order. Their index is written last."""
    paths = (folder / "checkpoint").glob("*.index")
    return sorted(int(name[1]) for path in paths if (name := re.fullmatch(r"epoch-(\d+)\.index", path.name)))


def remove_checkpoints(folder, epochs):
    """Removes the checkpoints of some epochs."""
    for epoch in epochs:
        for path in (folder / "checkpoint").glob(f"epoch-{epoch}.*"):
            if re.fullmatch(r"epoch-\d+\.(index|data-\d+-of-\d+)", path.name):
                path.unlink()


def make_state(network, optimizer):
    """Returns all that training changes, as a tf.train.Checkpoint.

    That is the weights, the momenta, the history of the epochs and, for --animate, (n, height, width) frames.
    """
    frames = tf.Variable(np.zeros((0, 0, 0), np.uint8), shape=(None, None, None))
    return tf.train.Checkpoint(network=network, optimizer=optimizer, history=tf.Variable(""), frames=frames)


def save_checkpoint(state, history, folder):
    """Writes the complete state after an epoch, and keeps the one before.

    TensorFlow puts a checksum to each part of it, by which a damaged one is told from a good one. The history
    is in it as JSON.
    """
    epoch = len(history)
    state.history.assign(json.dumps(history))
    try:
        state.write(str(folder / "checkpoint" / f"epoch-{epoch}"))
    except tf.errors.OpError as error:
        reason = re.sub(r"{{.*?}}|\[Op:.*?\]", "", mnist_data.reason(error.message)).strip()
        raise UserError(f"{folder}: the checkpoint of epoch {epoch} cannot be written: {reason}") from error
    finally:
        remove_unfinished(folder)
    remove_checkpoints(folder, [before for before in checkpoint_epochs(folder) if before < epoch - 1])


def restore_checkpoint(state, folder, console):
    """Sets the state to the newest good checkpoint; returns its history, empty if there never was one.

    Raises UserError if all are damaged or gone, or if they are of another network.
    """
    damage = []
    for epoch in reversed(checkpoint_epochs(folder)):
        try:
            state.read(str(folder / "checkpoint" / f"epoch-{epoch}")).assert_consumed()
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"{folder}: the checkpoint of epoch {epoch} does not fit the network as it is now:"
                " undo what was changed in vae.py since, or start anew in another folder"
            ) from error
        except Exception as error:  # TensorFlow has no one kind of it for damage
            damage.append(f"the checkpoint of epoch {epoch} is damaged: {mnist_data.reason(error)}")
        else:
            console.line("; ".join([*damage, f"taking the state after epoch {epoch}"]))
            return json.loads(state.history.numpy())
    if damage or (folder / "log.csv").exists():
        problem = "; ".join(damage) or "the checkpoints are gone"
        raise UserError(f"{folder}: {problem}: train anew in another folder")
    return []


# --- training and evaluation -------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_stderr():
    """Keeps what native libraries say from standard error, but for errors.

    What is written is shown where the block raises an exception.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        shown = rb""
        try:
            yield
            shown = rb"[EF]\d{4} (?!.*cuInit)"  # a machine without a GPU is no error
        finally:
            os.dup2(stderr, 2)
            held.seek(0)
            os.write(stderr, b"".join(line for line in held if re.match(shown, line)))
            os.close(stderr)


def import_tensorflow(log_level="2"):
    """Imports TensorFlow and what is built on it, for this whole file and without its start-up messages.

    That takes seconds, so it waits until the flags have been checked. log_level: what it may say later on its
    own, "2" errors, "3" nothing.
    """
    global keras, plot_utils, tf, vae  # noqa: PLW0603
    asked_for = "TF_CPP_MIN_LOG_LEVEL" in os.environ
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", log_level)
    gc.disable()  # a quarter of the import would go to looking for garbage
    with contextlib.nullcontext() if asked_for else quiet_stderr():
        import tensorflow as tf
        from tensorflow import keras

        for gpu in tf.config.list_physical_devices("GPU"):  # where there is none, it says what it misses
            tf.config.experimental.set_memory_growth(gpu, True)  # other programs may use it, too
    import plot_utils
    import vae

    gc.freeze()  # and a second, in what it brought, when the program ends
    gc.enable()


def join_workers(console):
    """Returns the strategy over the machines of TF_CONFIG; ends the program if one does not come in time.

    Raises UserError if TensorFlow cannot use the addresses.
    """
    console.line(f"waiting for the other workers, {JOIN_SECONDS / 60:g} minutes at most")
    # TensorFlow waits without an end and lets no Python run meanwhile: faulthandler does not need it to.
    with Path(os.devnull).open("w") as nowhere, interrupts_go_to(signal.SIG_DFL):
        faulthandler.dump_traceback_later(JOIN_SECONDS, exit=True, file=nowhere)
        try:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        except Exception as error:  # there is no one kind
            problem = mnist_data.reason(error)
            raise UserError(f"--distribute multi_worker cannot use TF_CONFIG: {problem}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which TensorFlow has taken, and would not end for
    return strategy


@contextlib.contextmanager
def interrupts_go_to(handler):
    """Has Ctrl-C handled in another way, unless the program was started so that it ignores it."""
    previous = signal.getsignal(signal.SIGINT)
    if previous != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def make_strategy(flags, console):
    """Yields the tf.distribute strategy to train with. Raises FlagError if the batch cannot be split so.

    Within, what TensorFlow says of a worker that is gone is a UserError.
    """
    if flags.distribute == "mirrored":
        strategy = tf.distribute.MirroredStrategy()
    elif flags.distribute == "multi_worker":
        strategy = join_workers(console)
    else:
        strategy = tf.distribute.get_strategy()
    n = strategy.num_replicas_in_sync
    if flags.batch_size % n:
        problem = f"cannot be split over {n} replicas"
        raise FlagError(f"--batch_size {flags.batch_size} {problem}: take a multiple, or --distribute none")
    errors = tf.errors
    gone = (errors.UnavailableError, errors.DeadlineExceededError, errors.AbortedError, errors.CancelledError)
    try:
        yield strategy
        check_agreement(strategy, "end", "")  # wait for each other: who ends earlier counts as dead
    except gone as error:
        if flags.distribute != "multi_worker":
            raise
        again = "start all of them again, with --resume once an epoch was finished"
        raise UserError(f"another worker is gone: {again}") from error


def check_agreement(strategy, what, content):
    """Waits for all workers; raises UserError unless all of them have the same content, a string."""
    if strategy.num_replicas_in_sync == 1:
        return

    @tf.function
    def checksums():
        checksum = tf.constant([zlib.crc32(content.encode())], tf.int64)
        return strategy.gather(strategy.run(lambda: checksum), axis=0)

    if len(set(checksums().numpy())) > 1:
        raise UserError(f"--distribute multi_worker: the workers have not the same {what}")


def make_optimizer(flags, n_steps, weights):
    """Returns the Keras optimizer of the weights; its rate decays to 0 over n_steps, along a half cosine."""

    class ClippedSGD(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(clip(gradient), variable, learning_rate)

    rate = keras.optimizers.schedules.CosineDecay(flags.learn_rate, n_steps)
    if flags.optimizer == "adam":
        optimizer = keras.optimizers.Adam(rate)
    else:
        optimizer = ClippedSGD(rate, MOMENTUM, nesterov=True)
    optimizer.build(weights)
    return optimizer


def clip(gradient):
    """Returns a weight matrix's or bias vector's gradient, scaled down where its norm is above CLIP_NORM."""
    # The norm of norms over few rows each: XLA keeps both cores busy with them and writes no squares down.
    # An epoch takes a sixth longer with tf.clip_by_norm, whose sum is over the whole matrix.
    rows = tf.reshape(gradient, (math.gcd(gradient.shape.num_elements(), 16), -1))
    norm = tf.norm(tf.norm(rows, axis=0))
    return gradient * (CLIP_NORM / tf.maximum(norm, CLIP_NORM))


def pixels(images):
    """Returns uint8 images as float32 in [0, 1]."""
    return tf.cast(images, tf.float32) / 255


def shown(images, flags, seed):
    """Returns training images (batch, 784) uint8 as the network shall reconstruct them."""
    return vae.binarize(pixels(images), seed) if flags.binarize else pixels(images)


def seen(x, flags, seed):
    """Returns what the encoder sees of images x: (batch, 784)."""
    return vae.salt_and_pepper(x, flags.noise_level, seed) if flags.add_noise else x


def make_train_steps(strategy, network, optimizer, flags):
    """Returns the function that trains: stochastic gradient descent on the negative ELBO."""
    weights = network.trainable_variables

    # Nothing in it needs autograph, whose conversion takes half a second.
    @tf.function(jit_compile=True, autograph=False)
    def loss_and_gradients(images, seed):
        """Returns reconstruction error and KL divergence, (2,), and the gradients of their sum."""
        x = shown(images, flags, seed)
        with tf.GradientTape() as tape:
            terms = network.negative_elbo(x, seen(x, flags, seed), seed, flags.keep_prob)
            terms = tf.stack([tf.reduce_mean(term) for term in terms])
            loss = tf.reduce_sum(terms) / strategy.num_replicas_in_sync  # Keras sums their gradients
        return terms, tape.gradient(loss, weights)

    def step_of_replica(batch, seed):
        """Takes a step, together with the other replicas, of which each has its share of the batch."""
        terms, gradients = loss_and_gradients(vae.own_rows(batch), seed)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return terms

    @tf.function(jit_compile=flags.distribute == "none")  # XLA compiles no exchange between replicas
    def train_steps(images, batches, epoch, first, last):
        """Takes the steps from `first` to before `last` of an epoch.

        images: (n, 784) uint8; batches: (steps, batch) indices of images; the others are integers.
        Returns the sum over the steps of reconstruction error and KL divergence, nats per image: (2,).
        """
        total = tf.zeros(2)
        step = first
        while step < last:  # XLA compiles `for step in tf.range(first, last)` anew for other bounds
            seed = tf.random.fold_in(tf.stack([flags.seed, epoch]), step)
            batch = tf.gather(images, batches[step])
            terms = strategy.run(step_of_replica, (batch, seed))
            total += strategy.reduce("MEAN", terms, axis=None)
            step += 1
        return total

    return train_steps


def build(strategy, images, flags):
    """Returns the state to train, with a copy on each replica, for images (n, 784) uint8."""
    with strategy.scope():
        network = vae.VAE(flags.dim_z, flags.n_hidden, images.mean(axis=0) / 255, flags.seed)
        n_steps = flags.num_epochs * (len(images) // flags.batch_size)
        optimizer = make_optimizer(flags, n_steps, network.trainable_variables)
    return make_state(network, optimizer)


class Digits(NamedTuple):
    """What the network learns from and what it is tested on: (n, 784) uint8, labels (n,)."""

    train_images: np.ndarray
    valid_images: np.ndarray
    valid_seen: np.ndarray  # what the encoder sees of them
    test_images: np.ndarray
    test_seen: np.ndarray
    test_labels: np.ndarray


def make_digits(data, flags):
    """Returns the digits of MNIST; those of validation and test are binarized or get their noise once."""

    def draw_once(images, part):
        x = pixels(images)
        if flags.binarize:
            x = vae.binarize(x, tf.random.fold_in([flags.seed, EVALUATION_EPOCH], part))
        x_seen = seen(x, flags, tf.random.fold_in([flags.seed, NOISE_EPOCH], part))
        return [tf.cast(tf.round(255 * array), tf.uint8).numpy() for array in (x, x_seen)]

    valid, test = draw_once(data.valid_images, 0), draw_once(data.test_images, 1)
    return Digits(data.train_images, *valid, *test, data.test_labels)


def make_evaluate(network, flags):
    """Returns the function that estimates the ELBO, without dropout and with one draw of z an image."""

    @tf.function(autograph=False)  # XLA would be no faster, and takes twice as long to compile it
    def block_terms(images, images_seen, block):
        seed = tf.random.fold_in(tf.stack([flags.seed, EVALUATION_EPOCH]), block)
        terms = network.negative_elbo(pixels(images), pixels(images_seen), seed)
        return [tf.reduce_mean(term) for term in terms]

    def evaluate(images, images_seen):
        """Returns {elbo, reconstruction, kl}, nats per image. Both arguments are (n, 784) uint8."""
        blocks = zip(*(in_blocks(batch, EVALUATION_BLOCK) for batch in (images, images_seen)), strict=True)
        terms = [block_terms(*block, tf.constant(i)) for i, block in enumerate(blocks)]
        return elbo_terms(*np.mean(terms, axis=0))

    return evaluate


def in_blocks(images, size):
    """Returns images (n, 784) as tensors of `size` images each, which divides n."""
    return [tf.constant(block) for block in images.reshape(-1, size, images.shape[1])]


def elbo_terms(reconstruction, kl):
    """Returns the ELBO and its two terms by name, as Python floats."""
    return {"elbo": -float(reconstruction + kl), "reconstruction": float(reconstruction), "kl": float(kl)}


def check_finite(row, flags):
    """Raises UserError if one of an epoch's numbers is NaN or infinite."""
    for name, value in row.items():
        if not math.isfinite(value):
            rate = f"try a --learn_rate below {flags.learn_rate:g}"
            raise UserError(
                f"training left the numbers in epoch {row['epoch']}, where {name} is {value}: {rate}"
            )


def shuffled_batches(n_images, epoch, flags):
    """Returns an epoch's batches, (steps, batch) indices of images.

    Images that do not fill a last batch are left out, others in every epoch.
    """
    n_steps = n_images // flags.batch_size
    order = tf.random.experimental.stateless_shuffle(tf.range(n_images), [flags.seed, epoch])
    return tf.reshape(order[: n_steps * flags.batch_size], (n_steps, flags.batch_size))


def train_epoch(train_steps, images, epoch, flags, console, interrupted):
    """Goes through the training images (n, 784) once; returns {elbo, reconstruction, kl}.

    They are means over the epoch, with dropout, while the weights move. Raises UserError as soon as a
    loss is not finite, and KeyboardInterrupt once the event `interrupted` is set.
    """
    batches = shuffled_batches(len(images), epoch, flags)
    total = np.zeros(2)
    pieces = np.linspace(0, len(batches), UPDATES_PER_EPOCH + 1).astype(np.int32)
    for first, last in itertools.pairwise(pieces):
        console.bar(f"epoch {epoch}/{flags.num_epochs}", first, len(batches))
        total += train_steps(images, batches, *map(tf.constant, (epoch, first, last))).numpy()
        check_finite({"epoch": epoch, "loss": total.sum()}, flags)
        if interrupted.is_set():
            raise KeyboardInterrupt
    return elbo_terms(*total / len(batches))


@contextlib.contextmanager
def deferred_interrupt():
    """Yields an event that the first Ctrl-C sets, so that a finished epoch is written whole."""
    interrupted = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def interrupt(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    with interrupts_go_to(interrupt):
        yield interrupted


def go_on(strategy, state, data, flags, folder, console):
    """Sets the state to a run's newest good checkpoint; returns its history and the pictures drawn of it."""
    history = restore_checkpoint(state, flags.results_path, console)
    check_agreement(strategy, f"checkpoint in {flags.results_path}", json.dumps(history))
    if folder:
        write_json(folder / "config.json", configuration(flags))
    if not (folder and history):
        return history, []
    for name in PICTURES:  # of an earlier state, and perhaps not wanted any more
        (folder / name).unlink(missing_ok=True)
    if len(history) < flags.num_epochs:
        (folder / "metrics.json").unlink(missing_ok=True)
    write_log(folder / "log.csv", history)
    return history, draw_pictures(state, data, flags, history, folder)


def train(strategy, state, evaluate, data, flags, folder, console):
    """Trains for all epochs; keeps checkpoint, log and pictures in the folder at the newest.

    folder: None where another worker writes. Returns the pictures' paths. Ctrl-C ends it with a
    KeyboardInterrupt that says what is there.
    """
    history, pictures = [], []
    if flags.resume:
        history, pictures = go_on(strategy, state, data, flags, folder, console)
    train_steps = make_train_steps(strategy, state.network, state.optimizer, flags)
    images = tf.constant(data.train_images)
    if len(history) < flags.num_epochs:
        # The first call compiles. It takes no steps, so that the first epoch's seconds are as the others'.
        train_steps(images, shuffled_batches(len(images), 0, flags), *map(tf.constant, (0, 0, 0)))
    start, n_before = time.perf_counter(), len(history)
    n_drawn, drawn_at, drawing = n_before, start, 0.0
    with deferred_interrupt() as interrupted:
        try:
            for epoch in range(n_before + 1, flags.num_epochs + 1):
                row = {"epoch": epoch}
                learn_rate = float(state.optimizer.learning_rate)
                epoch_start = time.perf_counter()
                terms = train_epoch(train_steps, images, epoch, flags, console, interrupted)
                seconds = time.perf_counter() - epoch_start
                row |= {f"train_{name}": value for name, value in terms.items()}
                valid = evaluate(data.valid_images, data.valid_seen)
                row |= {f"valid_{name}": value for name, value in valid.items()}
                row |= {"learn_rate": learn_rate, "seconds": round(seconds, 3)}
                check_finite(row, flags)
                if folder:
                    if flags.animate:
                        add_frame(state, flags)
                    save_checkpoint(state, [*history, row], folder)
                    write_log(folder / "log.csv", [*history, row])
                history.append(row)
                undrawn = time.perf_counter() - drawn_at
                if folder and (epoch == flags.num_epochs or drawing < PICTURES_SHARE * undrawn):
                    pictures = draw_pictures(state, data, flags, history, folder)
                    n_drawn, drawing = epoch, time.perf_counter() - drawn_at - undrawn
                    drawn_at = time.perf_counter()
                spent = time.perf_counter() - start
                left = spent / (epoch - n_before) * (flags.num_epochs - epoch)
                console.line(progress_line(row, flags, left))
                if interrupted.is_set():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            if folder and n_drawn < len(history):
                draw_pictures(state, data, flags, history, folder)
            done = f"the log and pictures of {len(history)} finished epochs are in {folder}, for --resume"
            raise KeyboardInterrupt(done if history else "no epoch was finished") from None
    return pictures


def progress_line(row, flags, left):
    """Returns the line that sums an epoch up, with the seconds left."""

    def terms(part):
        elbo, reconstruction, kl = (row[f"{part}_{name}"] for name in ("elbo", "reconstruction", "kl"))
        return f"{elbo:8.2f} = -({reconstruction:6.2f} + {kl:5.2f})"

    epoch = f"{row['epoch']:{len(str(flags.num_epochs))}}/{flags.num_epochs}"
    minutes_left, seconds_left = divmod(round(left), 60)
    seconds = f"{row['seconds']:.1f} s, {minutes_left}:{seconds_left:02} left"
    return f"epoch {epoch}  training {terms('train')}  validation {terms('valid')}  {seconds}"


# --- results -----------------------------------------------------------------------------------------


def decode(network, z):
    """Returns the images (n, 784), the pixels' probabilities, that latent vectors z (n, dim_z) stand for."""
    return tf.sigmoid(network.bernoulli_decoder(tf.constant(z, tf.float32))).numpy()


def decode_manifold(network, flags):
    """Returns the z of the manifold's columns and of its rows, and the images decoded there."""
    z_x, z_y = plot_utils.manifold_axes(flags.PMLR_n_img_x, flags.PMLR_n_img_y, flags.PMLR_z_range)
    z = np.stack(np.meshgrid(z_x, z_y), axis=-1).reshape(-1, 2)
    return z_x, z_y, decode(network, z)


def add_frame(state, flags):
    """Adds the manifold of the state's network to its frames; they begin anew where their size is another."""
    z_x, z_y, images = decode_manifold(state.network, flags)
    frame = plot_utils.frame(images, len(z_x), len(z_y))
    frames = state.frames.numpy()
    before = frames if frames.shape[1:] == frame.shape else frame[None][:0]
    state.frames.assign(np.concatenate([before, frame[None]]))


def draw_pictures(state, data, flags, history, folder):
    """Draws every picture of the state into the folder; returns their paths."""
    network = state.network
    n_x, n_y = flags.PRR_n_img_x, flags.PRR_n_img_y
    grid = (n_x, n_y, flags.PRR_resize_factor)

    def test_digits(n):
        """Returns the first n test digits, what is seen of them, and their latent means."""
        x, x_seen = pixels(data.test_images[:n]), pixels(data.test_seen[:n])
        mean, _ = network.gaussian_encoder(x_seen)
        return x.numpy(), x_seen.numpy(), mean.numpy()

    pictures = {}
    if flags.PRR:
        x, x_seen, mean = test_digits(n_x * n_y)
        restored = decode(network, mean)
        pictures["input.png"] = plot_utils.image_grid(x, *grid)
        if flags.add_noise:
            pictures["input_noise.png"] = plot_utils.image_grid(x_seen, *grid)
        pictures["reconstruction.png"] = plot_utils.image_grid(restored, *grid)
        if flags.add_noise:
            pictures["denoising.png"] = plot_utils.comparison([x, x_seen, restored], *grid)
    if flags.PMLR:
        z_x, z_y, images = decode_manifold(network, flags)
        pictures["manifold.png"] = plot_utils.manifold(images, z_x, z_y, flags.PMLR_resize_factor)
        if flags.animate and len(frames := state.frames.numpy()):
            pictures["manifold.gif"] = plot_utils.animation(frames)
        _, _, mean = test_digits(flags.PMLR_n_samples)
        pictures["latent_map.png"] = plot_utils.latent_map(mean, data.test_labels[: flags.PMLR_n_samples])
    z = vae.sample_prior(n_x * n_y, flags.dim_z, [flags.seed, EVALUATION_EPOCH])
    pictures["samples.png"] = plot_utils.image_grid(decode(network, z), *grid)
    _, x_seen, mean = test_digits(2 * N_LINES)
    z = np.linspace(mean[::2], mean[1::2], LINE_STEPS, axis=1)
    lines = decode(network, z.reshape(-1, flags.dim_z)).reshape(N_LINES, LINE_STEPS, -1)
    pictures["interpolation.png"] = plot_utils.interpolation(x_seen[::2], lines, x_seen[1::2])
    curves = ([row[f"{part}_elbo"] for row in history] for part in ("train", "valid"))
    pictures["elbo.png"] = plot_utils.elbo_curves(*curves)
    for name, content in pictures.items():
        mnist_data.write_whole(folder / name, content)
    return [folder / name for name in pictures]


def peak_signal_to_noise(x, clean):
    """Returns the PSNR in decibels of images x against clean ones, both (n, 784) in [0, 1]."""
    return -10 * math.log10(np.mean((x - clean) ** 2))


def make_metrics(network, evaluate, data, flags, console):
    """Returns what is measured on the test digits, by name, and says it on the console."""
    test = evaluate(data.test_images, data.test_seen)
    metrics = {f"test_{name}": value for name, value in test.items()}
    console.line("test ELBO {elbo:.2f} = -({reconstruction:.2f} + {kl:.2f}) nats per image".format(**test))
    if flags.add_noise or flags.n_importance:
        mean, _ = network.gaussian_encoder(pixels(data.test_seen))
    if flags.add_noise:
        noisy, restored = pixels(data.test_seen), decode(network, mean)
        psnr = [peak_signal_to_noise(x, pixels(data.test_images)) for x in (noisy, restored)]
        metrics |= dict(zip(("psnr_noisy", "psnr_restored"), psnr, strict=True))
        console.line("PSNR {:.2f} dB with noise, {:.2f} dB restored".format(*psnr))
    if flags.n_importance:
        log_px = mean_log_px(network, data.test_images, data.test_seen, flags, console)
        active = int(vae.active_units(mean))
        metrics |= {"test_log_px": log_px, "n_importance": flags.n_importance, "active_units": active}
        draws = f"{flags.n_importance:,} draws"
        console.line(f"test log p(x) {log_px:.2f} nats per image, {draws}; {active} active latent units")
    return metrics


def mean_log_px(network, images, images_seen, flags, console):
    """Returns the mean of log p(x) over images (n, 784) uint8, nats per image."""

    @tf.function(jit_compile=True)
    def block_log_px(images, images_seen, block, n_importance):  # a constant would unroll the loop over draws
        seed = tf.random.fold_in(tf.stack([flags.seed, EVALUATION_EPOCH]), block)
        return network.log_marginal_likelihood(pixels(images), pixels(images_seen), n_importance, seed)

    blocks = list(zip(*(in_blocks(batch, LOG_PX_BLOCK) for batch in (images, images_seen)), strict=True))
    log_px = []
    for i, block in enumerate(blocks):
        console.bar("log p(x)", i, len(blocks))
        log_px.append(block_log_px(*block, tf.constant(i), tf.constant(flags.n_importance)).numpy())
    return float(np.mean(log_px, dtype=np.float64))


def generate(network, flags, console):
    """Returns new images (n, 28, 28) uint8 and their z (n, dim_z), drawn from the prior."""
    images = np.empty((flags.n_generate, 784), np.uint8)
    z = np.empty((flags.n_generate, flags.dim_z), np.float32)
    for block, first in enumerate(range(0, flags.n_generate, IMAGES_BLOCK)):
        console.bar("new images", first, flags.n_generate)
        seed = tf.random.fold_in([flags.seed, GENERATION_EPOCH], block)
        draws = vae.sample_prior(IMAGES_BLOCK, flags.dim_z, seed)
        x = decode(network, draws)
        x = vae.binarize(x, seed).numpy() if flags.binarize else x
        n = len(images[first : first + IMAGES_BLOCK])  # fewer in the last block
        images[first : first + n] = np.rint(255 * x[:n])
        z[first : first + n] = draws[:n]
    return {"images": images.reshape(-1, 28, 28), "z": z}


def read_own_images(flags):
    """Returns the images that --reconstruct names: (n, 784), or None; FlagError if they are no digits."""
    if flags.reconstruct is None:
        return None
    try:
        return mnist_data.read_images(flags.reconstruct)
    except mnist_data.Unusable as error:
        raise FlagError(f"--reconstruct {flags.reconstruct} {error}") from error


def write_arrays(path, arrays):
    """Writes arrays by name to a .npz file, whole or not at all."""
    with mnist_data.whole_file(path) as file:
        np.savez(file, **arrays)


def reconstruct(network, x, flags, folder):
    """Encodes and decodes images x: (n, 784); writes the result and a picture of the first 100 beside theirs.

    Returns the two files' paths.
    """
    z, images = [], []
    for first in range(0, len(x), IMAGES_BLOCK):
        mean, _ = network.gaussian_encoder(x[first : first + IMAGES_BLOCK])
        z.append(mean.numpy())
        images.append(np.rint(255 * decode(network, mean)).astype(np.uint8))
    z, images = np.concatenate(z), np.concatenate(images)
    write_arrays(folder / "reconstructed.npz", {"images": images.reshape(-1, 28, 28), "z": z})
    n = min(len(x), 100)
    n_x, n_y = min(n, 10), math.ceil(n / 10)
    in_and_out = [np.pad(batch[:n], ((0, n_x * n_y - n), (0, 0))) for batch in (x, images / 255)]
    mnist_data.write_whole(
        folder / "reconstructed.png", plot_utils.comparison(in_and_out, n_x, n_y, flags.PRR_resize_factor)
    )
    return [folder / "reconstructed.npz", folder / "reconstructed.png"]


def begin_run(folder, flags):
    """Makes a folder ready for a run's results, and a run's folder by its config.json."""
    if flags.overwrite:
        remove_run(folder)
    if flags.resume:  # the config is written once a checkpoint is found that fits
        remove_unfinished(folder)
    else:
        write_json(folder / "config.json", configuration(flags))


def work_with(network, evaluate, data, own_images, flags, folder, console):
    """Measures the network and makes with it what the flags ask for; returns the paths of that."""
    metrics = make_metrics(network, evaluate, data, flags, console)
    write_json(folder / "metrics.json", read_metrics(folder) | metrics)
    paths = []
    if flags.n_generate:
        write_arrays(folder / "generated.npz", generate(network, flags, console))
        paths.append(folder / "generated.npz")
    if flags.reconstruct:
        paths += reconstruct(network, own_images, flags, folder)
    return paths


def run(flags, folder, own_images, console):
    """Does what the flags ask for, from the data to the results in the folder.

    own_images: (n, 784), those of --reconstruct, or None.
    """
    training = f"{flags.num_epochs} epochs of {flags.optimizer}"
    task = f"the network of {flags.load}" if flags.load else training
    console.line(f"{folder}: dim_z {flags.dim_z}, {task}")
    data = mnist_data.load_mnist(flags.data_dir, console)
    console.line("loading TensorFlow")
    # Of a worker that is gone, TensorFlow raises an exception, and says it in many lines before.
    import_tensorflow("3" if flags.distribute == "multi_worker" else "2")
    with make_strategy(flags, console) as strategy:
        if flags.augment and not flags.load:
            augmented = mnist_data.augment(data.train_images, flags.seed, console)
            data = data._replace(train_images=augmented)
        fixed = sorted(fixed_flags(flags, RESUME_MAY_CHANGE).items())
        check_agreement(strategy, "flags", f"{fixed} {flags.num_epochs} {flags.resume}")
        if folder and not flags.load:
            begin_run(folder, flags)
        data = make_digits(data, flags)
        state = build(strategy, data.train_images, flags)
        evaluate = make_evaluate(state.network, flags)
        if flags.load:
            history = restore_checkpoint(state, flags.load, console)
            if folder == flags.load:
                remove_unfinished(folder)
            else:
                begin_run(folder, flags)
            results = draw_pictures(state, data, flags, history, folder)
        else:
            results = train(strategy, state, evaluate, data, flags, folder, console)
        if folder:
            results += work_with(state.network, evaluate, data, own_images, flags, folder, console)
            for path in results:
                console.line(f"  {path}")


def main(arguments=None):
    """Runs the program; returns its exit status."""
    flags = parse_flags(arguments)
    console = Console(quiet=not is_chief(flags))
    try:
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"this Python lacks {', '.join(missing)}: pip install -r requirements.txt")
        own_images = read_own_images(flags)
        with results_folder(flags) as folder:
            run(flags, folder, own_images, console)
    except KeyboardInterrupt as interrupt:
        console.line(f"interrupted: {interrupt}" if str(interrupt) else "interrupted")
        return 130
    except (UserError, mnist_data.DataError, OSError, MemoryError) as error:
        console.line(f"run_main.py: error: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
