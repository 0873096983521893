"""Trains a variational autoencoder on MNIST.

`run` gives an overview. After it come training by stochastic gradient descent on the negative ELBO,
evaluation, the flags, the folder of a run, its file for TensorBoard, devices, comparing and exploring
finished runs, and the process.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import enum
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    packages = ["numpy", "scipy", "matplotlib", "tensorflow", "keras"]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        command = f"pip install -r {Path(__file__).with_name('requirements.txt')}"
        print(f"run_main.py: error: install {', '.join(missing)}: {command}", file=sys.stderr)
        sys.exit(2)

import numpy as np

import mnist_data
from mnist_data import UserError, atomic_write, error_message, natural_order, progress, write_atomically

if TYPE_CHECKING:  # these take seconds: import_tensorflow imports them, after the flags have been checked
    import keras
    import tensorflow as tf

    import plot_utils
    import vae

GENERATION_EPOCH = -1  # a pseudo-epoch, for seeds; training's start at 1

# While training, the pictures that show progress are drawn after this time, and again whenever drawing has
# taken less than this share of the training time so far.
SECONDS_BEFORE_DRAWING = 10
MAX_DRAWING_SHARE = 0.03

log = functools.partial(print, flush=True)


# --- The program --------------------------------------------------------------------------------------


@dataclass
class Digits:
    """The digits as the network gets them."""

    train_images: np.ndarray  # (n, n_pixels) uint8; noise and binarization are resampled at every step
    train_labels: np.ndarray  # (n,) int32, -1 where a label is hidden
    # If some labels are hidden: the labelled digits, some of which are added to each mini-batch. Else empty.
    labelled_images: np.ndarray  # (n_labelled, n_pixels) uint8
    labelled_labels: np.ndarray  # (n_labelled,) int32
    valid: "vae.Batch"  # noise and binarization drawn once
    test: "vae.Batch"


@dataclass
class TrainingState:
    """Everything that changes during training."""

    network: "vae.VAE"  # with its optimizer
    history: list[dict] = field(default_factory=list)  # the rows of log.csv
    frames: list[np.ndarray] = field(default_factory=list)  # of manifold.gif, (height, width) uint8
    drawing_seconds: float = 0.0  # spent on pictures while training
    events: "tf.summary.SummaryWriter | None" = None  # of the event file for TensorBoard


def run(flags, load_tensorflow):
    """The whole program: digits, network, training, measurements, pictures.

    load_tensorflow(flags) imports TensorFlow, once the data are there.
    """
    user_digits = mnist_data.read_digits(flags.reconstruct) if flags.reconstruct else None
    data = load_data(flags) if needs_data(flags) else None
    log("loading TensorFlow")
    load_tensorflow(flags)
    with distribution_strategy(flags) as strategy:
        digits = prepare_digits(data, flags) if data else None
        with strategy.scope():
            state = TrainingState(build_network(digits, flags))
        if flags.load or flags.resume:
            restore_state(state, flags.reused_run)
        check_workers_agree(strategy, flags, data, state)
        folder = claim_folder(flags, data, state) if is_chief(flags) else None
        if not flags.load:
            for row in train(state, digits, flags, strategy):
                if folder:
                    save_epoch(state, digits, flags, folder)
                log(epoch_line(row, flags))
        if folder:
            write_outputs(state, digits, user_digits, flags, folder)


def write_outputs(state, digits, user_digits, flags, folder):
    """Evaluates the network, draws the pictures, and does whatever else the flags ask for."""
    if digits:
        save_results(state, digits, flags, folder)
    if flags.n_generate:
        generate(state.network, flags, folder)
    if flags.reconstruct:
        reconstruct(state.network, user_digits, flags, folder)
    log(f"all results are in {folder}")


def load(run_folder):
    """Returns the network of a run and its Digits, for a notebook."""
    flags = parse_flags(["--load", run_folder])
    data = load_data(flags)
    import_tensorflow()
    digits = prepare_digits(data, flags)
    state = TrainingState(build_network(digits, flags))
    restore_state(state, flags.load)
    return state.network, digits


# --- Training by stochastic gradient descent ----------------------------------------------------------

# The recipe: 20 epochs of SGD give a test ELBO of -137.8 at dim_z 2, -97.5 at 20 (medians of three seeds).
MOMENTUM = 0.98  # Nesterov's
# Gains half a nat in 60 epochs, because the network fits the training digits less closely. On weight matrices
# only; on all variables, 20 epochs end at -138.1 and -97.5.
WEIGHT_DECAY = 0.003
# In the first epochs, gradient norms range from 1 (biases) to 50 (the encoder's output layer), so each is
# clipped separately: global-norm clipping at 1 or 3 gives an ELBO of -145.7 or -142.1.
CLIP_NORM = 1.0
DROPOUT_ANNEALING = 0.5  # fraction of the run during which dropout is annealed to zero

# If labels are hidden, this share of --batch_size is added to each mini-batch as labelled digits. If 100 of
# 55,000 are labelled, only one mini-batch of 128 in five would otherwise contain one.
LABELLED_SHARE = 0.25
N_LABELLED_COPIES = 8_000  # of the labelled digits in all, with --augment; but at least four of each

STEPS_PER_CALL = 50  # after which the shown progress is updated; the results do not depend on it


def make_sgd(learning_rate):
    """Returns SGD with Nesterov momentum, weight decay and clipped gradients."""
    return vae.ClippedSGD(
        learning_rate, CLIP_NORM, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )


def make_adam(learning_rate):
    """Returns Adam with Keras' other defaults."""
    return keras.optimizers.Adam(learning_rate)


@dataclass
class Optimizer:
    """A row of --optimizer."""

    make: Callable  # from a learning rate, or its schedule, to a Keras optimizer
    learn_rate: float  # the default of --learn_rate


OPTIMIZERS = {"sgd": Optimizer(make_sgd, 0.02), "adam": Optimizer(make_adam, 0.002)}


def make_optimizer(network, n_steps, flags):
    """Returns the optimizer. Its learning rate decays from --learn_rate to 0 in n_steps along a half cosine.

    Loshchilov and Hutter, arXiv:1608.03983, without restarts.
    """
    schedule = keras.optimizers.schedules.CosineDecay(flags.learn_rate, n_steps)
    optimizer = OPTIMIZERS[flags.optimizer].make(schedule)
    not_decayed = [variable for variable in network.trainable_variables if variable.name != "kernel"]
    optimizer.exclude_from_weight_decay(var_list=not_decayed)
    optimizer.build(network.trainable_variables)
    return optimizer


def dropout_keep_prob(epochs, flags):
    """The keep probability after a number of epochs: annealed dropout (Rennie, Goel and Thomas 2014).

    It rises linearly from --keep_prob to 1, because late in training the noise of dropout only hurts.
    """
    if flags.keep_prob == 1:
        return 1.0
    fraction = tf.minimum(1.0, epochs / (DROPOUT_ANNEALING * flags.num_epochs))
    return flags.keep_prob + (1 - flags.keep_prob) * fraction


def kl_weight(epochs, flags):
    """The weight of the KL divergence after a number of epochs: it rises linearly over --warm_up epochs."""
    if flags.warm_up == 0:
        return flags.kl_weight
    return flags.kl_weight * tf.minimum(1.0, epochs / flags.warm_up)


def make_batch(images, labels, flags, seed):
    """Returns the vae.Batch of images (batch, n_pixels) uint8, binarized and corrupted as asked for."""
    targets = tf.cast(images, tf.float32) / 255
    if flags.binarize:
        targets = vae.binarize(targets, seed)
    inputs = targets
    if flags.add_noise:
        inputs = vae.salt_and_pepper(targets, flags.noise_level, seed)
    return vae.Batch(targets, inputs, tf.cast(labels, tf.int32))


def sgd_step(network, images, labels, seed, n_steps, flags):
    """One of the n_steps steps of an epoch: SGD on the negative ELBO of a mini-batch.

    images: (batch, n_pixels) uint8. labels: (batch,). The number of steps taken so far determines the keep
    probability and the KL weight.
    """
    batch = make_batch(images, labels, flags, seed)
    epochs = tf.cast(network.optimizer.iterations, tf.float32) / n_steps
    network.train_step(batch, seed, dropout_keep_prob(epochs, flags), kl_weight(epochs, flags))


def mini_batches(n_digits, n_labelled, epoch, flags):
    """Returns the digits of each mini-batch of an epoch, as indices: (n_steps, size of a mini-batch).

    An epoch goes through the n_digits once, in random order, except for a last, incomplete mini-batch. If
    labels are hidden, each mini-batch also gets labelled digits, drawn with replacement: their indices are
    n_digits to n_digits + n_labelled - 1.
    """
    n_steps = n_digits // flags.batch_size
    order = tf.random.experimental.stateless_shuffle(tf.range(n_digits), [flags.seed, epoch])
    batches = tf.reshape(order[: n_steps * flags.batch_size], (n_steps, flags.batch_size))
    if n_labelled == 0:
        return batches
    shape = (n_steps, labelled_batch_size(flags))
    seed = training_seed(flags, epoch, n_steps)  # no step has this number
    drawn = tf.random.stateless_uniform(shape, seed, maxval=n_labelled, dtype=tf.int32)
    return tf.concat([batches, n_digits + drawn], axis=1)


