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
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402

import mnist_data  # noqa: E402
import run_main  # noqa: E402

PEERS = {"jax": ("jax", "optax"), "torch": ("torch",), "keras": ("keras",)}
GOALS = {"jax": 0.85, "torch": 0.5, "keras": 0.8}

BATCH_SIZE = 128
# The example's recipe after 20 epochs of 60,000 images, by dim_z: its ELBO on the test digits.
RECIPE_ELBO = {2: -145.3, 20: -104.7}


def ours(images, n_epochs, report, **setting):
    """Our own training code on images (n, 784) uint8; reports the loss of every epoch, nats per image."""
    setting["num_epochs"] = n_epochs
    flags = run_main.parse_flags([f"--{name}={value}" for name, value in setting.items()])
    strategy, digits = run_main.tf.distribute.get_strategy(), SimpleNamespace(train_images=images)
    digits.train_labels = np.zeros(len(images), np.int32)
    train_epoch = run_main.compile_training(strategy, run_main.build(digits, flags), digits, flags)
    for epoch in range(1, n_epochs + 1):
        report(sum(train_epoch(epoch)))


def installed_peers():
    return [name for name, modules in PEERS.items() if all(map(importlib.util.find_spec, modules))]


def program(name):
    """Returns the function that trains in one of the programs."""
    return ours if name == "ours" else importlib.import_module(f"peers.{name}_vae").train


def peak_memory():
    """Returns the most megabytes of memory that this process had at any time."""
    # Not getrusage: a child's peak starts there at what its parent had.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def work(name, n_epochs, augmented, setting):
    """What a process of one program does: prints its seconds per epoch, without the first, and its memory."""
    if name == "ours":
        run_main.load_tensorflow(run_main.parse_flags([]))
    before = peak_memory()
    images = mnist_data.load_mnist(ROOT / "data").train_images
    start = time.perf_counter()
    images = mnist_data.augment(images, 0) if augmented else images
    copying = time.perf_counter() - start
    losses, times = [], []

    def report(loss):
        losses.append(loss)
        times.append(time.perf_counter())

    program(name)(images, 1 + n_epochs, report, **setting)  # the first epoch compiles
    assert np.isfinite(losses).all() and losses[-1] < losses[0], f"{name} does not learn: {losses}"
    batch_size = setting.get("batch_size", BATCH_SIZE)
    result = {
        "seconds": np.diff(times).tolist(),
        "n_images": len(images) // batch_size * batch_size,
        "megabytes": peak_memory() - before,
        "copying": copying,
    }
    print(json.dumps(result))


def measure(name, n_epochs, augmented=False, **setting):
    """Returns the seconds of epochs, their images and the memory of a program, in a process of its own."""
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
    a, b = rng.random((m, k), np.float32), rng.random((k, n), np.float32)
    a_and_b = [run_main.tf.constant(matrix) for matrix in (a, b)]
    compiled = run_main.tf.function(run_main.tf.matmul, jit_compile=True)
    compiled(*a_and_b)
    times = []
    for _ in range(max(20, int(2e10 / (m * k * n)))):
        for product in (lambda: a @ b, lambda: compiled(*a_and_b)):
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)
    return 2 * m * k * n / min(times) / 1e9


def step_products(dim_z=2, n_hidden=500):
    """Returns the seconds that a step's matrix products take alone, as XLA compiles them."""
    tf = run_main.tf
    sizes = [(784, n_hidden), (n_hidden, n_hidden), (n_hidden, 2 * dim_z)]
    sizes += [(dim_z, n_hidden), (n_hidden, n_hidden), (n_hidden, 784)]
    layers = [
        [tf.random.stateless_normal(shape, (0, i)) for shape in ((BATCH_SIZE, n), (n, m), (BATCH_SIZE, m))]
        for i, (n, m) in enumerate(sizes)
    ]

    @tf.function(jit_compile=True)
    def products():
        forwards = [x @ weights for x, weights, _ in layers]
        backwards = [tf.matmul(gradient, weights, transpose_b=True) for _, weights, gradient in layers[1:]]
        return forwards, backwards, [tf.matmul(x, gradient, transpose_a=True) for x, _, gradient in layers]

    products()
    times = []
    for _ in range(1_000):
        start = time.perf_counter()
        products()
        times.append(time.perf_counter() - start)
    return np.median(times)


def spread(numbers):
    return f"{np.median(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"


