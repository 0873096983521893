"""Times our training beside the same network in other frameworks, in turn, on an otherwise idle machine.

    python tests/benchmark.py

Peers that are not installed are named and left out. tests/README.md says what each row means.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402

import mnist_data  # noqa: E402
import run_main  # noqa: E402

PEERS = {"jax": ("jax", "optax"), "torch": ("torch",), "keras": ("keras",)}
GOALS = {"jax": 0.85, "torch": 0.5, "keras": 0.8}

BATCH_SIZE = 128
# A product of (m, k) by (k, n) matrices is m x k x n. The first is large enough to run at peak speed; the
# others are a training step's.
PRODUCT_SHAPES = [(2048, 2048, 2048), (128, 784, 500), (128, 500, 500), (128, 500, 784), (784, 128, 500)]
# The example's recipe after 20 epochs, by dim_z: its ELBO on the test digits (README.md).
RECIPE_ELBO = {2: -144.99, 20: -104.79}


def ours(images, n_epochs, report, **setting):
    """Our own training code on images (n, 784) uint8; reports the loss of every epoch, nats per image."""
    run_main.import_tensorflow()
    flags = run_main.parse_flags([f"--{name}={value}" for name, value in setting.items()])
    flags.num_epochs = n_epochs
    labels = np.zeros(len(images), np.int32)
    # The programs are not compared by their validation: a single digit takes a few milliseconds per epoch.
    one_digit = run_main.make_batch(images[:1], labels[:1], flags, seed=(0, 0))
    digits = run_main.Digits(images, labels, images[:0], labels[:0], valid=one_digit, test=one_digit)
    state = run_main.TrainingState(run_main.build_network(digits, flags))
    for row in run_main.train(state, digits, flags, run_main.tf.distribute.get_strategy()):
        report(-row["train_elbo"])


def is_installed(module):
    """Returns whether a module could be imported."""
    return importlib.util.find_spec(module) is not None


def installed_peers():
    """Returns the names of the peers that can be run."""
    return [peer for peer, modules in PEERS.items() if all(is_installed(module) for module in modules)]


def program(name):
    """Returns the function that trains in one of the programs."""
    if name == "ours":
        return ours
    return importlib.import_module(f"peers.{name}_vae").train


def peak_memory():
    """Returns the most megabytes of memory that this process had at any time."""
    # Not getrusage: a child's peak starts there at what its parent had.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def work(name, n_epochs, augmented, setting):
    """What a process of one program does: prints its seconds per epoch, without the first, and its memory."""
    if name == "ours":
        run_main.start_tensorflow(run_main.parse_flags([]))
    before = peak_memory()
    images = mnist_data.load_mnist(ROOT / "data").train_images
    start = time.perf_counter()
    if augmented:
        images = mnist_data.augment(images, 0)
    copying = time.perf_counter() - start
    losses = []
    times = []

    def report(loss):
        losses.append(loss)
        times.append(time.perf_counter())

    program(name)(images, 1 + n_epochs, report, **setting)  # the first epoch compiles
    assert np.isfinite(losses).all(), f"{name}: {losses}"
    assert losses[-1] < losses[0], f"{name} does not learn: {losses}"
    batch_size = setting.get("batch_size", BATCH_SIZE)
    result = {
        "seconds": np.diff(times).tolist(),
        "n_images": len(images) // batch_size * batch_size,
        "megabytes": peak_memory() - before,
        "copying": copying,
    }
    print(json.dumps(result))


def measure(name, n_epochs, augmented=False, **setting):
    """Returns the seconds of epochs, their images and the memory of a program, in a separate process."""
    command = [sys.executable, __file__, "--work", json.dumps([name, n_epochs, augmented, setting])]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def multiply_adds(dim_z, n_hidden=500):
    """Returns the multiply-adds of a training step per image: forwards once, backwards twice.

    Backwards, the first layer needs no gradient of its input.
    """
    encoder = 784 * n_hidden + n_hidden**2 + 2 * n_hidden * dim_z
    decoder = dim_z * n_hidden + n_hidden**2 + 784 * n_hidden
    return 3 * (encoder + decoder) - 784 * n_hidden


def product_peak(m, k, n):
    """Returns the GFLOP/s of a float32 product of (m, k) by (k, n): the best of many by NumPy and XLA."""
    rng = np.random.default_rng(0)
    a = rng.random((m, k), np.float32)
    b = rng.random((k, n), np.float32)
    tf = run_main.tf
    compiled_product = tf.function(tf.matmul, jit_compile=True)
    programs = [(np.matmul, a, b), (compiled_product, tf.constant(a), tf.constant(b))]
    compiled_product(tf.constant(a), tf.constant(b))
    times = []
    for _ in range(max(20, int(2e10 / (m * k * n)))):
        for product, left, right in programs:
            start = time.perf_counter()
            product(left, right)
            times.append(time.perf_counter() - start)
    return 2 * m * k * n / min(times) / 1e9


def step_products(dim_z=2, n_hidden=500):
    """Returns the seconds that a step's matrix products take alone, as XLA compiles them."""
    tf = run_main.tf
    encoder = [(784, n_hidden), (n_hidden, n_hidden), (n_hidden, 2 * dim_z)]
    decoder = [(dim_z, n_hidden), (n_hidden, n_hidden), (n_hidden, 784)]
    layers = []
    for n_in, n_out in encoder + decoder:
        x = tf.random.stateless_normal((BATCH_SIZE, n_in), (0, 0))
        weights = tf.random.stateless_normal((n_in, n_out), (0, 1))
        gradient = tf.random.stateless_normal((BATCH_SIZE, n_out), (0, 2))
        layers.append((x, weights, gradient))

    @tf.function(jit_compile=True)
    def products():
        outputs = [tf.matmul(x, weights) for x, weights, _ in layers]
        x_gradients = [tf.matmul(gradient, weights, transpose_b=True) for _, weights, gradient in layers[1:]]
        weight_gradients = [tf.matmul(x, gradient, transpose_a=True) for x, _, gradient in layers]
        return outputs, x_gradients, weight_gradients

    products()
    times = []
    for _ in range(1_000):
        start = time.perf_counter()
        products()
        times.append(time.perf_counter() - start)
    return np.median(times)