def labelled_batch_size(flags):
    """Returns how many labelled digits are added to each mini-batch: none unless labels are hidden."""
    return math.ceil(LABELLED_SHARE * flags.batch_size) if flags.n_labels else 0


def training_seed(flags, epoch, step):
    """Returns the seed of a step."""
    return vae.fold_in(tf.stack([flags.seed, epoch]), step)


def compile_steps(network, flags):
    """Returns a function that trains for some steps of an epoch.

    XLA compiles the whole loop or, with convolutions, a single step.
    """

    def train_step(images, labels, indices, seed, n_steps):
        sgd_step(network, tf.gather(images, indices), tf.gather(labels, indices), seed, n_steps, flags)

    if has_convolutions(network):
        train_step = compiled(train_step, jit_compile=True)

    def train_steps(images, labels, batches, epoch, first, last):
        """Steps first to last - 1. batches: what `mini_batches` returns."""
        step = first
        while step < last:  # a loop over tf.range(first, last) would be compiled again for each pair
            # Not in train_step, which XLA would compile again for each step.
            indices = batches[step]
            train_step(images, labels, indices, training_seed(flags, epoch, step), len(batches))
            step += 1

    return compiled(train_steps, jit_compile=not has_convolutions(network))


def has_convolutions(network):
    """Returns whether a kernel has more than two axes, so that loops must not be compiled by XLA.

    On a CPU, XLA runs a convolution inside a loop on one core, which takes 25 times as long. Dense layers
    take 9% longer in a loop outside of XLA. The results are the same, bit for bit.
    """
    return any(len(variable.shape) > 2 for variable in network.trainable_variables)


def train(state, digits, flags, strategy):
    """Trains until all epochs are done. After each, adds a row to the history and yields it."""
    network = state.network
    if flags.distribute == "none":
        train_steps = compile_steps(network, flags)
    else:
        train_steps = compile_distributed_steps(network, flags, strategy)
    images = tf.constant(np.concatenate([digits.train_images, digits.labelled_images]))
    labels = tf.constant(np.concatenate([digits.train_labels, digits.labelled_labels]))
    n_weights = sum(math.prod(variable.shape) for variable in network.trainable_variables)
    log(f"{device_name(strategy)}; {n_weights:,} weights; {flags.num_epochs} epochs of {flags.optimizer}")

    def running_elbo():
        return f"train {-network.get_metrics_result()['negative_elbo']:.2f}"

    # Reading a metric needs an exchange between all workers, but possibly only the chief has a terminal.
    status = None if flags.distribute == "multi_worker" else running_elbo
    for epoch in range(len(state.history) + 1, flags.num_epochs + 1):
        start = time.perf_counter()
        learn_rate = float(network.optimizer.learning_rate)
        batches = mini_batches(len(digits.train_labels), len(digits.labelled_labels), epoch, flags)
        n_steps = len(batches)
        network.reset_metrics()
        for first in progress(range(0, n_steps, STEPS_PER_CALL), f"epoch {epoch}", status):
            last = min(first + STEPS_PER_CALL, n_steps)
            train_steps(images, labels, batches, tf.constant(epoch), tf.constant(first), tf.constant(last))
        row = {"epoch": epoch} | log_columns("train", network.get_metrics_result())
        seconds = round(time.perf_counter() - start, 3)
        row |= log_columns("valid", evaluate(network, digits.valid))
        row |= {"learn_rate": learn_rate, "seconds": seconds}
        if not all(math.isfinite(value) for value in row.values()):
            raise UserError(f"the loss is NaN in epoch {epoch}: lower --learn_rate, or raise --keep_prob")
        state.history.append(row)
        yield row


def log_columns(part, means):
    """Returns the ELBO, its terms and other means, by their names as columns of log.csv or metrics.json."""
    reconstruction = float(means["reconstruction"])
    kl = float(means["kl"])
    elbo = -(reconstruction + kl)
    columns = {f"{part}_elbo": elbo, f"{part}_reconstruction": reconstruction, f"{part}_kl": kl}
    for name in means:
        if name not in ("negative_elbo", "reconstruction", "kl"):
            columns[f"{part}_{name}"] = float(means[name])
    return columns


def epoch_line(row, flags):
    """Returns what is printed after an epoch."""
    terms = f"-({row['train_reconstruction']:.2f} + {row['train_kl']:.2f})"
    elbos = f"train {row['train_elbo']:.2f} = {terms}  valid {row['valid_elbo']:.2f}"
    return f"epoch {row['epoch']}/{flags.num_epochs}  {elbos}  {row['seconds']:.1f} s"