def compare(programs, n_rounds, n_epochs):
    """Times all programs in turn, for both optimizers, and prints the table."""
    run_main.load_tensorflow(run_main.parse_flags([]))
    shapes = [(2048, 2048, 2048), (128, 784, 500), (128, 500, 500), (128, 500, 784), (784, 128, 500)]
    peaks = [product_peak(*shape) for shape in shapes]
    for shape, peak in zip(shapes, peaks, strict=True):
        print(f"float32 product of {' x '.join(map(str, shape))}: {peak:.0f} GFLOP/s")
    operations = multiply_adds(dim_z=2)
    print(f"a step at dim_z 2 takes {operations / 1e6:.2f} million multiply-adds per image\n")
    print("optimizer program  seconds per epoch, median (range)  images/s  of peak  ours / this, by round")
    for optimizer in ("sgd", "adam"):
        rounds = {name: [] for name in programs}
        for n in range(n_rounds):
            for name in programs[n % len(programs) :] + programs[: n % len(programs)]:
                rounds[name].append(measure(name, n_epochs, optimizer=optimizer, dim_z=2)["seconds"])
        own = np.median(rounds["ours"], axis=1)
        if optimizer == "sgd":
            share = np.median(own) / (mnist_data.N_TRAIN // BATCH_SIZE) / step_products()
            print(f"a step takes {share:.2f} of the time of its products, as XLA compiles them")
        for name in programs:
            rate = mnist_data.N_TRAIN // BATCH_SIZE * BATCH_SIZE / np.median(rounds[name])
            pairs = spread(own / np.median(rounds[name], axis=1))
            goal = f", goal {GOALS[name]}" if name in GOALS else ""
            share = 2 * operations * rate / peaks[0] / 1e9
            seconds = f"{optimizer:9} {name:7}  {spread(np.concatenate(rounds[name])):32}"
            print(f"{seconds} {rate:9,.0f} {share:8.0%}  {pairs}{goal}", flush=True)


def whole(*command):
    """Runs a Python program; returns its seconds from start to end and the most megabytes that it had."""
    # Started by a small program: a child's peak begins with what its parent had.
    code = "import json, resource, subprocess, sys, time; start = time.perf_counter(); "
    code += "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    code += "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024; "
    code += "print(json.dumps([time.perf_counter() - start, peak]))"
    command = [sys.executable, "-c", code, sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": conftest.environment()}
    return json.loads(subprocess.run(command, check=True, **pipes).stdout)


def whole_commands(n_rounds):
    """Compares whole commands, from start to end, with `import tensorflow` and epochs of the same minutes."""
    print("\nwhole commands of the default flags, ratio by round")
    rounds = {
        "20 epochs: seconds, to those of the import and of 21 median epochs": [],
        "--load RUN --n_generate 1000: seconds, to those of the import": [],
        "20 epochs: peak memory, to that of the import": [],
    }
    for _ in range(n_rounds):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            program = (ROOT / "run_main.py", f"--data_dir={ROOT / 'data'}")
            idle, idle_memory = whole("-c", "import tensorflow")
            total, memory = whole(*program, f"--results_path={run}")
            new, _ = whole(*program, f"--load={run}", "--n_generate=1000")
            seconds = np.median([row["seconds"] for row in conftest.read_log(run)])
        ratios = total / (idle + 21 * seconds), new / idle, memory / idle_memory
        for found, ratio in zip(rounds.values(), ratios, strict=True):
            found.append(ratio)
    for name, found in rounds.items():
        print(f"{name}  {spread(found)}", flush=True)


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
            epochs = next((n for n, row in enumerate(log, 1) if row["valid_elbo"] > elbo), None)
            if epochs is None:
                print(f"  validation ELBO never above {elbo}")
                continue
            seconds = sum(row["seconds"] for row in log[:epochs])
            print(f"  validation ELBO above {elbo} after {epochs} epochs, {seconds:.1f} s", flush=True)
            if with_jax:
                recipe = 20 * np.median(measure("jax", 3, optimizer="adam", dim_z=dim_z)["seconds"])
                ratios.append(seconds / recipe)
                print(f"  {ratios[-1]:.2f} of the {recipe:.1f} s of the recipe", flush=True)
        if ratios:
            print(f"  median {np.median(ratios):.2f}")


def switches(n_rounds, n_epochs):
    """Says what noise, binarized pixels and copies of the digits cost, measured in turn."""
    print("\nsgd, dim_z 2  seconds per image, ratio to those of the default, by round")
    settings = {"default": {}, "add_noise": {"add_noise": True}, "binarize": {"binarize": True}}
    settings["augment"] = {"augmented": True}
    rounds, copying = {name: [] for name in settings}, []
    for name in [*settings] * n_rounds:
        result = measure("ours", n_epochs, optimizer="sgd", dim_z=2, **settings[name])
        rounds[name].append(np.median(result["seconds"]) / result["n_images"])
        copying += [result["copying"]] if name == "augment" else []
    for name in [*rounds][1:]:
        print(f"{name:12}  {spread(np.divide(rounds[name], rounds['default']))}", flush=True)
    print(f"making the copies of --augment: {spread(copying)} s")


def growth():
    """Says how our seconds per epoch and memory grow with the network, the mini-batch and the images."""
    print("\nsgd, dim_z 2       seconds per epoch  images/s  megabytes above the imports")
    settings = [{"n_hidden": n} for n in (250, 500, 1000, 2000)]
    settings += [{"batch_size": n} for n in (64, 128, 512, 2048)]
    settings += [{"augmented": augmented} for augmented in (False, True)]
    for setting in settings:
        result = measure("ours", 2, optimizer="sgd", dim_z=2, **setting)
        ((name, value),) = setting.items()
        seconds = np.median(result["seconds"])
        rate = result["n_images"] / seconds
        print(f"{name:10} {value!s:>7} {seconds:18.2f} {rate:9,.0f} {result['megabytes']:10.0f}", flush=True)


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
    switches(arguments.rounds, arguments.epochs)
    growth()


if __name__ == "__main__":
    main()
