"""Trains a variational autoencoder on MNIST; `run`, near the end, is the whole story in one screen."""

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
import mnist_data
from mnist_data import UserError, reason, whole_file, write_whole


class Lazy(argparse.Namespace):
    """A module that is imported at its first use, because TensorFlow takes seconds."""

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


tf, plot_utils, vae = (Lazy(name=name) for name in ("tensorflow", "plot_utils", "vae"))
say = partial(print, flush=True)

EVALUATION, GENERATION = 0, -1  # in place of an epoch in the seeds of random numbers; epochs count from 1

# The recipe: 20 epochs of SGD at dim_z 2 give a test ELBO of -137.7 (median of three seeds).
MOMENTUM = 0.98  # Nesterov's
WEIGHT_DECAY = 0.003  # gains half a nat in 60 epochs: the network fits the training digits less closely
# In the first epochs, gradient norms range from 1 (biases) to 50 (the encoder's output layer), so each is
# clipped on its own: with all clipped by one common norm, of 1 or 3, the ELBO is -145.7 or -142.1.
CLIP_NORM = 1.0
ANNEALED = 0.5  # the share of the run during which dropout declines to nothing


def clipped_sgd(learning_rate):
    """Returns SGD with Nesterov momentum and weight decay, which clips each gradient on its own."""

    class ClippedSGD(tf.keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            # XLA computes one large norm on one core, but many small ones on all, which saves a sixth.
            rows = tf.reshape(gradient, (math.gcd(gradient.shape.num_elements(), 16), -1))
            norm = tf.norm(tf.norm(rows, axis=0))
            clipped = gradient * (CLIP_NORM / tf.maximum(norm, CLIP_NORM))
            super().update_step(clipped, variable, learning_rate)

    return ClippedSGD(learning_rate, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)


OPTIMIZERS = {  # name: (function from a learning rate to a Keras optimizer, learning rate at the start)
    "sgd": (clipped_sgd, 0.02),
    "adam": (lambda rate: tf.keras.optimizers.Adam(learning_rate=rate), 0.002),  # loads TensorFlow when used
}

MODELS = {  # --model: the class in vae.py, the flags that only some models have, and their defaults
    "vae": ("VAE", {}),
    "iwae": ("IWAE", {"n_samples": 5}),
    "least_squares": ("LeastSquares", {}),
    "stick_breaking": ("StickBreaking", {}),
    "ladder": ("Ladder", {"dim_z_lower": 64}),
    "stein": ("Stein", {"n_samples": 20}),
    "labels": ("Labels", {"n_labels": None}),
}


def number(kind, low, high=2**31 - 1):
    """Returns an argparse type: an int or a float from low to high."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {low} to {high}")

    return parse


def path(text):
    """An argparse type: a path of this machine."""
    if "://" in text or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path of this machine")
    return Path(text).expanduser()


whole, real, switch = partial(number, int), partial(number, float), (True, False)

# Where a flag's value comes from when a run is resumed or loaded. OWN: the run; another is refused. KEPT:
# the run, unless given again. RESUMED: the same for --resume, but not for --load. COMMAND: the command only.
OWN, KEPT, RESUMED, COMMAND = "own", "kept", "resumed", "command"

FLAGS = {  # group: (name, argparse type or choices, default, whose, help)
    "model": (
        ("model", tuple(MODELS), "vae", OWN, f"the lecture's vae, or a paper's: {', '.join(MODELS)}"),
        ("dim_z", whole(1, 10_000), 2, OWN, "length of a latent vector"),
        ("n_hidden", whole(1, 100_000), 500, OWN, "units per hidden layer"),
        ("keep_prob", real(0.001, 1), 0.9, OWN, "dropout keep probability at the start; 1 is no dropout"),
    ),
    "training": (
        ("kl_weight", real(0, 1_000), 1.0, OWN, "weight of the KL divergence in training"),
        ("warm_up", whole(0), 0, OWN, "epochs over which that weight rises from 0"),
        ("n_samples", whole(1, 1_000), None, OWN, "samples of z to train with (default: iwae 5, stein 20)"),
        ("dim_z_lower", whole(1, 10_000), None, OWN, "length of the ladder's lower z (default: 64)"),
        ("n_labels", whole(1), None, OWN, "labelled digits of each class (default: all)"),
        ("optimizer", tuple(OPTIMIZERS), "sgd", OWN, "SGD with momentum and clipped gradients, or Adam"),
        ("learn_rate", real(1e-12, 1e6), None, OWN, "at the start (default: 0.02 for sgd, 0.002 for adam)"),
        ("num_epochs", whole(1), 20, OWN, "passes through the training digits; --resume may change it"),
        ("batch_size", whole(1, mnist_data.N_TRAIN), 128, OWN, "mini-batch size"),
        ("seed", whole(0), 0, OWN, "all random numbers are functions of it"),
        ("distribute", ("none", "mirrored", "multi_worker"), "none", RESUMED, "mirrored or multi_worker"),
    ),
    "data": (
        ("data_dir", path, Path("data"), KEPT, "MNIST's folder; what it lacks is downloaded"),
        ("add_noise", switch, False, OWN, "learn to restore digits from salt-and-pepper noise"),
        ("noise_level", real(0.001, 1), 0.5, OWN, "probability that noise makes a pixel black or white"),
        ("augment", switch, False, OWN, "learn from 4 rotated and shifted copies of each digit, too"),
        ("binarize", switch, False, OWN, "draw each pixel as black or white from its grey level"),
    ),
    "PRR: plot reproduction result": (
        ("PRR", switch, True, KEPT, "draw test digits and their reconstructions"),
        ("PRR_n_img_x", whole(1, 50), 10, KEPT, "digits from left to right"),
        ("PRR_n_img_y", whole(1, 50), 10, KEPT, "digits from top to bottom"),
        ("PRR_resize_factor", real(0.04, 3), 1.0, KEPT, "size of a digit in units of 28 pixels"),
    ),
    "PMLR: plot manifold learning result": (
        ("PMLR", switch, None, KEPT, "draw the decoded plane (default: at --dim_z 2); False: no map either"),
        ("PMLR_n_img_x", whole(1, 50), 20, KEPT, "digits from left to right"),
        ("PMLR_n_img_y", whole(1, 50), 20, KEPT, "digits from top to bottom"),
        ("PMLR_resize_factor", real(0.04, 3), 1.0, KEPT, "size of a digit in units of 28 pixels"),
        ("PMLR_z_range", real(0.001, 8), 3.0, KEPT, "the manifold shows z from minus this to this"),
        ("PMLR_n_samples", whole(1, mnist_data.N_TEST), 5_000, KEPT, "digits on the map, or all"),
        ("animate", switch, False, OWN, "keep how the manifold forms in manifold.gif, a frame per epoch"),
    ),
    "run, and what to do with it afterwards": (
        ("results_path", path, None, COMMAND, "new folder for the run (default: the next results/runN)"),
        ("resume", switch, False, COMMAND, "go on with the run in --results_path"),
        ("overwrite", switch, False, COMMAND, "remove the run in --results_path, or what --load made before"),
        ("load", path, None, COMMAND, "folder of a run to take the network from, instead of training"),
        ("n_importance", whole(1), None, RESUMED, "estimate log p(x) with this many samples of z per digit"),
        ("n_generate", whole(1, 1_000_000), None, COMMAND, "write this many new images to generated.npz"),
        ("reconstruct", path, None, COMMAND, "reconstruct your own digits: pictures, arrays, folders"),
    ),
}
WHOSE = {name: whose for rows in FLAGS.values() for name, _, _, whose, _ in rows}
# Files that only --overwrite replaces, and the flag that asks for each.
ONCE = {"generated.npz": "n_generate", "reconstructed.npz": "reconstruct", "reconstructed.png": "reconstruct"}


def make_parser():
    """Returns the parser of FLAGS."""
    parser = argparse.ArgumentParser("run_main.py", allow_abbrev=False)

    def refuse(message):
        raise UserError(f"{' '.join(message.split())}; --help lists the flags")

    parser.error = refuse
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, _, text in rows:
            more = {"choices": kind, "metavar": name.upper()} if isinstance(kind, tuple) else {"type": kind}
            more |= {"nargs": "+", "metavar": "FILE"} if name == "reconstruct" else {}
            if kind is switch:
                more |= {"type": lambda text: {"true": True, "false": False}.get(text.lower(), text)}
                more |= {"nargs": "?", "const": True, "metavar": "True|False"}
            shown = "" if default is None else f" (default: {default})"
            group.add_argument(f"--{name}", default=default, help=text + shown, **more)
    return parser


def parse_flags(arguments=None):
    """Returns the flags of a list of arguments, on top of those of the run that is resumed or loaded."""
    arguments = sys.argv[1:] if arguments is None else [str(argument) for argument in arguments]
    parser = make_parser()
    flags = parser.parse_args(arguments)
    if run := flags.load or (flags.resume and flags.results_path):
        recorded = read_json(run / "config.json").get("flags")
        if not isinstance(recorded, dict) or recorded.get("load"):
            raise UserError(f"{run} has no run that was trained there, or its config.json is damaged")
        own = {name for name, whose in WHOSE.items() if whose == OWN}
        if differing := sorted((own - recorded.keys()) | (recorded.keys() - WHOSE.keys())):
            raise UserError(f"the run in {run} is of code with other flags: --{', --'.join(differing)}")
        kinds = (OWN, KEPT, RESUMED) if flags.resume else (OWN, KEPT)
        kept = [f"--{n}={recorded[n]}" for n in WHOSE if WHOSE[n] in kinds and recorded.get(n) is not None]
        flags = parser.parse_args([*kept, *arguments])
        here = not flags.results_path or flags.results_path.resolve() == run.resolve()
        flags.results_path = run if here else flags.results_path
        free = {"num_epochs", "learn_rate"} if flags.resume else set() if here else {"seed"}
        for name in sorted(own - free):
            if (given := getattr(flags, name)) != (value := recorded[name]):
                raise UserError(f"--{name} is {given}, and the run in {run} has {value}: leave it out")
    flags.learn_rate = flags.learn_rate or OPTIMIZERS[flags.optimizer][1]
    for name, default in MODELS[flags.model][1].items():
        setattr(flags, name, default if getattr(flags, name) is None else getattr(flags, name))
    flags.PMLR = True if flags.PMLR is None and flags.dim_z == 2 else flags.PMLR
    check_together(flags)
    return flags


def check_together(flags):
    """Raises UserError for the first flags that do not fit each other or what is on disk."""
    folder, epochs, plane = flags.results_path, flags.num_epochs, flags.dim_z == 2
    files = [file.name for file in folder.glob("[!.]*")] if folder else []
    run = "config.json" in files and "data_sha256" in read_json(folder / "config.json")
    done = max(checkpoints(folder), default=0) if run else 0
    begun, goes_on = run and (done or "log.csv" in files), flags.resume or folder == flags.load
    made = [name for name, flag in ONCE.items() if getattr(flags, flag) and name in files]
    others = {name for _, own in MODELS.values() for name in own} - MODELS[flags.model][1].keys()
    alien = [f"--{name}" for name in sorted(others) if getattr(flags, name) is not None]
    for wrong, message in (
        (flags.load and flags.resume, "--resume trains on and --load does not train: take one of them"),
        (flags.resume and flags.overwrite, "--resume goes on with a run, --overwrite removes it: take one"),
        (flags.resume and not folder, "--resume needs the run's folder: name it with --results_path"),
        (flags.load and not checkpoints(flags.load), f"--load {flags.load} has no finished epoch"),
        (flags.load and flags.distribute != "none", "--distribute is for training, which --load does not do"),
        (flags.resume and epochs < done, f"--num_epochs {epochs}: {folder} has {done}; take no fewer"),
        (flags.PMLR and not plane, f"--PMLR draws a plane, and --dim_z is {flags.dim_z}: leave one out"),
        (flags.animate and not plane, "--animate shows the manifold: it needs --dim_z 2"),
        (flags.animate and epochs > 100, "--num_epochs has to be 100 or fewer in a run with --animate"),
        (alien, f"--model {flags.model} has no {' and no '.join(alien)}: leave it out"),
        (flags.binarize and flags.model == "least_squares", "--binarize: least_squares is for grey levels"),
        (flags.noise_level != 0.5 and not flags.add_noise, "--noise_level does nothing without --add_noise"),
        (folder and folder.is_file(), f"--results_path {folder} is a file: name a folder"),
        (flags.data_dir.is_file(), f"--data_dir {flags.data_dir} is a file: name a folder"),
        (files and not run, f"--results_path {folder} is not empty and holds no run: name another"),
        (begun and not goes_on and not flags.overwrite, f"{folder} holds a run: add --resume or --overwrite"),
        (made and not flags.overwrite, f"{folder} has {' and '.join(made)}: move that, or add --overwrite"),
    ):
        if wrong:
            raise UserError(message)


def load_data(flags):
    """Returns the data; UserError if they are not those of the run that goes on, or too few for the flags."""
    data = mnist_data.load_mnist(flags.data_dir)
    run, where = flags.load or (flags.resume and flags.results_path), f"--data_dir {flags.data_dir}"
    if run and read_json(run / "config.json").get("data_sha256") != data.sha256:
        raise UserError(f"{where} holds other data than the run in {run} began with")
    n_train, n_test = len(data.train_images), len(data.test_images)
    if flags.batch_size > n_train or flags.PRR_n_img_x * flags.PRR_n_img_y > n_test:
        raise UserError(f"{where} has {n_train:,} and {n_test:,} digits: lower --batch_size or --PRR_n_img_x")
    return data


def is_chief(flags):
    """Returns whether this process writes, of those that train together. UserError if TF_CONFIG is wrong."""
    if flags.distribute != "multi_worker":
        return True
    with contextlib.suppress(LookupError, ValueError, TypeError, AttributeError, RecursionError):
        config = json.loads(os.environ["TF_CONFIG"])
        jobs, job, index = config["cluster"], config["task"]["type"], config["task"]["index"]
        if index >= 0 and jobs[job][index] and all(type(hosts) is list and hosts for hosts in jobs.values()):
            return index == 0 and job == ("chief" if "chief" in jobs else "worker")
    example = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'
    raise UserError(f"--distribute multi_worker needs TF_CONFIG in the environment, like {example}")


def begin_run(flags, data):
    """Returns the run's folder: made if it is new, rid of the old run by --overwrite, with a config.json."""
    folder, numbered = flags.results_path, (Path("results", f"run{n}") for n in itertools.count(1))
    while folder is None:
        Path("results").mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (new := next(numbered)).mkdir()
            folder = new
    removed = [*folder.glob(".part-*"), *folder.glob("checkpoint/.part-*")]  # what a kill left
    if flags.overwrite and folder != flags.load:
        names = ("log.csv", "metrics.json", "latent.npz", "vae.keras", *ONCE, *plot_utils.PICTURES)
        removed += [*checkpoints(folder).values(), *(folder / name for name in names)]
    for file in removed:
        file.unlink(missing_ok=True)
    if folder != flags.load:
        own = vars(flags) | {"resume": False, "overwrite": False}
        modules = map(importlib.import_module, ("tensorflow", "keras", "numpy", "scipy", "matplotlib"))
        versions = {"python": sys.version} | {module.__name__: module.__version__ for module in modules}
        config = {"flags": own, "versions": versions, "data_sha256": data and data.sha256}
        write_whole(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    return folder


def read_json(path):
    """Returns the dictionary in a JSON file, {} if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError, TypeError):
        return dict(json.loads(path.read_text()))
    return {}


def write_log(folder, history):
    """Writes log.csv: one row per epoch."""
    rows = [history[0].keys(), *(row.values() for row in history)]
    write_whole(folder / "log.csv", "".join(",".join(map(str, row)) + "\n" for row in rows))


def checkpoints(folder):
    """Returns the checkpoints in a run's folder, {epoch: path}, the newest last."""
    files = {file.stem.removeprefix("epoch-"): file for file in folder.glob("checkpoint/epoch-*.npz")}
    return {int(epoch): files[epoch] for epoch in sorted(filter(str.isdecimal, files), key=int)}


def probe(network):
    """Returns three numbers that identify what a network computes: ELBO terms and an importance weight."""
    with tf.device("CPU"):  # a GPU rounds differently
        x = tf.convert_to_tensor(network.mean_image)[None, ::-1]  # reversed: as it is, centring makes it 0
        log_weights = network.log_weights(x, x, 1, seed=[0, 0])
        return np.concatenate([*network.elbo_terms(x, x, seed=[0, 0]), *log_weights])


def save_checkpoint(state, folder):
    """Writes the state after an epoch, and its log; keeps the state before."""
    epoch, variables = len(state.history), [*state.network.weights, *state.optimizer.variables]
    arrays = {"history": json.dumps(state.history), "frames": state.frames, "probe": probe(state.network)}
    arrays |= {f"variable_{i}": variable.numpy() for i, variable in enumerate(variables)}
    with whole_file(folder / "checkpoint" / f"epoch-{epoch}.npz") as part:
        np.savez(part, **arrays)
    for old in list(checkpoints(folder).values())[:-2]:
        old.unlink()
    write_log(folder, state.history)


def load_checkpoint(state, folder):
    """Sets the state to the newest good checkpoint in a run's folder, if there ever was one."""
    damage = []
    for file in reversed(checkpoints(folder).values()):
        try:
            with np.load(file) as arrays:
                if arrays.zip.testzip():
                    raise ValueError("wrong checksum")
                history, frames, expected, *values = dict(arrays).values()
            break
        except Exception as error:  # a damaged file makes those who read it raise anything
            damage.append(f"{file} is damaged ({reason(error)})")
    else:
        if damage or (folder / "log.csv").exists():
            raise UserError(f"{'; '.join(damage) or f'{folder} lacks its checkpoints'}: train anew elsewhere")
        return
    variables = [*state.network.weights, *(state.optimizer.variables if state.optimizer else ())]
    values = values if state.optimizer else values[: len(variables)]
    if [value.shape for value in values] != [tuple(variable.shape) for variable in variables]:
        raise UserError(f"{file} has weights of other shapes: undo what was changed in vae.py or config.json")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    found = probe(state.network)
    if not np.allclose(found, expected, rtol=1e-4, atol=1e-3):
        raise UserError(f"{file} is of a network that computed {expected}, not {found}: undo the change")
    state.history, state.frames = json.loads(str(history)), list(frames)
    say("; ".join([*damage, f"taking the state after epoch {len(state.history)}"]))


def load_tensorflow(flags):
    """Loads TensorFlow, whatever Keras' settings, without start-up messages, which no setting silences."""
    os.environ |= {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull, "TF_USE_LEGACY_KERAS": "0"}
    os.environ["TF_DETERMINISTIC_OPS"] = "1"  # or a GPU would give other bits in every run
    # Without autotuning, which that ends, Triton's matrix products take up to ten times as long as cuBLAS'.
    os.environ["XLA_FLAGS"] = f"--xla_gpu_enable_triton_gemm=false {os.environ.get('XLA_FLAGS', '')}"
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # other programs may use a GPU, too
    # When a worker is gone, TensorFlow logs many lines, then raises.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3" if flags.distribute == "multi_worker" else "2")
    chatter = r"WARNING: All log messages before absl|[IW]\d{4} |E\d{4} .*cuInit"  # no GPU is no error
    script = f"import re, sys; [print(line, end='') for line in sys.stdin if not re.match({chatter!r}, line)]"
    command = [sys.executable, "-c", script]  # a program of its own outlives a TensorFlow that dies
    stderr = os.dup(2)
    gc.disable()  # a quarter of the import would go to looking for garbage
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr, start_new_session=True) as filter_:
        os.dup2(filter_.stdin.fileno(), 2)
        try:
            tf.config.list_physical_devices()  # at its first use, it is loaded
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            gc.freeze()  # or else the end of the program takes a second to collect what the import brought
            gc.enable()


def join_workers():
    """Returns the strategy over the machines of TF_CONFIG, once all of them are there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would not run while TensorFlow waits
    say("waiting for the other workers: Ctrl-C ends that")
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except Exception as error:  # there is no one kind
        raise UserError(f"TF_CONFIG cannot be used: {reason(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # TensorFlow's own does not end the program


@contextlib.contextmanager
def make_strategy(flags):
    """Yields the tf.distribute strategy; within, too little memory or a lost worker is a UserError."""
    kinds = {"none": tf.distribute.get_strategy, "mirrored": tf.distribute.MirroredStrategy}
    strategy = kinds.get(flags.distribute, join_workers)()
    n, errors = strategy.num_replicas_in_sync, tf.errors
    if flags.batch_size % n:
        raise UserError(f"--batch_size {flags.batch_size} cannot be split over {n} replicas: take a multiple")
    gone = errors.UnavailableError, errors.DeadlineExceededError, errors.AbortedError, errors.CancelledError
    gone = gone if flags.distribute == "multi_worker" else ()
    try:
        yield strategy
        check_agreement(strategy, "ends", "")  # wait for each other: a worker that ends early counts as dead
    except (MemoryError, errors.ResourceExhaustedError) as error:
        raise UserError("out of memory: lower --n_hidden or --batch_size") from error
    except gone as error:
        raise UserError("another worker is gone: start all again, with --resume after an epoch") from error


def check_agreement(strategy, what, content):
    """Waits for all workers; raises UserError unless all of them have the same content, a string."""
    if strategy.num_replicas_in_sync > 1:
        checksum = partial(tf.strings.to_hash_bucket_fast, [content], 2**62)
        checksums = tf.function(lambda: strategy.gather(strategy.run(checksum), axis=0), autograph=False)()
        if len(set(checksums.numpy())) > 1:
            raise UserError(f"--distribute multi_worker: the workers have different {what}")


def prepare(images, flags, seed):
    """Returns the targets and the encoder's inputs, float32 in [0, 1], of images (batch, 784) uint8."""
    x = tf.cast(images, tf.float32) / 255
    x = vae.binarize(x, seed) if flags.binarize else x
    return x, vae.salt_and_pepper(x, flags.noise_level, seed) if flags.add_noise else x


def make_digits(data, flags):
    """Returns train_images (n, 784) uint8, train_ and test_labels (n,), and `valid` and `test` prepared."""
    augment = flags.augment and not flags.load
    train_images = mnist_data.augment(data.train_images, flags.seed) if augment else data.train_images
    seed = partial(tf.random.fold_in, [flags.seed, EVALUATION])
    valid = [np.asarray(images) for images in prepare(data.valid_images, flags, seed(0))]
    test = [np.asarray(images) for images in prepare(data.test_images, flags, seed(1))]
    labels = mnist_data.hide_labels(data.train_labels, flags.n_labels, flags.seed)
    train_labels = np.tile(labels, len(train_images) // len(labels))  # copies of a digit have its label
    labels = {"train_labels": train_labels, "test_labels": data.test_labels}
    return argparse.Namespace(train_images=train_images, valid=valid, test=test, **labels)


def build(digits, flags):
    """Returns all that training changes: network, optimizer, rows of log.csv, frames of the animation."""
    mean_image = digits.train_images.mean(axis=0) / 255 if digits else 0.5
    kind, own = MODELS[flags.model]
    options = {name: getattr(flags, name) for name in own}
    network = getattr(vae, kind)(flags.dim_z, flags.n_hidden, mean_image, flags.seed, **options)
    optimizer = None if flags.load else make_optimizer(network, digits, flags)
    return argparse.Namespace(network=network, optimizer=optimizer, history=[], frames=[])


def make_optimizer(network, digits, flags):
    """Returns the optimizer; its learning rate decays along a half cosine to 0 at the end of training."""
    n_steps = flags.num_epochs * (len(digits.train_images) // flags.batch_size)
    rate = tf.keras.optimizers.schedules.CosineDecay(flags.learn_rate, n_steps)
    optimizer = OPTIMIZERS[flags.optimizer][0](rate)
    optimizer.build(network.trainable_variables)
    return optimizer


def sgd_step(training_terms, images, weights, optimizer, flags, **options):
    """A step of stochastic gradient descent on the negative ELBO of a mini-batch; returns its terms, (2,).

    images: targets, encoder's inputs, labels. options: seed, keep_prob and kl_weight.
    """
    with tf.GradientTape() as tape:
        terms = training_terms(*images, **options)
        reconstruction, kl = (tf.reduce_sum(term) / flags.batch_size for term in terms)
        negative_elbo = reconstruction + options["kl_weight"] * kl
    gradients = tape.gradient(negative_elbo, weights)
    optimizer.apply_gradients(zip(gradients, weights, strict=True))
    return tf.stack([reconstruction, kl])


def compile_training(strategy, state, digits, flags):
    """Returns the function that trains for an epoch: all of its steps are one compiled function."""
    images, labels = tf.constant(digits.train_images), tf.constant(digits.train_labels)
    network, optimizer, training_terms = state.network, state.optimizer, state.network.training_terms
    if flags.distribute != "none":  # XLA cannot compile the exchange between replicas, only what lies between
        training_terms = tf.function(training_terms, jit_compile=True, autograph=False)
    n_steps, n_replicas = len(images) // flags.batch_size, strategy.num_replicas_in_sync
    linear = tf.keras.optimizers.schedules.PolynomialDecay
    # Annealed dropout (Rennie, Goel and Thomas 2014): its noise would hinder at the end.
    drop_prob = linear(1 - flags.keep_prob, max(1, int(ANNEALED * flags.num_epochs * n_steps)), 0.0)
    kl_weight = linear(0.0, max(1, flags.warm_up * n_steps), flags.kl_weight)

    def replica_step(indices, epoch, step):
        """A replica's part of a step: its share of the mini-batch, and random numbers of its own."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        share = flags.batch_size // n_replicas
        seed = tf.random.fold_in(tf.stack([flags.seed, epoch]), step * n_replicas + replica)
        mine = tf.slice(indices, [replica * share], [share])
        x, x_corrupted = prepare(tf.gather(images, mine), flags, seed)
        keep_prob = 1 - drop_prob(optimizer.iterations) if flags.keep_prob < 1 else 1
        weight = kl_weight(optimizer.iterations) if flags.warm_up else flags.kl_weight
        options = {"seed": seed, "keep_prob": keep_prob, "kl_weight": weight}
        batch = x, x_corrupted, tf.gather(labels, mine)
        return sgd_step(training_terms, batch, network.trainable_variables, optimizer, flags, **options)

    @tf.function(jit_compile=flags.distribute == "none")
    def train_steps(batches, epoch):
        total = tf.zeros(2)
        for step in tf.range(len(batches)):
            terms = strategy.run(replica_step, (batches[step], epoch, step))
            total += strategy.reduce("SUM", terms, axis=None)
        return total / len(batches)

    def train_epoch(epoch):
        """Goes through the training images once, with dropout; returns the means of the two terms, (2,)."""
        order = tf.random.experimental.stateless_shuffle(tf.range(len(images)), [flags.seed, epoch])
        batches = tf.reshape(order[: n_steps * flags.batch_size], (n_steps, flags.batch_size))
        return train_steps(batches, tf.constant(epoch)).numpy()

    return train_epoch


def in_batches(size, *arrays):
    """Yields the rows of arrays of the same length, `size` or fewer at a time."""
    return zip(*(np.array_split(array, math.ceil(len(array) / size)) for array in arrays), strict=True)


def evaluate(network, x, x_corrupted, flags):
    """Returns reconstruction error and KL divergence of targets and inputs (n, 784), without dropout."""
    seed, batches = partial(tf.random.fold_in, [flags.seed, EVALUATION]), in_batches(1_000, x, x_corrupted)
    terms = [network.elbo_terms(*images, seed=seed(i)) for i, images in enumerate(batches)]
    return np.concatenate(terms, axis=1).mean(axis=1)


def elbo(part, terms):
    """Returns the ELBO and its terms, nats per image, by name."""
    error, kl = map(float, terms)
    return {f"{part}_elbo": -(error + kl), f"{part}_reconstruction": error, f"{part}_kl": kl}


def train(strategy, state, digits, flags, folder):
    """Trains until all epochs are done; after each, the chief writes checkpoint and log into the folder."""
    train_epoch = compile_training(strategy, state, digits, flags)
    n_weights = sum(math.prod(variable.shape) for variable in state.network.trainable_variables)
    gpus = tf.config.list_logical_devices("GPU")
    device = f"GPUs: {len(gpus)}" if gpus else f"CPU, {os.cpu_count()} threads"
    if not gpus and Path("/dev/nvidia0").exists():
        device += ' (for the GPU: pip install "tensorflow[and-cuda]")'
    say(f"{device}; {n_weights:,} weights; {flags.num_epochs} epochs of {flags.optimizer}")
    for epoch in range(len(state.history) + 1, flags.num_epochs + 1):
        start, learn_rate = time.perf_counter(), float(state.optimizer.learning_rate)
        row = {"epoch": epoch, **elbo("train", train_epoch(epoch))}
        seconds = round(time.perf_counter() - start, 3)
        row |= elbo("valid", evaluate(state.network, *digits.valid, flags))
        row |= {"learn_rate": learn_rate, "seconds": seconds}
        if not all(map(math.isfinite, row.values())):
            raise UserError(f"the loss is NaN in epoch {epoch}: lower --learn_rate, or raise --keep_prob")
        state.history.append(row)
        if folder:
            if flags.animate:
                frame = plot_utils.frame(state, digits, flags)
                state.frames = [*(old for old in state.frames if old.shape == frame.shape), frame]
            save_checkpoint(state, folder)
        text = "{train_elbo:.2f} = -({train_reconstruction:.2f} + {train_kl:.2f})  valid {valid_elbo:.2f}"
        say(f"epoch {epoch}/{flags.num_epochs}  train {text.format(**row)}  {seconds:.1f} s")


def log_px(network, x, x_corrupted, flags):
    """Returns log p(x), (n,), in nats, of targets and inputs (n, 784), with --n_importance samples each."""
    seed, batches = partial(tf.random.fold_in, [flags.seed, EVALUATION]), in_batches(20, x, x_corrupted)
    say(f"estimating log p(x) of {len(x):,} digits with {flags.n_importance:,} importance samples each")
    estimate = partial(network.log_marginal_likelihood, n_importance=flags.n_importance)
    estimate = tf.function(estimate, jit_compile=True, autograph=False)
    return np.concatenate([estimate(*images, seed=seed(i)) for i, images in enumerate(batches)])


def measure(network, digits, latent, flags):
    """Returns what is measured on the test digits, by name. latent: their mean and log_var, (n, dim_z)."""
    x, x_corrupted = digits.test
    metrics = elbo("test", evaluate(network, x, x_corrupted, flags))
    restored = [network.reconstruct(images) for (images,) in in_batches(1_000, x_corrupted)]
    pictures = {"noisy": x_corrupted, "restored": np.concatenate(restored)}
    for name in pictures if flags.add_noise else ["restored"]:
        metrics[f"psnr_{name}"] = -10 * math.log10(np.mean((pictures[name] - x) ** 2))
    metrics |= network.test_metrics(x_corrupted, digits.test_labels)
    if flags.n_importance:
        metrics["test_log_px"] = float(np.mean(log_px(network, x, x_corrupted, flags), dtype=np.float64))
        metrics |= {"n_importance": flags.n_importance, "active_units": int(vae.active_units(latent[0]))}
        if flags.dim_z == 2 and network.log_marginal_likelihood_grid:
            log_pxs = network.log_marginal_likelihood_grid(x, *latent)
            metrics["test_log_px_grid"] = float(np.mean(log_pxs, dtype=np.float64))
    return metrics


def generate(network, flags, folder):
    """Writes new images (n, 28, 28) uint8 and their z (n, dim_z), draws from the prior."""
    images = np.empty((flags.n_generate, 784), np.uint8)
    z = np.empty((flags.n_generate, flags.dim_z), np.float32)
    for i, (images_i, z_i) in enumerate(in_batches(10_000, images, z)):
        seed = tf.random.fold_in([flags.seed, GENERATION], i)
        z_i[:], logits = network.draw(len(z_i), seed)
        draw = partial(network.likelihood.sample, seed=tf.random.fold_in(seed, 1))
        images_i[:] = plot_utils.grey_levels((draw if flags.binarize else network.likelihood.mean)(logits))
    with whole_file(folder / "generated.npz") as part:
        np.savez(part, images=images.reshape(-1, 28, 28), z=z)


def reconstruct(network, x, flags, folder):
    """Writes what the network makes of one's own digits x: (n, 784): pictures, latent means, ELBO."""
    images = network.reconstruct(x).numpy()
    found = {"images": plot_utils.grey_levels(images).reshape(-1, 28, 28), "z": network.encode(x)}
    found["elbo"] = -sum(network.elbo_terms(x, x, seed=[flags.seed, EVALUATION]))
    if flags.n_importance:
        found["log_px"] = log_px(network, x, x, flags)
    with whole_file(folder / "reconstructed.npz") as part:
        np.savez(part, **found)
    write_whole(folder / "reconstructed.png", plot_utils.pairs(x, images, flags.PRR_resize_factor))


def write_results(state, digits, flags, folder):
    """Writes the network, what it makes of the test digits, and how it was trained."""
    write_log(folder, state.history)
    pictures = plot_utils.draw(state, digits, flags)
    for name in plot_utils.PICTURES.keys() - pictures.keys():  # of an earlier state
        (folder / name).unlink(missing_ok=True)
    for name, content in pictures.items():
        write_whole(folder / name, content)
    latent = [state.network.encoder(images) for (images,) in in_batches(1_000, digits.test[1])]
    mean, log_var = np.concatenate(latent, axis=1)
    with whole_file(folder / "latent.npz") as part:
        np.savez(part, mean=mean, log_var=log_var, label=digits.test_labels)
    metrics = measure(state.network, digits, (mean, log_var), flags)
    say("\n".join(f"{name:20}{value:12,.5g}" for name, value in metrics.items()))
    old = read_json(folder / "metrics.json")  # kept if they are of the same weights
    metrics = (old if old.get("test_elbo") == metrics["test_elbo"] else {}) | metrics
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    if not flags.load:
        with whole_file(folder / "vae.keras") as part:
            state.network.save(part)


def run(flags):
    """Does what the flags ask for: digits, network, training, numbers and pictures."""
    own_images = mnist_data.read_digits(flags.reconstruct) if flags.reconstruct else None
    # With --load, new images and one's own digits need no data.
    without_data = flags.load and (flags.reconstruct or (flags.n_generate and not flags.n_importance))
    data = None if without_data else load_data(flags)
    say("loading TensorFlow")
    load_tensorflow(flags)
    with make_strategy(flags) as strategy:
        digits = make_digits(data, flags) if data else None
        with strategy.scope():
            state = build(digits, flags)
        if flags.load or flags.resume:
            load_checkpoint(state, flags.load or flags.results_path)
        own = [value for name, value in vars(flags).items() if WHOSE[name] == OWN or name == "resume"]
        check_agreement(strategy, "flags, data or checkpoints", f"{own, data and data.sha256, state.history}")
        folder = begin_run(flags, data) if is_chief(flags) else None
        if not flags.load:
            train(strategy, state, digits, flags, folder)
        if not folder:
            return
        if data:
            write_results(state, digits, flags, folder)
        if flags.n_generate:
            generate(state.network, flags, folder)
        if flags.reconstruct:
            reconstruct(state.network, own_images, flags, folder)
        say(f"all results are in {folder}")


def main(arguments=None):
    """Runs the program; returns its exit status."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")  # names that it cannot encode
    try:
        flags = parse_flags(arguments)
        with contextlib.redirect_stdout(sys.stdout if is_chief(flags) else None):  # print to None is silent
            run(flags)
    except KeyboardInterrupt:
        say("interrupted: a run with a finished epoch goes on with --resume")
        return 130
    except (UserError, OSError, MemoryError, ImportError) as error:
        print(f"run_main.py: error: {reason(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # a notebook exports its own, which another Python may lack
    sys.exit(main())