def prepare_digits(data, flags):
    """Returns the Digits of a mnist_data.DataSet."""
    images = data.train_images
    labels = mnist_data.keep_n_labels(data.train_labels, flags.n_labels, flags.seed)
    if flags.n_labels is None:
        is_added = np.zeros(len(labels), bool)
    else:
        is_added = labels >= 0  # the digits from which some are added to each mini-batch
        if is_added.all():
            raise UserError(
                f"--n_labels {flags.n_labels} hides no label: lower it or, to use all labels, omit it"
            )
    labelled_images = images[is_added]
    labelled_labels = labels[is_added]
    if flags.augment and not flags.load:
        images, labels = augment(images, labels, flags.seed)
        if len(labelled_labels):
            n_copies = max(4, N_LABELLED_COPIES // len(labelled_labels))
            labelled_images, labelled_labels = augment(
                labelled_images, labelled_labels, [flags.seed, 1], n_copies=n_copies
            )
    valid = make_batch(data.valid_images, data.valid_labels, flags, evaluation_seed(0))
    test = make_batch(data.test_images, data.test_labels, flags, evaluation_seed(1))
    return Digits(images, labels, labelled_images, labelled_labels, as_numpy(valid), as_numpy(test))


def augment(images, labels, seed, **options):
    """Returns images and their augmented copies, and the labels of all; options: of mnist_data.augment."""
    images = mnist_data.augment(images, seed, **options)
    return images, np.tile(labels, len(images) // len(labels))


def as_numpy(batch):
    """Returns a vae.Batch of NumPy arrays."""
    return vae.Batch(*[np.asarray(array) for array in batch])


def build_network(digits, flags):
    """Returns the network, compiled with its optimizer unless --load is given.

    UserError if an edited network cannot be trained, or cannot model binary pixels as --binarize needs.
    """
    model = MODELS[flags.model]
    options = {"dim_z": flags.dim_z, "n_hidden": flags.n_hidden, "seed": flags.seed}
    options |= {name: getattr(flags, name) for name in model.options}
    if digits:
        options["n_pixels"] = digits.train_images.shape[1]
        options["mean_image"] = digits.train_images.mean(axis=0) / 255
    else:
        options["n_pixels"] = read_json(flags.load / "config.json")["n_pixels"]
    network = getattr(vae, model.class_name)(**options)
    if flags.binarize and not network.likelihood.is_binary:
        raise UserError(
            f"--binarize: {type(network.likelihood).__name__} is not a distribution of binary pixels"
        )
    if not flags.load:
        if flags.distribute == "none":  # replicas have variables of their own
            check_variables(network, digits)
        n_steps = flags.num_epochs * (len(digits.train_images) // flags.batch_size)
        network.compile(optimizer=make_optimizer(network, n_steps, flags))
    return network


def check_variables(network, digits):
    """Raises UserError for a variable that training would silently miss, as after an edit."""
    batch = next(split(digits.valid, 4))  # four digits suffice
    with tf.GradientTape() as tape:
        loss, _, _ = network.training_loss(batch, seed=(0, 0), keep_prob=None, kl_weight=1.0)
    own = {id(variable.value) for variable in network.variables}
    for variable in tape.watched_variables():
        if id(variable) not in own:
            raise UserError(
                f"{variable.name} is not a weight of the network: make it with a layer's add_weight"
            )
    gradients = tape.gradient(loss, network.trainable_variables)
    for variable, gradient in zip(network.trainable_variables, gradients, strict=True):
        if gradient is None:
            raise UserError(f"{variable.path} has no gradient: no part of the loss depends on it")


# --- Evaluation ---------------------------------------------------------------------------------------


def evaluation_seed(i):
    """Returns the i-th seed for validation and test digits: the same for every --seed.

    So runs that differ only in --seed differ only in their training.
    """
    return vae.fold_in([0, 0], i)


def split(batch, size):
    """Yields a batch in parts of at most `size` images."""
    for start in range(0, len(batch.targets), size):
        targets, inputs, labels = batch
        rows = slice(start, start + size)
        yield vae.Batch(targets[rows], inputs[rows], None if labels is None else labels[rows])


def evaluate_images(network, batch):
    """Returns the terms of -ELBO for each image, without dropout: {"reconstruction": (n,), "kl": (n,)}."""
    parts = []
    for i, part in enumerate(split(batch, 1_000)):
        _, reconstruction, kl = network.negative_elbo(part, seed=evaluation_seed(i))
        parts.append((reconstruction, kl))
    reconstruction, kl = np.concatenate(parts, axis=1)
    return {"reconstruction": reconstruction, "kl": kl}


def evaluate(network, batch):
    """Returns the means of both terms over a batch of any size."""
    return {name: term.mean() for name, term in evaluate_images(network, batch).items()}


def latent_moments(network, batch):
    """Returns mean and log variance of q(z|x) for each image: (n, dim_z) each."""
    parts = [
        network.posterior.moments(network.encoder(part.inputs, part.labels)) for part in split(batch, 1_000)
    ]
    return np.concatenate(parts, axis=1)


def importance_sampling(network, batch, flags):
    """Returns "log_px" in nats and "effective_sample_size" of --n_importance samples of z, (n,) each."""
    n_images = len(batch.targets)
    log(f"estimating log p(x) of {n_images:,} digits with {flags.n_importance:,} importance samples each")

    def sample_part(part, seed):
        return network.importance_sampling(part, flags.n_importance, seed=seed)

    estimate = compiled(sample_part, jit_compile=not has_convolutions(network), autograph=False)
    estimates = []
    for i, part in enumerate(progress(list(split(batch, 20)), "log p(x)")):
        estimates.append(estimate(part, evaluation_seed(i)))
    log_px, effective_sample_size = np.concatenate(estimates, axis=1)
    return {"log_px": log_px, "effective_sample_size": effective_sample_size}


def evaluate_digits(network, test, flags):
    """Returns what is measured of each test digit, {name: (n, ...)}: the arrays of latent.npz."""
    mean, log_var = latent_moments(network, test)
    terms = evaluate_images(network, test)
    elbo = -(terms["reconstruction"] + terms["kl"])
    arrays = {"mean": mean, "log_var": log_var, "label": test.labels, "elbo": elbo} | terms
    kl_per_unit = network.kl_per_unit((mean, log_var))
    if kl_per_unit is not None:
        arrays["kl_per_unit"] = kl_per_unit.numpy()
    if flags.n_importance:
        arrays |= importance_sampling(network, test, flags)
    return arrays


def standard_error(values):
    """Returns the standard error of the mean of values, (n,)."""
    return float(np.std(values, dtype=np.float64) / math.sqrt(len(values)))


def psnr(images, targets):
    """Returns the peak signal-to-noise ratio in decibels, from the mean squared error over all images."""
    return -10 * math.log10(np.mean((images - targets) ** 2))


def evaluate_test_set(network, test, arrays, flags):
    """Returns the content of metrics.json. arrays: what evaluate_digits returns."""
    terms = {"reconstruction": arrays["reconstruction"].mean(), "kl": arrays["kl"].mean()}
    metrics = log_columns("test", terms)
    metrics["test_elbo_standard_error"] = standard_error(arrays["elbo"])
    decoded = np.concatenate([network.reconstruct(part.inputs, part.labels) for part in split(test, 1_000)])
    if flags.add_noise:
        metrics["psnr_noisy"] = psnr(test.inputs, test.targets)
        metrics["psnr_restored"] = psnr(decoded, test.targets)
    else:
        metrics["psnr_reconstruction"] = psnr(decoded, test.targets)
    metrics |= network.test_metrics(test)
    if flags.n_importance:
        metrics["test_log_px"] = float(np.mean(arrays["log_px"], dtype=np.float64))
        metrics["test_log_px_standard_error"] = standard_error(arrays["log_px"])
        metrics["n_importance"] = flags.n_importance
        metrics["effective_sample_size"] = float(np.median(arrays["effective_sample_size"]))
        metrics["active_units"] = int(vae.active_units(arrays["mean"]))
        if flags.dim_z == 2 and network.has_log_joint:
            grid_progress = functools.partial(progress, what="log p(x) by quadrature")
            log_px_grid = network.log_marginal_likelihood_grid(
                test.targets, arrays["mean"], arrays["log_var"], grid_progress
            )
            metrics["test_log_px_grid"] = float(np.mean(log_px_grid))
    return metrics


def generate(network, flags, folder):
    """Writes generated.npz: new images (n, side, side) uint8 and their z (n, dim_z), drawn from the prior.

    For a network with classes, also the images' label, (n,): --digit, or 0 to 9 in turn.
    """
    label = np.arange(flags.n_generate, dtype=np.int32) % vae.N_CLASSES
    if flags.digit is not None:
        label[:] = flags.digit
    images = np.empty((flags.n_generate, network.n_pixels), np.uint8)
    z = np.empty((flags.n_generate, flags.dim_z), np.float32)
    for i, start in enumerate(progress(range(0, flags.n_generate, 10_000), "new digits")):
        rows = slice(start, min(start + 10_000, flags.n_generate))
        seed = vae.fold_in([flags.seed, GENERATION_EPOCH], i)
        z[rows], logits = network.sample_with_latents(rows.stop - rows.start, seed, label[rows])
        drawn = network.likelihood.sample(logits, seed) if flags.binarize else network.likelihood.mean(logits)
        images[rows] = plot_utils.grey_levels(drawn)
    side = math.isqrt(network.n_pixels)
    arrays = {"images": images.reshape(-1, side, side), "z": z}
    if network.has_classes:
        arrays["label"] = label
    with atomic_write(folder / "generated.npz") as part:
        np.savez(part, **arrays)


def check_classifier(network, flag):
    """Raises UserError if the network needs a class for the user's digits and cannot find it."""
    if network.has_classes and network.classify(network.mean_image[None]) is None:
        raise UserError(f"--{flag}: the network needs the class of a digit: override `classify` to find it")


def reconstruct(network, user_digits, flags, folder):
    """Writes reconstructions, latent means, ELBO, predicted labels and file names of the user's digits.

    user_digits: what mnist_data.read_digits returns.
    """
    x, file_names = user_digits
    if x.shape[1] != network.n_pixels:
        raise UserError(f"--reconstruct: the digits have {x.shape[1]} pixels, the network {network.n_pixels}")
    check_classifier(network, "reconstruct")
    batch = vae.Batch(x, x)
    parts = list(split(batch, 1_000))
    images = []
    for part in progress(parts, "reconstructing your digits"):
        images.append(plot_utils.grey_levels(network.reconstruct(part.inputs)))
    side = math.isqrt(network.n_pixels)
    terms = evaluate_images(network, batch)
    arrays = {
        "images": np.concatenate(images).reshape(-1, side, side),
        "file": file_names,
        "z": np.concatenate([network.encode(part.inputs) for part in parts]),
        "elbo": -(terms["reconstruction"] + terms["kl"]),
    }
    predicted = [network.classify(part.inputs) for part in parts]
    if predicted[0] is not None:
        arrays["label"] = np.concatenate(predicted)
    if flags.n_importance:
        arrays |= importance_sampling(network, batch, flags)
    with atomic_write(folder / "reconstructed.npz") as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():  # np.savez cannot save an array named "file"
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array))
    restored = network.reconstruct(x[:100]).numpy()
    picture = plot_utils.reconstruction_pairs(x[:100], restored, flags.PRR_resize_factor)
    write_atomically(folder / "reconstructed.png", picture)


# --- Flags --------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A row of --model."""

    class_name: str  # in vae.py
    options: dict = field(default_factory=dict)  # the flags that its constructor takes, and their defaults
    other_flags: tuple[str, ...] = ()  # further flags that do not apply to every model


MODELS = {
    "vae": Model("VAE"),
    "iwae": Model("IWAE", options={"n_samples": 5}),
    "least_squares": Model("LeastSquares"),
    "stick_breaking": Model("StickBreaking"),
    "ladder": Model("Ladder", options={"dim_z_lower": 64, "n_samples": 1}),
    "stein": Model("Stein", options={"n_samples": 20}),
    "labels": Model("Labels", other_flags=("n_labels",)),
    "conditional": Model("Conditional", options={"n_labels": None}, other_flags=("digit",)),
    "convolutional": Model("Convolutional"),
}


class Reuse(enum.Enum):
    """What --resume and --load do with the value that a run has recorded."""

    FIXED = enum.auto()  # both use it; another value is refused
    RESUMABLE = enum.auto()  # both use it; only --resume may change it
    RELOADABLE = enum.auto()  # both use it; only --load with another --results_path may change it
    DEFAULT = enum.auto()  # both use it unless the flag is given
    RESUME_DEFAULT = enum.auto()  # --resume uses it unless the flag is given; --load ignores it
    PER_COMMAND = enum.auto()  # both ignore it


def in_range(kind, description, low, high):
    """Returns an argparse type: a number from low to high."""

    def parse(text):
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if low <= number <= high:  # false for NaN
            return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a {description} from {low} to {high}")

    return parse


def integer(low, high=2**31 - 1):
    """Returns an argparse type: a whole number from low to high."""
    return in_range(int, "whole number", low, high)


def real(low, high):
    """Returns an argparse type: a number from low to high."""
    return in_range(float, "number", low, high)


def one_of(*names):
    """Returns an argparse type: one of the names."""

    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return parse


def boolean(text):
    """An argparse type: True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def local_path(text):
    """An argparse type: a path on this machine."""
    if "://" in text or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path on this machine")
    return Path(text).expanduser()


def defaults_of(option):
    """Returns the models that have an option, with its default in each."""
    return ", ".join(f"{name}: {m.options[option]}" for name, m in MODELS.items() if option in m.options)


def flag(default, parse, help_text, reuse=Reuse.FIXED, group=None, nargs=None):
    """Returns a row of Flags. group: the title of the group in --help that begins with it."""
    return field(
        default=default,
        metadata={"parse": parse, "help": help_text, "reuse": reuse, "group": group, "nargs": nargs},
    )


LEARN_RATES = ", ".join(f"{name}: {optimizer.learn_rate}" for name, optimizer in OPTIMIZERS.items())
LEARN_RATE_HELP = f"initial learning rate, which decays to 0 ({LEARN_RATES})"
STRATEGIES = ("none", "mirrored", "multi_worker")
DATA_DIR_HELP = "data folder; MNIST is downloaded if files are missing"
DISTRIBUTE_HELP = "mirrored: train on all GPUs of this machine; multi_worker: on several machines"
PRR_GROUP = "PRR: plot reproduction result"
PMLR_GROUP = "PMLR: plot manifold learning result"
PMLR_HELP = (
    "plot the decoded latent plane (default: if --dim_z is 2); False skips all plots of the latent space"
)
RUN_GROUP = "run, and what to do with it afterwards"
RESULTS_HELP = "output folder; must be new or empty (default: the next results/runN)"
OVERWRITE_HELP = (
    "remove the run in --results_path first; in the folder of --load, replace earlier output only"
)
EPOCH_PLOTS_HELP = "save the reconstructions and the manifold of every epoch in epochs/"
N_SAMPLES_HELP = f"samples of z per digit ({defaults_of('n_samples')})"
N_LABELS_HELP = "labelled digits per class, for labels and conditional (default: all)"
N_GENERATE_HELP = "new images to write to generated.npz"
DIGIT_HELP = "the class of the new images, for conditional (default: all in turn)"
COMPARE_HELP = "folders of runs: print a table; write comparison.png to --results_path or results/compareN"


@dataclass
class Flags:
    """Each flag: its default, the values it accepts, its help, and what --resume and --load do with it."""

    model: str = flag("vae", one_of(*MODELS), f"the lecture's or another: {', '.join(MODELS)}", group="model")
    dim_z: int = flag(2, integer(1, 10_000), "length of a latent vector")
    n_hidden: int = flag(500, integer(1, 100_000), "units per hidden layer")
    keep_prob: float = flag(0.9, real(0.001, 1), "dropout keep probability at the start; 1 means no dropout")

    kl_weight: float = flag(1.0, real(0, 1_000), "weight of the KL divergence in training", group="training")
    warm_up: int = flag(0, integer(0), "epochs over which that weight rises from 0")
    n_samples: int = flag(None, integer(1, 1_000), N_SAMPLES_HELP, Reuse.RESUMABLE)
    dim_z_lower: int = flag(None, integer(1, 10_000), f"length of the lower z ({defaults_of('dim_z_lower')})")
    n_labels: int = flag(None, integer(1), N_LABELS_HELP)
    optimizer: str = flag("sgd", one_of(*OPTIMIZERS), "sgd, with momentum and clipped gradients, or adam")
    learn_rate: float = flag(None, real(1e-12, 1e6), LEARN_RATE_HELP, Reuse.RESUMABLE)
    num_epochs: int = flag(20, integer(1), "passes through the training digits", Reuse.RESUMABLE)
    batch_size: int = flag(128, integer(1, mnist_data.N_TRAIN), "mini-batch size")
    seed: int = flag(0, integer(0), "random seed for training and for new digits", Reuse.RELOADABLE)
    distribute: str = flag("none", one_of(*STRATEGIES), DISTRIBUTE_HELP, Reuse.RESUME_DEFAULT)

    data_dir: Path = flag(Path("data"), local_path, DATA_DIR_HELP, Reuse.DEFAULT, "data")
    add_noise: bool = flag(False, boolean, "learn to restore digits from salt-and-pepper noise")
    noise_level: float = flag(0.5, real(0.001, 1), "probability that a pixel is replaced by black or white")
    augment: bool = flag(False, boolean, "also learn from 4 rotated and shifted copies of each digit")
    binarize: bool = flag(False, boolean, "make each pixel white with its grey level as the probability")

    PRR: bool = flag(True, boolean, "plot test digits and reconstructions", Reuse.DEFAULT, PRR_GROUP)
    PRR_n_img_x: int = flag(10, integer(1, 50), "digits from left to right", Reuse.DEFAULT)
    PRR_n_img_y: int = flag(10, integer(1, 50), "digits from top to bottom", Reuse.DEFAULT)
    PRR_resize_factor: float = flag(
        1.0, real(0.04, 3), "size of a digit in units of 28 pixels", Reuse.DEFAULT
    )

    PMLR: bool = flag(None, boolean, PMLR_HELP, Reuse.DEFAULT, PMLR_GROUP)
    PMLR_n_img_x: int = flag(20, integer(1, 50), "digits from left to right", Reuse.DEFAULT)
    PMLR_n_img_y: int = flag(20, integer(1, 50), "digits from top to bottom", Reuse.DEFAULT)
    PMLR_resize_factor: float = flag(
        1.0, real(0.04, 3), "size of a digit in units of 28 pixels", Reuse.DEFAULT
    )
    PMLR_z_range: float = flag(3.0, real(0.001, 8), "each axis covers [-z_range, z_range]", Reuse.DEFAULT)
    PMLR_n_samples: int = flag(5_000, integer(1, mnist_data.N_TEST), "test digits on the map", Reuse.DEFAULT)
    animate: bool = flag(False, boolean, "save manifold.gif, an animation of the manifold during training")

    results_path: Path = flag(None, local_path, RESULTS_HELP, Reuse.PER_COMMAND, RUN_GROUP)
    resume: bool = flag(False, boolean, "continue the run in --results_path", Reuse.PER_COMMAND)
    overwrite: bool = flag(False, boolean, OVERWRITE_HELP, Reuse.PER_COMMAND)
    epoch_plots: bool = flag(False, boolean, EPOCH_PLOTS_HELP, Reuse.RESUME_DEFAULT)
    load: Path = flag(None, local_path, "load this run's network instead of training", Reuse.PER_COMMAND)
    n_importance: int = flag(None, integer(1), "samples of z per digit for log p(x)", Reuse.RESUME_DEFAULT)
    n_generate: int = flag(None, integer(1, 1_000_000), N_GENERATE_HELP, Reuse.PER_COMMAND)
    digit: int = flag(None, integer(0, 9), DIGIT_HELP, Reuse.PER_COMMAND)
    reconstruct: list = flag(
        None, local_path, "files and folders with your own digits", Reuse.PER_COMMAND, nargs="+"
    )
    explore: bool = flag(False, boolean, "with --load: open a window on the latent space", Reuse.PER_COMMAND)
    compare: list = flag(None, local_path, COMPARE_HELP, Reuse.PER_COMMAND, nargs="+")

    @property
    def reused_run(self):
        """The folder of the run that is resumed or loaded, or None."""
        return self.results_path if self.resume else self.load

    @property
    def draws_manifold(self):
        return self.dim_z == 2 and self.PMLR is not False

    @property
    def draws_latent_map(self):
        return self.dim_z > 1 and self.PMLR is not False


# Output that only --overwrite replaces, and the flag that asks for it.
NEVER_REPLACED = {
    "generated.npz": "n_generate",
    "reconstructed.npz": "reconstruct",
    "reconstructed.png": "reconstruct",
}


class FlagParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{' '.join(message.split())}; --help lists the flags")


def make_parser():
    """Returns the parser of Flags."""
    parser = FlagParser(usage="python run_main.py [flags]", allow_abbrev=False)
    for row in dataclasses.fields(Flags):
        if row.metadata["group"]:
            group = parser.add_argument_group(row.metadata["group"])
        help_text = row.metadata["help"]
        if row.default is not None:
            help_text += f" (default: {row.default})"
        options = {"type": row.metadata["parse"], "default": row.default, "help": help_text}
        if row.metadata["nargs"]:
            options |= {"nargs": row.metadata["nargs"], "metavar": "PATH", "action": "extend"}
        if options["type"] is boolean:
            options |= {"nargs": "?", "const": True, "metavar": "True|False"}
        group.add_argument(f"--{row.name}", **options)
    return parser


def parse_flags(arguments=None):
    """Returns the Flags in a list of arguments, completed by those of the run that is resumed or loaded."""
    arguments = sys.argv[1:] if arguments is None else [str(argument) for argument in arguments]
    parser = make_parser()
    flags = Flags(**vars(parser.parse_args(arguments)))
    if flags.compare:
        check_companions(flags, "compare", ("results_path", "overwrite"))
        return flags
    if flags.explore:
        check_companions(flags, "explore", ("load",))
    if flags.explore and not flags.load:
        raise UserError("--explore needs a trained network: name its folder with --load")
    if flags.load and flags.resume:
        raise UserError("--resume and --load exclude each other")
    if flags.resume and not flags.results_path:
        raise UserError("--resume needs the run's folder: name it with --results_path")
    if flags.resume or flags.load:
        flags = reuse_recorded_flags(parser, arguments, flags)
    if flags.learn_rate is None:
        flags.learn_rate = OPTIMIZERS[flags.optimizer].learn_rate
    check_flags(flags)
    check_folders(flags)
    for name, default in MODELS[flags.model].options.items():
        if getattr(flags, name) is None:
            setattr(flags, name, default)
    return flags


def reuse_recorded_flags(parser, arguments, given):
    """Returns the flags, with the recorded ones of a run as defaults.

    UserError if a flag was changed that must not change.
    """
    run_folder = given.reused_run
    in_place = given.results_path is None or given.results_path.resolve() == run_folder.resolve()
    recorded = recorded_flags(run_folder)
    for row in dataclasses.fields(Flags):
        if row.name in recorded and is_reused(row.metadata["reuse"], given):
            # As a string, which argparse checks as if it had been given.
            text = None if recorded[row.name] is None else str(recorded[row.name])
            parser.set_defaults(**{row.name: text})
    flags = Flags(**vars(parser.parse_args(arguments)))
    run_flags = Flags(**vars(parser.parse_args([])))  # the run's own, without this command's
    for row in dataclasses.fields(Flags):
        value = getattr(flags, row.name)
        run_value = getattr(run_flags, row.name)
        if value != run_value and is_fixed(row.metadata["reuse"], given, in_place):
            raise UserError(
                f"--{row.name} {value} conflicts with the run in {run_folder} ({run_value}): omit it"
            )
    if in_place:
        flags.results_path = run_folder
    return flags


def recorded_flags(run_folder):
    """Returns the flags in a run's config.json; UserError if it is not usable."""
    config = read_json(run_folder / "config.json")
    recorded = config.get("flags")
    if not isinstance(recorded, dict) or recorded.get("load"):
        raise UserError(f"{run_folder} is not the folder of a training run, or its config.json is damaged")
    names = {row.name for row in dataclasses.fields(Flags)}
    fixed = {row.name for row in dataclasses.fields(Flags) if row.metadata["reuse"] is Reuse.FIXED}
    differing = sorted((fixed - recorded.keys()) | (recorded.keys() - names))
    if differing:
        differing_flags = ", ".join(f"--{name}" for name in differing)
        raise UserError(f"the run in {run_folder} was made by a version with other flags: {differing_flags}")
    n_pixels = config.get("n_pixels")
    if not isinstance(n_pixels, int) or n_pixels < 1 or math.isqrt(n_pixels) ** 2 != n_pixels:
        raise UserError(
            f"the run in {run_folder} was made by an earlier version, or its config.json is damaged"
        )
    return recorded


def is_reused(reuse, flags):
    """Returns whether --resume or --load takes a recorded value as the default."""
    if reuse is Reuse.RESUME_DEFAULT:
        return flags.resume
    return reuse is not Reuse.PER_COMMAND


def is_fixed(reuse, flags, in_place):
    """Returns whether --resume or --load refuses a value other than the recorded one."""
    if reuse is Reuse.RESUMABLE:
        return not flags.resume
    if reuse is Reuse.RELOADABLE:
        return in_place
    return reuse is Reuse.FIXED


def check_companions(flags, name, companions):
    """Raises UserError if a flag is given together with flags other than its companions."""
    for row in dataclasses.fields(Flags):
        is_given = getattr(flags, row.name) != row.default
        if is_given and row.name not in (name, *companions):
            raise UserError(f"--{name} goes with --{' and --'.join(companions)} only: omit --{row.name}")


def check_flags(flags):
    """Raises UserError for flags that do not go together."""
    if flags.resume and flags.overwrite:
        raise UserError("--resume continues a run and --overwrite removes it: they exclude each other")
    if flags.load and flags.epoch_plots:
        raise UserError("--epoch_plots is for training, and --load does not train")
    if flags.load and flags.distribute != "none":
        raise UserError("--distribute is for training, and --load does not train")
    if flags.PMLR and flags.dim_z != 2:
        raise UserError(f"--PMLR plots a plane, but --dim_z is {flags.dim_z}: omit one of them")
    if flags.explore and flags.dim_z == 1:
        raise UserError("--explore shows a plane: it needs a run with --dim_z 2 or more")
    if flags.animate and flags.dim_z != 2:
        raise UserError("--animate shows the latent plane: it needs --dim_z 2")
    if flags.animate and flags.num_epochs > 100:
        raise UserError("--num_epochs must be 100 or fewer with --animate")
    if flags.digit is not None and not flags.n_generate:
        raise UserError("--digit is the class of new images: add --n_generate")
    if flags.warm_up > flags.num_epochs:
        raise UserError(f"--warm_up {flags.warm_up} is longer than --num_epochs {flags.num_epochs}")
    if flags.noise_level != 0.5 and not flags.add_noise:
        raise UserError("--noise_level has no effect without --add_noise")
    check_model_flags(flags)


def check_model_flags(flags):
    """Raises UserError for flags that do not go with the model."""
    if flags.binarize and flags.model == "least_squares":
        raise UserError("--binarize: --model least_squares is for grey levels")
    model = MODELS[flags.model]
    for other in MODELS.values():
        for name in (*other.options, *other.other_flags):
            applies = name in (*model.options, *model.other_flags)
            if getattr(flags, name) is not None and not applies:
                raise UserError(f"--{name} does not apply to --model {flags.model}: omit it")


def check_folders(flags):
    """Raises UserError for flags that do not fit what is on disk."""
    folder = flags.results_path
    if flags.load and not checkpoint_files(flags.load):
        raise UserError(f"--load {flags.load} has no checkpoint of a finished epoch")
    if flags.data_dir.is_file():
        raise UserError(f"--data_dir {flags.data_dir} is a file: name a folder")
    if folder is None:
        return
    if folder.is_file():
        raise UserError(f"--results_path {folder} is a file: name a folder")
    names = {file.name for file in folder.glob("[!.]*")}
    is_run = "data_sha256" in read_json(folder / "config.json")
    n_epochs = max(checkpoint_files(folder), default=0)
    has_started = n_epochs > 0 or "log.csv" in names
    if names and not is_run:
        raise UserError(f"--results_path {folder} is not empty and holds no run: name another folder")
    if has_started and not (flags.resume or flags.overwrite or folder == flags.load):
        remedy = "name another folder, or add --overwrite" if flags.load else "add --resume or --overwrite"
        raise UserError(f"{folder} already holds a run: {remedy}")
    if flags.resume and flags.num_epochs < n_epochs:
        raise UserError(f"--num_epochs must be at least {n_epochs}, the number of epochs already trained")
    if flags.resume and flags.num_epochs == n_epochs:
        recorded = recorded_flags(folder)
        for name in ("n_samples", "learn_rate"):
            if recorded.get(name) not in (None, getattr(flags, name)):
                raise UserError(f"--{name} cannot change: all {n_epochs} epochs are done; raise --num_epochs")
    for name, flag_name in NEVER_REPLACED.items():
        if name in names and getattr(flags, flag_name) and not flags.overwrite:
            remedy = "move it" if flags.resume else "move it, or add --overwrite"
            raise UserError(f"{name} already exists in {folder}: {remedy}")


# --- Data and the folder of a run ---------------------------------------------------------------------


def needs_data(flags):
    """Returns whether MNIST is needed: not if --load only makes new images or evaluates the user's digits."""
    if not flags.load:
        return True
    only_generates = flags.n_generate and not flags.n_importance
    return not (flags.reconstruct or only_generates)


def load_data(flags):
    """Returns the data; UserError if they are not those of the resumed or loaded run, or too few."""
    run_folder = flags.reused_run
    recorded = read_json(run_folder / "config.json") if run_folder else {}
    missing = mnist_data.missing_files(flags.data_dir)
    if missing and recorded and recorded.get("data_sha256") != mnist_data.SHA256:
        needed = f"the data in {recorded['flags'].get('data_dir')}, which are not MNIST"
        found = f"--data_dir {flags.data_dir} lacks {', '.join(missing)}"
        raise UserError(f"the run in {run_folder} was trained on {needed}: {found}")
    data = mnist_data.load_mnist(flags.data_dir)
    if run_folder:
        if recorded.get("data_sha256") != data.file_sha256:
            raise UserError(
                f"--data_dir {flags.data_dir} holds other data than the run in {run_folder} was trained on"
            )
        if recorded.get("digits_sha256") != data.checksum():
            raise UserError(
                f"load_mnist returns digits that the run in {run_folder} was not trained on: "
                "undo the change to load_mnist"
            )
    n_train = len(data.train_images)
    n_test = len(data.test_images)
    n_pixels = data.train_images.shape[1]
    if math.isqrt(n_pixels) ** 2 != n_pixels:
        raise UserError(f"load_mnist returns images of {n_pixels} pixels: they must be square")
    if flags.batch_size > n_train or flags.PRR_n_img_x * flags.PRR_n_img_y > n_test:
        found = f"--data_dir {flags.data_dir} has {n_train:,} training and {n_test:,} test digits"
        raise UserError(f"{found}: lower --batch_size or --PRR_n_img_x")
    return data


def new_folder(prefix):
    """Makes and returns the next free one of results/run1, results/run2, ..., for the prefix "run"."""
    Path("results").mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = Path("results", f"{prefix}{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def claim_folder(flags, data, state):
    """Returns the run's folder, created if needed, with a config.json. --overwrite removes the old run."""
    if flags.load and flags.results_path == flags.load:
        return flags.load
    folder = flags.results_path or new_folder("run")
    removed = [*folder.glob(".part-*"), *folder.glob("checkpoint/.part-*")]  # left by a kill
    if flags.overwrite:
        names = ["log.csv", "metrics.json", "latent.npz", "vae.keras", *NEVER_REPLACED, *plot_utils.PICTURES]
        removed += [folder / name for name in names]
        removed += checkpoint_files(folder).values()
        for prefix in plot_utils.EPOCH_PICTURES.values():
            removed += folder.glob(f"epochs/{prefix}_epoch_[0-9]*[0-9].png")
        removed += folder.glob(EVENT_FILES)
    for file in removed:
        file.unlink(missing_ok=True)
    versions = {"python": sys.version}
    for name in ("tensorflow", "keras", "numpy", "scipy", "matplotlib"):
        versions[name] = importlib.import_module(name).__version__
    scripts = {name: code_checksum(name) for name in ("mnist_data.py", "vae.py", "run_main.py")}
    config = {
        "flags": dataclasses.asdict(flags) | {"resume": False, "overwrite": False},
        "versions": versions,
        "data_sha256": data.file_sha256 if data else None,
        "digits_sha256": data.checksum() if data else None,
        "scripts": scripts,
        "n_pixels": state.network.n_pixels,
    }
    write_atomically(folder / "config.json", json.dumps(config, indent=2, default=str) + "\n")
    if not flags.load:
        start_events(state, folder)
    return folder


@functools.cache
def code_checksum(name, without=frozenset()):
    """Returns the beginning of the SHA-256 of a script's code, without its docstrings and comments.

    without: names of classes that do not count, either.
    """
    tree = ast.parse(Path(__file__).with_name(name).read_bytes())
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in without]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:8]