def spread(numbers):
    """Returns the median and the range of numbers, as text."""
    return f"{np.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def print_peaks():
    """Prints the speed of matrix products; returns that of the largest, GFLOP/s."""
    peaks = [product_peak(*shape) for shape in PRODUCT_SHAPES]
    for shape, peak in zip(PRODUCT_SHAPES, peaks, strict=True):
        print(f"float32 product of {' x '.join(map(str, shape))}: {peak:.0f} GFLOP/s")
    return peaks[0]


def time_programs(programs, optimizer, n_rounds, n_epochs):
    """Returns the seconds of all epochs, {program: (n_rounds, n_epochs)}; each round starts with another."""
    rounds = {name: [] for name in programs}
    for n in range(n_rounds):
        first = n % len(programs)
        for name in programs[first:] + programs[:first]:
            result = measure(name, n_epochs, optimizer=optimizer, dim_z=2)
            rounds[name].append(result["seconds"])
    return rounds


def compare(programs, n_rounds, n_epochs):
    """Times all programs in turn, for both optimizers, and prints the table."""
    run_main.start_tensorflow(run_main.parse_flags([]))
    peak = print_peaks()
    operations = multiply_adds(dim_z=2)
    n_steps = mnist_data.N_TRAIN // BATCH_SIZE
    print(f"a step at dim_z 2 takes {operations / 1e6:.2f} million multiply-adds per image\n")
    print("optimizer program  seconds per epoch, median (range)  images/s  of peak  ours / this, by round")
    for optimizer in ("sgd", "adam"):
        rounds = time_programs(programs, optimizer, n_rounds, n_epochs)
        our_medians = np.median(rounds["ours"], axis=1)
        if optimizer == "sgd":
            ratio = np.median(our_medians) / n_steps / step_products()
            print(f"a step takes {ratio:.2f} of the time of its products, as XLA compiles them")
        for name, seconds in rounds.items():
            images_per_second = n_steps * BATCH_SIZE / np.median(seconds)
            share_of_peak = 2 * operations * images_per_second / 1e9 / peak
            times = f"{optimizer:9} {name:7}  {spread(np.ravel(seconds)):32}"
            speed = f"{images_per_second:9,.0f} {share_of_peak:8.0%}"
            ratios = spread(our_medians / np.median(seconds, axis=1))
            goal = f", goal {GOALS[name]}" if name in GOALS else ""
            print(f"{times} {speed}  {ratios}{goal}", flush=True)


# A program that runs another: a child's peak memory begins with its parent's, which has to be small.
RUN_AND_MEASURE = """
import json, resource, subprocess, sys, time

start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([seconds, megabytes]))
"""