def read_json(path):
    """Returns the dictionary in a JSON file, {} if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    return {}


def read_arrays(path):
    """Returns the arrays in a .npz file, by name; {} if it is missing or damaged."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception:  # NumPy may raise any exception on a damaged file
        return {}


def write_log(folder, history):
    """Writes log.csv: one row per epoch. A column that older epochs lack is empty there."""
    columns = dict.fromkeys(name for row in history for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "log.csv", text.getvalue())


def checkpoint_files(folder):
    """Returns the checkpoints in a run's folder, {epoch: path}, the newest last."""
    files = {}
    for file in folder.glob("checkpoint/epoch-*.npz"):
        epoch = file.stem.removeprefix("epoch-")
        if epoch.isdecimal():
            files[int(epoch)] = file
    return dict(sorted(files.items()))


def state_variables(network):
    """Returns the variables in a checkpoint: the network's and, in training, the optimizer's.

    A constant learning rate is not one of them: it follows --learn_rate.
    """
    variables = list(network.variables)
    if network.compiled:
        for variable in network.optimizer.variables:
            if variable.name != "learning_rate":
                variables.append(variable)
    return variables


def save_epoch(state, digits, flags, folder):
    """Writes the state after an epoch, and log.csv; keeps the state after the epoch before."""
    if flags.animate:
        frame = plot_utils.frame(state.network, digits, flags)
        # --resume may change the size.
        state.frames = [old for old in state.frames if old.shape == frame.shape]
        state.frames.append(frame)
    arrays = {
        "history": json.dumps(state.history),
        "frames": state.frames,
        "fingerprint": state.network.fingerprint(),
    }
    for i, variable in enumerate(state_variables(state.network)):
        arrays[f"variable_{i}"] = variable.numpy()
    with atomic_write(folder / "checkpoint" / f"epoch-{len(state.history)}.npz") as part:
        np.savez(part, **arrays)
    for file in list(checkpoint_files(folder).values())[:-2]:
        file.unlink()
    for name in ("metrics.json", "latent.npz"):  # of an earlier state
        (folder / name).unlink(missing_ok=True)
    write_log(folder, state.history)
    draw_epoch(state, digits, flags, folder)


def draw_epoch(state, digits, flags, folder):
    """Draws the pictures that show progress, if drawing costs little time, and those of --epoch_plots."""
    epoch = len(state.history)
    start = time.perf_counter()
    training_seconds = sum(row["seconds"] for row in state.history)
    is_cheap = state.drawing_seconds < MAX_DRAWING_SHARE * training_seconds
    pictures = {}
    if training_seconds >= SECONDS_BEFORE_DRAWING and is_cheap and epoch < flags.num_epochs:
        pictures = plot_utils.draw(state, digits, flags, names=plot_utils.PROGRESS_PICTURES)
        for name, content in pictures.items():
            write_atomically(folder / name, content)
        state.drawing_seconds += time.perf_counter() - start
    add_events(state, epoch, state.history[-1], pictures)
    if flags.epoch_plots:
        pictures = plot_utils.draw(state, digits, flags, names=plot_utils.EPOCH_PICTURES)
        for name, content in pictures.items():
            prefix = plot_utils.EPOCH_PICTURES[name]
            write_atomically(folder / "epochs" / f"{prefix}_epoch_{epoch:02}.png", content)


def read_checkpoint(file):
    """Returns the arrays in a checkpoint, by name; ValueError if it is damaged."""
    try:
        with np.load(file) as arrays:
            if arrays.zip.testzip():
                raise ValueError("wrong checksum")
            if not {"history", "frames", "fingerprint"} <= set(arrays):
                raise ValueError("not a checkpoint")
            return dict(arrays)
    except Exception as error:  # NumPy may raise any exception on a damaged file
        raise ValueError(f"{file} is damaged ({error_message(error)})") from error