def run_and_measure(*arguments):
    """Runs Python with arguments; returns its seconds from start to end and its peak memory in megabytes."""
    command = [sys.executable, "-c", RUN_AND_MEASURE, sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": conftest.environment()}
    return json.loads(subprocess.run(command, check=True, **pipes).stdout)


def whole_commands(n_rounds):
    """Compares whole commands, from start to end, with `import tensorflow` and epochs of the same minutes."""
    print("\nwhole commands of the default flags, ratio by round")
    training_ratios = []
    generating_ratios = []
    memory_ratios = []
    program = (ROOT / "run_main.py", f"--data_dir={ROOT / 'data'}")
    for _ in range(n_rounds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            import_seconds, import_megabytes = run_and_measure("-c", "import tensorflow")
            seconds, megabytes = run_and_measure(*program, f"--results_path={run}")
            generating_seconds, _ = run_and_measure(*program, f"--load={run}", "--n_generate=1000")
            epoch_seconds = np.median([row["seconds"] for row in conftest.read_log(run)])
        training_ratios.append(seconds / (import_seconds + 21 * epoch_seconds))
        generating_ratios.append(generating_seconds / import_seconds)
        memory_ratios.append(megabytes / import_megabytes)
    print(f"20 epochs: seconds, to those of the import and of 21 median epochs  {spread(training_ratios)}")
    print(f"--load RUN --n_generate 1000: seconds, to those of the import  {spread(generating_ratios)}")
    print(f"20 epochs: peak memory, to that of the import  {spread(memory_ratios)}", flush=True)


def time_to_result(dim_z, folder):
    """Runs the program as a user does; returns its log, and the seconds to its first line and to its end."""
    command = [sys.executable, str(ROOT / "run_main.py"), "--data_dir", str(ROOT / "data")]
    command += ["--dim_z", str(dim_z), "--results_path", str(folder)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": conftest.environment()}
    start = time.perf_counter()
    with subprocess.Popen(command, **pipes) as run:
        run.stdout.readline()
        first_line = time.perf_counter() - start
        run.communicate()
    total = time.perf_counter() - start
    assert run.returncode == 0
    return conftest.read_log(folder), first_line, total


def epochs_to_reach(elbo, log):
    """Returns after how many epochs the validation ELBO exceeds a number, None if it never does."""
    for n_epochs, row in enumerate(log, 1):
        if row["valid_elbo"] > elbo:
            return n_epochs
    return None


def time_to_quality(n_rounds, with_jax):
    """Says when our default run is as good as the example's recipe after 20 epochs, and what that took."""
    for dim_z, elbo in RECIPE_ELBO.items():
        print(f"\npython run_main.py --dim_z {dim_z}, and 20 epochs of the example's recipe in JAX, in turn")
        ratios = []
        for _ in range(n_rounds):
            with tempfile.TemporaryDirectory() as folder:
                log, first_line, total = time_to_result(dim_z, Path(folder) / "run")
            training = sum(row["seconds"] for row in log)
            print(f"  first line after {first_line:.2f} s, end after {total:.1f} s: ", end="")
            print(f"{total / training:.2f} of the {training:.1f} s of its epochs")
            n_epochs = epochs_to_reach(elbo, log)
            if n_epochs is None:
                print(f"  validation ELBO never above {elbo}")
                continue
            seconds = sum(row["seconds"] for row in log[:n_epochs])
            print(f"  validation ELBO above {elbo} after {n_epochs} epochs, {seconds:.1f} s", flush=True)
            if with_jax:
                recipe = 20 * np.median(measure("jax", 3, optimizer="adam", dim_z=dim_z)["seconds"])
                ratios.append(seconds / recipe)
                print(f"  {ratios[-1]:.2f} of the {recipe:.1f} s of the recipe", flush=True)
        if ratios:
            print(f"  median {np.median(ratios):.2f}")


# The flags that change the data of a step or the number of steps, as settings of `measure`.
DATA_SETTINGS = {
    "default": {},
    "add_noise": {"add_noise": True},
    "binarize": {"binarize": True},
    "augment": {"augmented": True},
}


def data_flags(n_rounds, n_epochs):
    """Says what noise, binarized pixels and copies of the digits cost, measured in turn."""
    print("\nsgd, dim_z 2  seconds per image, ratio to those of the default, by round")
    rounds = {name: [] for name in DATA_SETTINGS}
    copying = []
    for _ in range(n_rounds):
        for name, setting in DATA_SETTINGS.items():
            result = measure("ours", n_epochs, optimizer="sgd", dim_z=2, **setting)
            rounds[name].append(np.median(result["seconds"]) / result["n_images"])
            if name == "augment":
                copying.append(result["copying"])
    for name, seconds in rounds.items():
        if name != "default":
            print(f"{name:12}  {spread(np.divide(seconds, rounds['default']))}", flush=True)
    print(f"making the copies of --augment: {spread(copying)} s")


SIZES = {
    "n_hidden": (250, 500, 1000, 2000),
    "batch_size": (64, 128, 512, 2048),
    "augmented": (False, True),
}


def growth():
    """Says how our seconds per epoch and memory grow with the network, the mini-batch and the images."""
    print("\nsgd, dim_z 2       seconds per epoch  images/s  megabytes above the imports")
    for name, values in SIZES.items():
        for value in values:
            result = measure("ours", 2, optimizer="sgd", dim_z=2, **{name: value})
            seconds = np.median(result["seconds"])
            images_per_second = result["n_images"] / seconds
            columns = f"{seconds:18.2f} {images_per_second:9,.0f} {result['megabytes']:10.0f}"
            print(f"{name:10} {value!s:>7} {columns}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times that each program is run (default: 5)")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs per run (default: 3)")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # how it starts itself for one program
    arguments = parser.parse_args()
    if arguments.work:
        return work(*json.loads(arguments.work))
    mnist_data.load_mnist(ROOT / "data")
    programs = ["ours", *installed_peers()]
    for name in sorted(set(PEERS) - set(programs)):
        print(f"{name} is left out: pip install {' '.join(PEERS[name])}")
    print(f"{len(os.sched_getaffinity(0))} cores; {', '.join(programs)}")
    compare(programs, arguments.rounds, arguments.epochs)
    time_to_quality(min(3, arguments.rounds), "jax" in programs)
    whole_commands(min(3, arguments.rounds))
    data_flags(arguments.rounds, arguments.epochs)
    growth()


if __name__ == "__main__":
    main()