def restore_state(state, folder):
    """Restores the newest undamaged checkpoint in a run's folder; changes nothing if no epoch was finished.

    UserError if all checkpoints are damaged, or none is left although log.csv exists.
    """
    damage = []
    for file in reversed(checkpoint_files(folder).values()):
        try:
            arrays = read_checkpoint(file)
        except ValueError as error:
            damage.append(str(error))
            continue
        restore_checkpoint(state, file, arrays)
        log("; ".join([*damage, f"using the state after epoch {len(state.history)}"]))
        return
    if damage:
        raise UserError(f"{'; '.join(damage)}: start a new run")
    if (folder / "log.csv").exists():
        raise UserError(f"the checkpoints in {folder} are missing: start a new run")
    log("no epoch was finished: starting from the beginning")


def restore_checkpoint(state, file, arrays):
    """Sets the state to the arrays of a checkpoint. UserError if another network saved it."""
    variables = state_variables(state.network)
    values = [array for name, array in arrays.items() if name.startswith("variable_")]
    if not state.network.compiled:
        values = values[: len(variables)]  # without the optimizer's
    if [value.shape for value in values] != [tuple(variable.shape) for variable in variables]:
        raise UserError(f"{file} has weights of other shapes: undo the change to vae.py or config.json")
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    saved = arrays["fingerprint"]
    found = state.network.fingerprint()
    if saved.shape != found.shape or not np.allclose(found, saved, rtol=1e-4, atol=1e-3):
        computed = f"{np.round(saved, 3)} then, {np.round(found, 3)} now"
        raise UserError(
            f"{file} was saved by another network: undo the change to vae.py (it computes {computed})"
        )
    state.history = json.loads(str(arrays["history"]))
    state.frames = list(arrays["frames"])


def save_results(state, digits, flags, folder):
    """Evaluates the network on the test digits; writes metrics, latents, pictures and the network itself."""
    network = state.network
    write_log(folder, state.history)
    arrays = evaluate_digits(network, digits.test, flags)
    metrics = evaluate_test_set(network, digits.test, arrays, flags)
    log("\n".join(f"{name:28}{value:12,.5g}" for name, value in metrics.items()))
    old = read_json(folder / "metrics.json")
    if old.get("test_elbo") == metrics["test_elbo"]:  # of the same weights: keep what was measured before
        metrics = old | metrics
        arrays = read_arrays(folder / "latent.npz") | arrays
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    with atomic_write(folder / "latent.npz") as part:
        np.savez(part, **arrays)
    if not flags.load:
        # A copy without the optimizer, whose learning rate has reached 0.
        trained = type(network).from_config(network.get_config())
        trained.set_weights(network.get_weights())
        with atomic_write(folder / "vae.keras") as part:
            trained.save(part)
    pictures = plot_utils.draw(state, digits, flags, arrays)
    if not flags.load:
        add_events(state, len(state.history), metrics, pictures)
        state.events.close()
    for name in plot_utils.PICTURES:
        if name not in pictures:  # of an earlier state
            (folder / name).unlink(missing_ok=True)
    for name, content in pictures.items():
        write_atomically(folder / name, content)


# --- TensorBoard --------------------------------------------------------------------------------------

EVENT_SUFFIX = ".run_main"
EVENT_FILES = f"events.out.tfevents.*{EVENT_SUFFIX}"


def start_events(state, folder):
    """Opens a run's event file, in place of an older one, and writes the run's history to it."""
    for old_file in folder.glob(EVENT_FILES):
        old_file.unlink()
    state.events = tf.summary.create_file_writer(os.fsencode(folder), filename_suffix=EVENT_SUFFIX)
    for row in state.history:
        add_events(state, row["epoch"], row, pictures={})


def add_events(state, epoch, numbers, pictures):
    """Appends the numbers and pictures of an epoch, each by name, to a run's event file.

    tf.summary.scalar and tf.summary.image would need TensorBoard to be installed.
    """
    summary = tf.compat.v1.Summary()
    for name, number in numbers.items():
        if name != "epoch":
            summary.value.add(tag=name, simple_value=number)
    for name, content in pictures.items():
        if name.endswith(".png"):
            height, width, channels = tf.io.decode_png(content).shape
            image = {"height": height, "width": width, "colorspace": channels}
            summary.value.add(tag=name, image=image | {"encoded_image_string": content})
    with state.events.as_default():
        tf.summary.experimental.write_raw_pb(summary.SerializeToString(), step=epoch)
    state.events.flush()


# --- Several devices and machines ---------------------------------------------------------------------


def is_chief(flags):
    """Returns whether this process is the chief, which writes all files. UserError for a bad TF_CONFIG."""
    if flags.distribute != "multi_worker":
        return True
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        jobs = config["cluster"]
        job = config["task"]["type"]
        index = config["task"]["index"]
        valid = all(isinstance(hosts, list) and hosts for hosts in jobs.values())
        valid = valid and index >= 0 and bool(jobs[job][index])  # LookupError if there is no such task
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        example = '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'
        raise UserError(f"--distribute multi_worker needs TF_CONFIG in the environment, like {example}")
    return index == 0 and job == ("chief" if "chief" in jobs else "worker")


@contextlib.contextmanager
def distribution_strategy(flags):
    """Yields the tf.distribute strategy.

    Inside the context, running out of memory or losing a worker raises UserError.
    """
    errors = tf.errors
    lost_worker_errors = ()  # in a single process, there are none
    with contextlib.ExitStack() as cleanup:
        if flags.distribute == "multi_worker":
            for number in (signal.SIGINT, signal.SIGTERM):
                cleanup.callback(signal.signal, number, signal.getsignal(number))
            strategy = join_workers()
            lost_worker_errors = (
                errors.UnavailableError,
                errors.DeadlineExceededError,
                errors.AbortedError,
                errors.CancelledError,
            )
        elif flags.distribute == "mirrored":
            strategy = mirrored_strategy()
        else:
            strategy = tf.distribute.get_strategy()
        n_replicas = strategy.num_replicas_in_sync
        if flags.batch_size % n_replicas:
            raise UserError(f"--batch_size {flags.batch_size} must be divisible by the {n_replicas} replicas")
        n_labelled = labelled_batch_size(flags)
        if n_labelled % n_replicas:
            added = f"--batch_size {flags.batch_size} adds {n_labelled} labelled digits to each mini-batch"
            raise UserError(f"{added}: this number must be divisible by the {n_replicas} replicas")
        try:
            yield strategy
            # Waits for all workers: one that exits early would count as lost.
            compare_workers(strategy, what="", content="")
        except (MemoryError, errors.ResourceExhaustedError) as error:
            raise UserError("out of memory: lower --n_hidden or --batch_size") from error
        except lost_worker_errors as error:
            message = "lost another worker: restart all of them; add --resume if an epoch was finished"
            raise UserError(message) from error


@functools.cache
def mirrored_strategy():
    """Returns the strategy over this machine's devices: always the same one.

    With a second strategy in the process, TensorFlow would confuse its network's gradients with the first's.
    """
    return tf.distribute.MirroredStrategy()


def join_workers():
    """Returns the strategy over the machines of TF_CONFIG, once all of them are there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would not run while TensorFlow waits
    log("waiting for the other workers; Ctrl-C stops waiting")
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except Exception as error:  # TensorFlow may raise any exception
        raise UserError(f"TF_CONFIG cannot be used: {error_message(error)}") from error
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # TensorFlow's own does not end the program


def compile_distributed_steps(network, flags, strategy):
    """compile_steps for replicas: each takes its share of a mini-batch and draws its own random numbers."""
    n_replicas = strategy.num_replicas_in_sync
    training_loss = network.training_loss

    def replica_loss(batch, **options):
        loss, reconstruction, kl = training_loss(batch, **options)
        return loss / n_replicas, reconstruction, kl  # the replicas' gradients are summed

    # XLA cannot compile the exchange between replicas, only each one's loss.
    network.training_loss = compiled(replica_loss, jit_compile=True, autograph=False)

    def replica_step(images, labels, indices, seed, n_steps):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        # Every n_replicas-th digit: each replica also gets an equal part of the added labelled digits.
        own_indices = tf.reshape(indices, (-1, n_replicas))[:, replica]
        own_images = tf.gather(images, own_indices)
        own_labels = tf.gather(labels, own_indices)
        sgd_step(network, own_images, own_labels, vae.fold_in(seed, replica), n_steps, flags)

    def train_steps(images, labels, batches, epoch, first, last):
        for step in tf.range(first, last):
            seed = training_seed(flags, epoch, step)
            strategy.run(replica_step, (images, labels, batches[step], seed, len(batches)))

    return compiled(train_steps)


def check_workers_agree(strategy, flags, data, state):
    """Raises UserError unless all workers train with the same flags and data, from the same checkpoint."""
    shared = {"resume": flags.resume}
    for row in dataclasses.fields(Flags):
        if row.metadata["reuse"] in (Reuse.FIXED, Reuse.RESUMABLE, Reuse.RELOADABLE):
            shared[row.name] = getattr(flags, row.name)
    content = json.dumps([shared, data.checksum() if data else None, state.history])
    compare_workers(strategy, "flags, data or checkpoints", content)


def compare_workers(strategy, what, content):
    """Waits for all workers; raises UserError unless all of them have the same content, a string."""
    if strategy.num_replicas_in_sync == 1:
        return

    def checksum():
        return tf.strings.to_hash_bucket_fast([content], 2**62)

    def all_checksums():
        return strategy.gather(strategy.run(checksum), axis=0)

    checksums = compiled(all_checksums, autograph=False)()
    if len(np.unique(checksums)) > 1:
        raise UserError(f"--distribute multi_worker: the workers have different {what}")


def device_name(strategy):
    """Returns what the network is trained on, as text."""
    if tf.config.list_logical_devices("GPU"):
        return f"GPUs: {strategy.num_replicas_in_sync}"
    hint = ' (for the GPU: pip install "tensorflow[and-cuda]")' if Path("/dev/nvidia0").exists() else ""
    return f"CPU, {os.cpu_count()} threads{hint}"


# --- Comparing and exploring finished runs ------------------------------------------------------------


@dataclass
class RecordedRun:
    """What a run has left in its folder."""

    folder: Path
    setting: dict  # what determines its results besides the seed: flags, checksums of scripts, epochs
    seed: int
    digits_sha256: str
    history: list[dict]
    metrics: dict


def read_run(folder):
    """Returns the RecordedRun in a folder; UserError if there is none, or no epoch is finished."""
    recorded = recorded_flags(folder)
    config = read_json(folder / "config.json")
    setting = {}
    for row in dataclasses.fields(Flags):
        if row.metadata["reuse"] in (Reuse.FIXED, Reuse.RESUMABLE):
            setting[row.name] = recorded.get(row.name)
    setting |= config.get("scripts", {})
    history = []
    try:
        with (folder / "log.csv").open() as file:
            for row in csv.DictReader(file):
                history.append({name: float(row[name]) for name in ("valid_elbo", "seconds")})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--compare {folder}: cannot read log.csv: {error_message(error)}") from error
    if not history:
        raise UserError(f"--compare {folder}: the run has no finished epoch")
    n_epochs = setting.pop("num_epochs")
    setting["epochs"] = f"{len(history)}/{n_epochs}"
    metrics = read_json(folder / "metrics.json")
    if "test_error" in metrics:
        metrics["test_error_percent"] = 100 * metrics["test_error"]
    return RecordedRun(folder, setting, recorded["seed"], config.get("digits_sha256"), history, metrics)


def list_runs(paths):
    """Returns the folders in a list of paths and of patterns such as results/run*, in natural order."""
    folders = set()
    for path in paths:
        # On Windows, the shell leaves patterns as they are. A path that exists is not a pattern.
        matches = [] if path.exists() else list(path.parent.glob(path.name))
        folders.update(matches or [path])
    return sorted(folders, key=natural_order)


def compare(flags):
    """Prints a table of runs and writes comparison.png. Runs that differ in --seed alone share a row."""
    runs = [read_run(folder) for folder in list_runs(flags.compare)]
    if len(runs) == 1:
        raise UserError(f"--compare {runs[0].folder}: name two or more runs")
    for run in runs:
        if run.digits_sha256 != runs[0].digits_sha256:
            raise UserError(f"--compare: {runs[0].folder} and {run.folder} were trained on different data")
    if flags.results_path and (flags.results_path / "comparison.png").exists() and not flags.overwrite:
        raise UserError(f"comparison.png already exists in {flags.results_path}: move it, or add --overwrite")
    groups = group_seeds(runs)
    differing = differing_settings(groups)
    log(comparison_table(groups, differing))
    labels = []
    for group in groups:
        setting = [f"{name} {setting_cell(group[0], name)}" for name in differing]
        labels.append(setting or [group[0].folder.name])
    import plot_utils  # needs no TensorFlow

    content = plot_utils.draw_comparison(groups, labels)
    picture = (flags.results_path or new_folder("compare")) / "comparison.png"
    write_atomically(picture, content)
    log(f"the curves and pictures are in {picture}")


def group_seeds(runs):
    """Returns lists of runs that differ in nothing but the seed; of several with the same seed, the first."""
    groups = {}
    for run in runs:
        runs_by_seed = groups.setdefault(json.dumps(run.setting), {})
        runs_by_seed.setdefault(run.seed, run)
    return [list(runs_by_seed.values()) for runs_by_seed in groups.values()]


def differing_settings(groups):
    """Returns the names of the settings in which groups of runs differ."""
    settings = [group[0].setting for group in groups]
    names = dict.fromkeys(name for setting in settings for name in setting)
    return [name for name in names if len({str(setting.get(name)) for setting in settings}) > 1]


def comparison_table(groups, differing):
    """Returns a table as text: a row per group of runs, with the settings in which they differ."""
    metrics = {"test ELBO": "test_elbo", "reconstruction": "test_reconstruction", "KL": "test_kl"}
    if any("test_error" in run.metrics for group in groups for run in group):
        metrics["test error, %"] = "test_error_percent"
    settings = list(dict.fromkeys([*differing, "epochs"]))
    rows = [["runs", *settings, "valid ELBO", *metrics, "log p(x)", "s/epoch"]]
    for group in groups:
        first = group[0]
        row = [", ".join(run.folder.name for run in group)]
        row += [setting_cell(first, name) for name in settings]
        row.append(mean_and_spread([run.history[-1]["valid_elbo"] for run in group]))
        row += [mean_and_spread([run.metrics.get(name) for run in group]) for name in metrics.values()]
        seconds = np.median([epoch["seconds"] for run in group for epoch in run.history])
        rows.append([*row, log_px_cell(group), f"{seconds:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.append("±: standard deviation over seeds; for a single run, standard error over digits")
    return "\n".join(lines)


def setting_cell(run, name):
    """Returns a setting of a run as text; "-" if the run has none, such as n_samples of --model vae."""
    value = run.setting.get(name)
    return "-" if value is None else str(value)


def log_px_cell(group):
    """Returns log p(x) of a group as text, with the importance samples; "-" if these differ between runs."""
    n_importance = {run.metrics.get("n_importance") for run in group}
    if len(n_importance) > 1 or None in n_importance:
        return "-"
    log_px = mean_and_spread([run.metrics.get("test_log_px") for run in group])
    if len(group) == 1 and "test_log_px_standard_error" in group[0].metrics:
        log_px += f" ± {group[0].metrics['test_log_px_standard_error']:.2f}"
    return f"{log_px} ({n_importance.pop():,} samples)"


def mean_and_spread(values):
    """Returns the mean of a group's values as text, with their standard deviation; "-" if one is missing."""
    if None in values:
        return "-"
    mean = f"{np.mean(values):.2f}"
    return f"{mean} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def explore(flags, load_tensorflow):
    """Opens a window on the latent space of a finished run."""
    latents = read_arrays(flags.load / "latent.npz")
    if not {"mean", "label"} <= latents.keys():
        raise UserError(f"--explore: {flags.load} has no latent.npz: run --load {flags.load} first")
    n_pixels = read_json(flags.load / "config.json")["n_pixels"]
    if n_pixels != mnist_data.N_PIXELS:
        raise UserError(f"--explore needs images of {mnist_data.N_PIXELS} pixels, not {n_pixels}")
    with contextlib.ExitStack() as cleanup:
        try:
            import plot_utils

            figure = cleanup.enter_context(plot_utils.window())
        except (RuntimeError, ValueError) as error:  # raised for the backend that MPLBACKEND names
            browser = "to use a browser, pip install tornado and set MPLBACKEND=webagg"
            raise UserError(f"--explore: {error_message(error)}; {browser}") from error
        log("loading TensorFlow")
        load_tensorflow(flags)
        state = TrainingState(build_network(None, flags))
        restore_state(state, flags.load)
        check_classifier(state.network, "explore")
        decode, examine = functions_to_explore(state.network)
        explorer = plot_utils.Explorer(
            figure, latents["mean"], latents["label"], decode, examine, state.network.has_classes
        )
        explorer.show()


def functions_to_explore(network):
    """Returns decode(z, labels), compiled, and examine(ink), which evaluates a hand-drawn digit.

    examine returns its latent mean, reconstruction, ELBO and predicted label (-1 without a classifier).
    """
    decode = tf.function(network.decode, jit_compile=True)

    @tf.function(jit_compile=True)
    def measure(x):
        negative_elbo, _, _ = network.negative_elbo(x, seed=(0, 0))
        labels = network.classify(x)
        if labels is None:
            labels = tf.constant([-1])
        return network.encode(x), network.reconstruct(x), -negative_elbo, labels

    def examine(ink):
        x = mnist_data.crop_and_centre(ink).reshape(1, -1)
        return [array.numpy()[0] for array in measure(x)]

    decode(tf.zeros((1, network.dim_z)), tf.constant([0]))  # compiles both before the window opens
    measure(tf.zeros((1, network.n_pixels)))
    return decode, examine


# --- The process --------------------------------------------------------------------------------------


def import_tensorflow(flags=None):
    """Imports TensorFlow and the scripts that need it, for a program that has its own settings.

    flags: not used here; `start_tensorflow`, which can take the place of this function, needs them.
    """
    global keras, plot_utils, tf, vae
    import keras
    import tensorflow as tf

    if keras.config.backend() != "tensorflow":
        raise UserError(
            f"Keras uses {keras.config.backend()}: set KERAS_BACKEND=tensorflow before importing it"
        )
    import plot_utils
    import vae


def start_tensorflow(flags):
    """Imports TensorFlow for run_main.py itself: ignores Keras' configuration, hides start-up messages."""
    os.environ |= {"KERAS_BACKEND": "tensorflow", "KERAS_HOME": os.devnull, "TF_USE_LEGACY_KERAS": "0"}
    os.environ["TF_DETERMINISTIC_OPS"] = "1"  # otherwise, results on a GPU would differ from run to run
    # That also disables autotuning, without which Triton's matrix products are up to ten times slower than
    # cuBLAS'.
    os.environ["XLA_FLAGS"] = f"--xla_gpu_enable_triton_gemm=false {os.environ.get('XLA_FLAGS', '')}"
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # other programs may use a GPU, too
    # When a worker is lost, TensorFlow logs many lines, then raises.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3" if flags.distribute == "multi_worker" else "2")
    gc.disable()  # collecting garbage would take a quarter of the import time
    with filtered_stderr():
        import_tensorflow()
        tf.config.list_physical_devices()
    gc.freeze()  # or the end of the program would take a second to collect what was imported
    gc.enable()


# Drops start-up messages that no setting suppresses, such as the error (E) that a machine has no GPU.
STDERR_FILTER = r"""
import re, sys
for line in sys.stdin:
    if not re.match(r"WARNING: All log messages before absl|[IW]\d{4} |E\d{4} .*cuInit", line):
        print(line, end="")
"""


@contextlib.contextmanager
def filtered_stderr():
    """Filters what this process, TensorFlow's C++ included, writes to stderr."""
    stderr = os.dup(2)
    command = [sys.executable, "-c", STDERR_FILTER]  # a process that outlives a crash of TensorFlow
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=stderr, start_new_session=True
    ) as filter_process:
        os.dup2(filter_process.stdin.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def compiled(function, **options):
    """tf.function, without its warning of retracing when a program calls main several times.

    TensorFlow tells functions apart by their code, but every partial object is a separate one.
    """
    return tf.function(functools.partial(function), **options)


def main(arguments=None, load_tensorflow=import_tensorflow):
    """Runs the program; returns its exit status. From Python: main(["--dim_z", "2"])."""
    try:
        flags = parse_flags(arguments)
        with contextlib.redirect_stdout(sys.stdout if is_chief(flags) else None):  # print to None is silent
            if flags.compare:
                compare(flags)
            elif flags.explore:
                explore(flags, load_tensorflow)
            else:
                run(flags, load_tensorflow)
    except KeyboardInterrupt:
        log("interrupted: --resume continues a training run after its last finished epoch")
        return 130
    except (UserError, OSError, MemoryError, ImportError) as error:
        print(f"run_main.py: error: {error_message(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if sys.stderr is None:
        # Closed: without this, TensorFlow's messages would go into whatever file gets its number.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
    # MPLBACKEND matters only for the window of --explore. One that a notebook exports may not exist here.
    if not any(argument.startswith("--explore") for argument in sys.argv):
        os.environ["MPLBACKEND"] = "agg"
    elif os.environ.get("MPLBACKEND", "").startswith("module://"):
        del os.environ["MPLBACKEND"]
    for stream in (sys.stdout, sys.stderr):
        if stream:  # None if closed
            stream.reconfigure(errors="backslashreplace")  # a file's name may contain what it cannot encode
    sys.exit(main(load_tensorflow=start_tensorflow))
