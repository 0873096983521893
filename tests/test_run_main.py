"""The program: flags, training, what a run leaves behind, and what is done with it afterwards."""

import contextlib
import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SMALL, environment, files, one_line, read_log
from kills import differences, what_is_left
from matplotlib.image import imread
from PIL import Image
from scipy import stats

import mnist_data
import run_main

tf = run_main.tf

EVERY_RUN = {"config.json", "log.csv", "metrics.json", "vae.keras", "checkpoint", "latent.npz"}
EVERY_RUN |= {"samples.png", "interpolation.png", "elbo.png"}
RECONSTRUCTIONS = {"input.png", "reconstruction.png"}
PLANE = {"manifold.png", "latent_map.png", "posterior.png"}


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The folder of a run on grey digits, with what it said in a file beside it."""
    folder = tmp_path_factory.mktemp("grey") / "run"
    with (folder.parent / "said").open("w") as said, contextlib.redirect_stdout(said):
        assert run("--num_epochs=2", "--seed=5", f"--results_path={folder}") == 0
    return folder


@pytest.fixture(scope="module")
def binarized(run, tmp_path_factory):
    """The folder of a run on binarized digits, long enough that its latent space says something."""
    folder = tmp_path_factory.mktemp("binarized") / "run"
    more = ["--num_epochs=30", "--batch_size=50", "--optimizer=adam", "--PRR=False", "--PMLR=False"]
    assert run(*more, "--binarize", f"--results_path={folder}") == 0
    return folder


def load(folder, *more):
    """Returns flags, digits and state of a run, for a test that looks into its network."""
    flags = run_main.parse_flags([f"--load={folder}", *more])
    digits = run_main.make_digits(mnist_data.load_mnist(flags.data_dir), flags)
    state = run_main.build(digits, flags)
    run_main.load_checkpoint(state, folder)
    return flags, digits, state


def pixels(path):
    """Returns the grey levels of a PNG as integers."""
    return np.rint(255 * imread(path)).astype(int)


# --- flags --------------------------------------------------------------------------------------------

WRONG = [  # flags, words of the error
    ("--dim_z 2.5", "--dim_z '2.5' whole"),
    ("--n_hidden many", "--n_hidden 'many'"),
    ("--optimizer rmsprop", "--optimizer 'rmsprop' sgd adam"),
    ("--distribute everywhere", "--distribute 'everywhere' mirrored"),
    ("--PMLR Yes", "--PMLR 'Yes' True"),
    ("--PMLR True --dim_z 3", "--PMLR --dim_z 3"),
    ("--animate --dim_z 5", "--animate --dim_z"),
    ("--animate --num_epochs 101", "--animate --num_epochs 100 or fewer"),
    ("--noise_level 0.3", "--noise_level --add_noise"),
    ("--load nowhere", "nowhere"),
    ("--load nowhere --resume", "nowhere"),
    ("--resume", "--resume --results_path"),
    ("--resume --results_path nowhere", "nowhere"),
    ("--results_path full", "--results_path full"),
    ("--results_path full --overwrite", "--results_path full"),
    ("--results_path full/mine.txt", "full/mine.txt"),
    ("--data_dir full/mine.txt", "--data_dir full/mine.txt"),
    ("--reconstruct nowhere.png", "nowhere.png No such file"),
    ("--reconstruct small.npy", "(3, 14, 14) (28, 28)"),
    ("--distribute multi_worker", "--distribute TF_CONFIG"),
    ("--dim 3", "--dim"),
    ("--epochs 3", "--epochs"),
    ("extra", "extra"),
]

ANSWER = """
import contextlib, io, json, sys
import run_main
answers = {}
for line in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = run_main.main(line.split())
        except BaseException as error:
            status = repr(error)
    answers[line] = status, err.getvalue()
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Status and stderr of all wrong flags, in turn in one process in which TensorFlow cannot be loaded."""
    folder, trap = (tmp_path_factory.mktemp(name) for name in ("answers", "trap"))
    for name in ("tensorflow", "keras", "matplotlib", "scipy"):
        (trap / f"{name}.py").write_text("raise RuntimeError('a large package was loaded')")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("theirs")
    np.save(folder / "small.npy", np.zeros((3, 14, 14)))
    before = files(folder)
    pipes = {"input": json.dumps([line for line, _ in WRONG]), "capture_output": True, "text": True}
    env = environment() | {"PYTHONPATH": f"{trap}:{ROOT}"}
    answer = subprocess.run([sys.executable, "-c", ANSWER], **pipes, check=True, cwd=folder, env=env)
    assert (answer.stderr, files(folder)) == ("", before)
    return json.loads(answer.stdout)


@pytest.mark.parametrize(("line", "words"), WRONG)
def test_a_wrong_flag_is_one_line_without_tensorflow(answers, line, words):
    status, err = answers[line]
    assert status == 2
    assert [word for word in words.split() if word not in one_line(err)] == []


def test_help_and_wrong_flags_of_the_program(program, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('TensorFlow was loaded')")
    runs = [program(*flags, env={"PYTHONPATH": tmp_path}) for flags in (["--help"], ["--dim_z", "0"])]
    (helped, no_error), (nothing, error) = (run.communicate() for run in runs)
    assert [run.returncode for run in runs] == [0, 2]
    assert (no_error, nothing) == ("", "")
    assert "--dim_z" in one_line(error)
    assert [name for name in run_main.WHOSE if f"--{name} " not in helped] == []


def test_help_from_python(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_main.main(["--help"])
    assert "--dim_z" in capsys.readouterr().out


def test_a_switch_takes_three_forms():
    for arguments, value in (
        (["--add_noise"], True),
        (["--add_noise", "True"], True),
        (["--add_noise", "false"], False),
        ([], False),
    ):
        assert run_main.parse_flags(arguments).add_noise is value
    assert run_main.parse_flags(["--PRR", "False"]).PRR is False


def test_the_three_commands_of_the_example():
    for line, dim_z, add_noise, num_epochs, plane in (
        ("--dim_z 20 --num_epochs 60", 20, False, 60, False),
        ("--dim_z 20 --add_noise True --num_epochs 40", 20, True, 40, False),
        ("--dim_z 2 --num_epochs 60 --PMLR True", 2, False, 60, True),
    ):
        flags = run_main.parse_flags(line.split())
        assert (flags.dim_z, flags.add_noise, flags.num_epochs) == (dim_z, add_noise, num_epochs)
        assert flags.PRR
        assert bool(flags.PMLR) is plane


def test_the_learning_rate_is_the_optimizers_own():
    for optimizer, rate in (("sgd", 0.02), ("adam", 0.002)):
        assert run_main.parse_flags(["--optimizer", optimizer]).learn_rate == rate
        assert run_main.parse_flags(["--optimizer", optimizer, "--learn_rate", "0.5"]).learn_rate == 0.5


MODEL_OF = {"n_samples": "--model=iwae", "dim_z_lower": "--model=ladder", "n_labels": "--model=labels"}
LIMITS = {  # flag: below the least, the least, the largest, above it
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
}


def test_the_table_has_every_numeric_flag():
    numeric = {
        name
        for rows in run_main.FLAGS.values()
        for name, kind, *_ in rows
        if not isinstance(kind, tuple) and kind is not run_main.path
    }
    assert numeric == set(LIMITS)


@pytest.mark.parametrize("flag", LIMITS)
def test_bad_numbers_are_one_line(flag):
    below, least, largest, above = LIMITS[flag].split()
    for value in (below, above, "-1", "nan", "inf", "-inf", "1e400", "1_0x", "word", ""):
        with pytest.raises(run_main.UserError) as error:
            run_main.parse_flags(["--add_noise", f"--{flag}={value}"])
        assert [word for word in (f"--{flag}", repr(value)) if word not in str(error.value)] == []
        assert "\n" not in str(error.value)
    for value in (least, largest):
        model = MODEL_OF.get(flag, "--model=vae")
        flags = run_main.parse_flags(["--add_noise", "--PMLR=False", model, f"--{flag}={value}"])
        assert getattr(flags, flag) == float(value)


# --- digits -------------------------------------------------------------------------------------------


def test_digits_are_binarized_and_corrupted_once_and_for_all(few_digits):
    flags = run_main.parse_flags(["--binarize", "--add_noise", "--noise_level=0.4"])
    digits, again = (run_main.make_digits(few_digits, flags) for _ in range(2))
    flags.seed = 1
    other = run_main.make_digits(few_digits, flags)
    assert digits.train_images is few_digits.train_images  # these are drawn anew in every step
    np.testing.assert_array_equal(digits.test_labels, few_digits.test_labels)
    for name in ("valid", "test"):
        grey = getattr(few_digits, f"{name}_images") / 255
        x, x_corrupted = getattr(digits, name)
        assert x.dtype == x_corrupted.dtype == np.float32
        assert set(np.unique(x)) == {0, 1}
        assert (x[grey == 1] == 1).all()
        assert (x[grey == 0] == 0).all()
        assert x.mean() == pytest.approx(grey.mean(), rel=0.01)
        assert (x != x_corrupted).mean() == pytest.approx(0.2, abs=0.005)
        np.testing.assert_array_equal(getattr(digits, name), getattr(again, name))
        assert (x != getattr(other, name)[0]).mean() > 0.01
    assert (digits.valid[1] != digits.test[1]).mean() > 0.1  # other noise


def test_digits_are_as_they_are_without_flags(few_digits):
    x, x_corrupted = run_main.make_digits(few_digits, run_main.parse_flags([])).test
    np.testing.assert_array_equal(x, x_corrupted)
    np.testing.assert_allclose(255 * x, few_digits.test_images, atol=1e-4)


def test_augmented_digits_are_trained_on(few_digits):
    cut = SimpleNamespace(**vars(few_digits) | {"train_images": few_digits.train_images[:20]})
    flags = run_main.parse_flags(["--augment"])
    images = run_main.make_digits(cut, flags).train_images
    np.testing.assert_array_equal(images, mnist_data.augment(cut.train_images, flags.seed))
    assert len(images) == 5 * 20
    np.testing.assert_array_equal(images[:20], cut.train_images)


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", run_main.OPTIMIZERS)
def test_training_on_few_digits_lowers_the_loss(few_digits, optimizer):
    arguments = ["--n_hidden=64", "--batch_size=50", "--num_epochs=15", f"--optimizer={optimizer}"]
    flags = run_main.parse_flags(arguments)
    cut = SimpleNamespace(**vars(few_digits) | {"train_images": few_digits.train_images[:500]})
    digits = run_main.make_digits(cut, flags)
    state = run_main.build(digits, flags)
    before = run_main.evaluate(state.network, *digits.valid, flags).sum()
    run_main.train(tf.distribute.get_strategy(), state, digits, flags, folder=None)
    log = state.history
    assert [row["epoch"] for row in log] == list(range(1, 16))
    assert log[0]["train_elbo"] < log[-1]["train_elbo"] - 15
    assert -before < log[-1]["valid_elbo"] - 15
    assert log[-1]["valid_kl"] > 1  # the latent space did not collapse
    for row in log:
        for part in ("train", "valid"):
            assert row[f"{part}_elbo"] == -(row[f"{part}_reconstruction"] + row[f"{part}_kl"])
    terms = run_main.evaluate(state.network, *digits.valid, flags)
    assert log[-1]["valid_elbo"] == pytest.approx(-terms.sum(), rel=1e-6)
    cosine = [flags.learn_rate * (1 + math.cos(math.pi * epoch / 15)) / 2 for epoch in range(15)]
    assert [row["learn_rate"] for row in log] == pytest.approx(cosine, rel=1e-4)


@pytest.mark.parametrize("kl_weight", [0.0, 3.0])
def test_a_step_descends_the_weighted_loss_and_returns_the_terms(kl_weight):
    weight, flags = tf.Variable(1.0), run_main.parse_flags(["--batch_size=2"])

    def training_terms(x, *, kl_weight):
        return 10 * weight * x, 7 * weight * x  # whose sums over x are 30 and 21

    optimizer = tf.keras.optimizers.SGD(0.1)
    terms = run_main.sgd_step(training_terms, [[1.0, 2.0]], [weight], optimizer, flags, kl_weight=kl_weight)
    np.testing.assert_allclose(terms, [15, 10.5])
    assert float(weight) == pytest.approx(1 - 0.1 * (15 + kl_weight * 10.5))


def train_one_epoch(elbo_terms, train_images, epoch, flags):
    """Returns the mean terms of an epoch with other elbo_terms in place of the network's."""
    weight = tf.Variable(0.0)

    def terms(x, x_corrupted, labels, *, seed, keep_prob, kl_weight):
        return [term + 0 * weight for term in elbo_terms(x, x_corrupted, keep_prob, seed, kl_weight)]

    network = SimpleNamespace(training_terms=terms, trainable_variables=[weight])
    digits = SimpleNamespace(train_images=train_images, train_labels=np.zeros(len(train_images), np.int32))
    state = SimpleNamespace(network=network, optimizer=run_main.make_optimizer(network, digits, flags))
    state.optimizer.iterations.assign((epoch - 1) * (len(train_images) // flags.batch_size))
    return run_main.compile_training(tf.distribute.get_strategy(), state, digits, flags)(epoch)


def test_mini_batches_go_through_every_image_in_an_order_of_the_epoch():
    """The image with the grey level i adds 2^i to the terms, from which one reads which images were taken."""
    images = np.repeat(np.arange(18, dtype=np.uint8)[:, None], 784, axis=1)
    flags = run_main.parse_flags(["--batch_size=4", "--keep_prob=1"])

    def elbo_terms(x, x_corrupted, *_):
        return 2.0 ** tf.round(255 * x[:, 0]), 2.0 ** tf.round(255 * x_corrupted[:, 1])

    taken = []
    for epoch in (1, 1, 2):
        one, other = 16 * train_one_epoch(elbo_terms, images, epoch, flags)
        assert one == other
        taken.append(f"{int(one):018b}")
    first, again, second = taken
    assert first.count("1") == second.count("1") == 16  # 4 batches, none of the images twice
    assert first == again
    assert first != second


def test_random_numbers_and_the_weight_of_the_kl_divergence_follow_the_step(few_digits):
    flags = run_main.parse_flags([*SMALL, "--kl_weight=0.5", "--warm_up=2"])

    def elbo_terms(x, x_corrupted, keep_prob, seed, kl_weight):
        draws = tf.fill([len(x)], tf.random.stateless_uniform((), seed))
        return draws, tf.fill([len(x)], kl_weight)

    found = [train_one_epoch(elbo_terms, few_digits.train_images, epoch, flags) for epoch in (1, 2, 3, 3)]
    draws, weights = np.transpose(found)
    assert len(set(draws[:3])) == 3
    assert draws[2] == draws[3]
    # Of the 4 steps of an epoch: 0, 1, 2 and 3 eighths of 0.5, then 4 to 7, then 8.
    assert weights == pytest.approx([0.5 * 1.5 / 8, 0.5 * 5.5 / 8, 0.5, 0.5])


def test_sgd_has_nesterov_momentum_and_weight_decay_and_clips_each_gradient():
    weights, gradients = [np.array([3.0, -4.0]), np.array([2.0])], [np.array([30.0, 40.0]), np.array([0.5])]
    variables = [tf.keras.Variable(weight, dtype="float32") for weight in weights]
    optimizer, velocities = run_main.clipped_sgd(0.1), [0, 0]
    for _ in range(3):
        optimizer.apply([tf.constant(gradient, tf.float32) for gradient in gradients], variables)
        for i, gradient in enumerate((gradients[0] / 50, gradients[1])):  # the first has norm 50
            velocities[i] = 0.98 * velocities[i] - 0.1 * gradient
            weights[i] = weights[i] * (1 - 0.1 * 0.003) + 0.98 * velocities[i] - 0.1 * gradient
    for weight, variable in zip(weights, variables, strict=True):
        np.testing.assert_allclose(variable, weight, rtol=1e-5)


@pytest.mark.parametrize("noise", [False, True])
def test_training_and_evaluation_give_the_network_what_they_should(few_digits, noise):
    """The clean image as the target, the corrupted one as the input, and dropout in training alone."""
    more = ["--add_noise", "--noise_level=1"] if noise else []
    flags = run_main.parse_flags([*SMALL, "--keep_prob=0.8", *more])
    images = few_digits.train_images
    clean, corrupted = images.mean() / 255, 0.5 if noise else images.mean() / 255

    def elbo_terms(x, x_corrupted, keep_prob, *_):
        return tf.reduce_mean(x, axis=1), tf.reduce_mean(x_corrupted, axis=1) + 1_000 * keep_prob

    # Annealed dropout: 0.2 at the start, 0 at half of the 20 epochs of 4 steps, and then.
    for epoch, dropped in ((1, 0.2 * (1 - 1.5 / 40)), (10, 0.2 * 2.5 / 40), (11, 0), (20, 0)):
        terms = train_one_epoch(elbo_terms, images, epoch, flags)
        assert terms == pytest.approx([clean, 1_000 * (1 - dropped) + corrupted], abs=0.01)
    network = SimpleNamespace(elbo_terms=lambda x, y, *, seed, keep_prob=1: elbo_terms(x, y, keep_prob))
    terms = run_main.evaluate(network, images[:, ::-1] / np.float32(255), np.zeros((2_000, 784)), flags)
    assert terms == pytest.approx([clean, 1_000], abs=0.01)


# --- what a run leaves --------------------------------------------------------------------------------


def test_a_run_leaves_what_it_says(trained, few_digits):
    assert {path.name for path in trained.iterdir()} == EVERY_RUN | RECONSTRUCTIONS | PLANE
    assert {path.name for path in (trained / "checkpoint").iterdir()} == {"epoch-1.npz", "epoch-2.npz"}

    config = json.loads((trained / "config.json").read_text())
    assert set(config["flags"]) == set(run_main.WHOSE)
    assert (config["flags"]["n_hidden"], config["flags"]["seed"]) == (32, 5)
    assert config["flags"]["learn_rate"] == 0.02
    assert config["data_sha256"] == mnist_data.SHA256
    assert config["versions"]["numpy"] == np.__version__
    assert {"python", "tensorflow", "keras", "matplotlib"} <= set(config["versions"])

    columns = "epoch,train_elbo,train_reconstruction,train_kl,valid_elbo,valid_reconstruction,valid_kl"
    assert (trained / "log.csv").read_text().splitlines()[0] == f"{columns},learn_rate,seconds"
    log = read_log(trained)
    assert [row["epoch"] for row in log] == [1, 2]

    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics) == {"test_elbo", "test_reconstruction", "test_kl", "psnr_restored"}
    assert {type(value) for value in metrics.values()} == {float}
    assert metrics["test_elbo"] == -(metrics["test_reconstruction"] + metrics["test_kl"])
    assert metrics["test_elbo"] == pytest.approx(log[-1]["valid_elbo"], abs=5)

    rows = few_digits.test_images[:100].reshape(10, 10, 28, 28)
    np.testing.assert_array_equal(pixels(trained / "input.png"), np.vstack([np.hstack(row) for row in rows]))


def test_a_run_says_what_it_leaves(trained):
    lines = (trained.parent / "said").read_text().splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    for line, row in zip(epochs, read_log(trained), strict=True):
        for name in ("train_elbo", "train_reconstruction", "train_kl", "valid_elbo"):
            assert f"{row[name]:.2f}" in line
    metrics = json.loads((trained / "metrics.json").read_text())
    said = dict(line.split() for line in lines if line.startswith(("test_", "psnr_")))
    assert {name: float(value) for name, value in said.items()} == pytest.approx(metrics, rel=1e-4)
    assert str(trained) in lines[-1]
    assert max(map(len, lines[:-1])) < 80


def test_another_seed_has_other_files(run, trained, tmp_path):
    """That equal runs have equal ones is in test_machine.py."""
    assert run("--num_epochs=2", "--seed=6", f"--results_path={tmp_path / 'other'}") == 0
    one, other = map(what_is_left, (trained, tmp_path / "other"))
    changed = set(differences(one, other))
    pictures = {name for name in one if name.endswith(".png")} - {"input.png"}
    assert pictures | {"log.csv", "metrics.json", "config.json", "vae.keras: model.weights.h5"} <= changed
    assert sum("epoch-2.npz: variable_" in name for name in changed) == 2 * 12  # weights and momenta


def test_numbered_folders_are_taken_once(tmp_path, monkeypatch, few_digits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "run2").mkdir(parents=True)
    flags = run_main.parse_flags([])
    folders = [str(run_main.begin_run(flags, few_digits)) for _ in range(3)]
    assert folders == ["results/run1", "results/run3", "results/run4"]


def test_other_data_are_trained_on_as_they_are_and_stay_the_runs(run, few_digits, tmp_path, capsys):
    """Files of MNIST's names with other content, such as Fashion-MNIST's."""
    images = {"train": few_digits.train_images[:1_200], "t10k": few_digits.test_images}
    (tmp_path / "data").mkdir()
    for part, digits in images.items():
        labels = np.arange(len(digits), dtype=np.uint8) % 10
        for name, array in (("images-idx3", digits.reshape(-1, 28, 28)), ("labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (tmp_path / "data" / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    before = files(tmp_path / "data")
    where = (f"--data_dir={tmp_path / 'data'}", f"--results_path={tmp_path / 'run'}")
    for flags in ("--batch_size=1101", "--PRR_n_img_x=40 --PRR_n_img_y=26"):
        assert run(*where, *flags.split()) == 2
        assert "1,100 and 1,000 digits" in one_line(capsys.readouterr().err)
        assert not (tmp_path / "run").exists()
    assert run(*where, "--batch_size=100", "--num_epochs=1") == 0
    assert "other data than MNIST" in capsys.readouterr().out
    assert files(tmp_path / "data") == before
    sums = json.loads((tmp_path / "run" / "config.json").read_text())["data_sha256"]
    assert sums == {str(name): hashlib.sha256(content).hexdigest() for name, content in before.items()}
    before = files(tmp_path / "run")
    for goes_on in (["--resume", where[1], "--num_epochs=2"], [f"--load={tmp_path / 'run'}"]):
        assert run(*goes_on, f"--data_dir={ROOT / 'data'}") == 2
        assert "other data than the run" in one_line(capsys.readouterr().err)
    assert files(tmp_path / "run") == before


def test_latents_of_the_test_digits_are_kept(trained, few_digits, mnist):
    with np.load(trained / "latent.npz") as arrays:
        mean, log_var, label = (arrays[name] for name in ("mean", "log_var", "label"))
    network = tf.keras.models.load_model(trained / "vae.keras")
    np.testing.assert_allclose(mean, network.encode(few_digits.test_images / 255), atol=1e-4)
    assert log_var.shape == mean.shape == (1_000, 2)
    np.testing.assert_array_equal(label, mnist.test_labels[:1_000])


def test_missing_data_are_one_error_and_leave_no_folder(monkeypatch, tmp_path, capsys):
    def no_package():
        raise OSError("there is no such package")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist_data, "MIRRORS", ("http://127.0.0.1:1/",))
    monkeypatch.setattr(mnist_data, "from_package", no_package)
    assert run_main.main([]) == 2
    out, err = capsys.readouterr()
    assert "http://127.0.0.1:1/" in out
    assert "no such package" in out
    assert "train-images-idx3-ubyte" in one_line(err)
    assert list(tmp_path.iterdir()) == []


# --- afterwards ---------------------------------------------------------------------------------------


def test_load_changes_nothing_in_a_runs_folder_but_adds_metrics(run, trained):
    old = json.loads((trained / "metrics.json").read_text())
    (trained / "metrics.json").write_text(json.dumps(old | {"n_importance": 1, "of this network": 1.0}))
    before = files(trained)
    assert run(f"--load={trained}", "--n_importance=2") == 0
    after = files(trained)
    changed = {str(name) for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"metrics.json"}
    metrics, old = (json.loads(content[run_main.Path("metrics.json")]) for content in (after, before))
    assert metrics.items() >= (old | {"n_importance": 2}).items()
    assert set(metrics) - set(old) == {"test_log_px", "test_log_px_grid", "active_units"}
    assert metrics["n_importance"] == 2
    assert 0 <= metrics["active_units"] <= 2
    del old["of this network"], old["n_importance"]
    (trained / "metrics.json").write_text(json.dumps(old))


def test_load_leaves_its_results_in_another_folder(run, trained, tmp_path, capsys):
    before = files(trained)
    out = tmp_path / "out"
    assert run(f"--load={trained}", f"--results_path={out}", "--seed=3", "--PMLR=False") == 0
    assert files(trained) == before
    assert {path.name for path in out.iterdir()} == (EVERY_RUN | RECONSTRUCTIONS) - {
        "vae.keras",
        "checkpoint",
    }
    assert (out / "log.csv").read_bytes() == (trained / "log.csv").read_bytes()
    assert (out / "input.png").read_bytes() == (trained / "input.png").read_bytes()
    assert (out / "samples.png").read_bytes() != (trained / "samples.png").read_bytes()
    flags = json.loads((out / "config.json").read_text())["flags"]
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
        "--seed 3 --results_path {}",
        "--animate",
        "--learn_rate 0.5",
        "--distribute mirrored",
    ],
)
def test_load_refuses_other_flags_of_the_run(run, trained, tmp_path, capsys, line):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = files(folder)
    assert run(f"--load={folder}", *line.format(folder).split()) == 2
    assert line.split()[0] in one_line(capsys.readouterr().err)
    assert files(folder) == before


def test_another_runs_folder_is_not_written_into_and_the_own_one_is_found(trained, tmp_path, monkeypatch):
    other = shutil.copytree(trained, tmp_path / "other")
    with pytest.raises(run_main.UserError, match="holds a run"):
        run_main.parse_flags([f"--load={trained}", f"--results_path={other}"])
    monkeypatch.chdir(trained.parent)
    flags = run_main.parse_flags([f"--load={trained}", f"--results_path={trained.name}", "--overwrite"])
    assert flags.results_path == flags.load == trained


def test_what_a_run_recorded_counts_or_not(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["flags"] |= {"n_importance": 7, "n_generate": 8, "PRR_n_img_x": 9}
    (folder / "config.json").write_text(json.dumps(config))
    resumed = run_main.parse_flags(["--resume", f"--results_path={folder}"])
    loaded = run_main.parse_flags([f"--load={folder}"])
    found = [(flags.n_importance, flags.n_generate, flags.PRR_n_img_x) for flags in (resumed, loaded)]
    assert found == [(7, None, 9), (None, None, 9)]
    with pytest.raises(run_main.UserError, match="--animate"):
        run_main.parse_flags(["--resume", f"--results_path={folder}", "--animate"])


def test_log_px_equals_the_elbo_with_one_sample_and_rises(binarized):
    flags, digits, state = load(binarized)
    state.network.log_marginal_likelihood_grid = None  # test_vae has it
    latent, found = state.network.encoder(digits.test[1]), {}
    for flags.n_importance in (1, 50):
        found[flags.n_importance] = run_main.measure(state.network, digits, latent, flags)
    assert found[1]["test_elbo"] == found[50]["test_elbo"]
    assert found[1]["active_units"] == found[50]["active_units"] == 2
    one, two = (state.network.log_weights(*digits.test, 1, seed=[7, i])[0].numpy() for i in range(2))
    error = 5 * float((one - two).std()) / math.sqrt(len(one))  # of two estimates for the same digits
    assert error < 1
    assert found[1]["test_log_px"] == pytest.approx(float(one.mean()), abs=error)
    assert found[1]["test_log_px"] == pytest.approx(found[1]["test_elbo"], abs=error)
    log_px = state.network.log_marginal_likelihood(*digits.test, 50, seed=[7, 2]).numpy()
    assert found[50]["test_log_px"] == pytest.approx(float(log_px.mean()), abs=0.2)
    assert found[1]["test_log_px"] + error < found[50]["test_log_px"]


def test_peak_signal_to_noise(few_digits):
    """Of a network that answers with half of what it gets; and the ELBO is of the clean digits."""
    flags = run_main.parse_flags(["--add_noise", "--noise_level=0.4"])
    digits = run_main.make_digits(few_digits, flags)
    x, x_corrupted = digits.test
    network = SimpleNamespace(
        elbo_terms=lambda x, x_corrupted, seed: np.stack([x.mean(axis=1), x_corrupted.mean(axis=1)]),
        reconstruct=lambda x: x / 2,
        test_metrics=lambda x, labels: {},
    )
    metrics = run_main.measure(network, digits, None, flags)
    noisy = 0.2 * np.mean(x**2) + 0.2 * np.mean((1 - x) ** 2)
    assert metrics["psnr_noisy"] == pytest.approx(-10 * math.log10(noisy), abs=0.05)
    restored = np.mean((x_corrupted / 2 - x) ** 2)
    assert metrics["psnr_restored"] == pytest.approx(-10 * math.log10(restored), abs=1e-3)
    found = metrics["test_reconstruction"], metrics["test_kl"]
    assert found == pytest.approx((x.mean(), x_corrupted.mean()), rel=1e-4)


def test_generated_images_are_draws_of_the_network(run, binarized, capsys):
    assert run(f"--load={binarized}", "--n_generate=12000") == 0
    with np.load(binarized / "generated.npz") as arrays:
        assert set(arrays.files) == {"images", "z"}
        images, z = arrays["images"], arrays["z"]
    assert (images.shape, images.dtype) == ((12_000, 28, 28), np.uint8)
    assert (z.shape, z.dtype) == ((12_000, 2), np.float32)
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert len(np.unique(z, axis=0)) == 12_000  # no batch repeats another
    assert set(np.unique(images)) == {0, 255}
    _, _, state = load(binarized)
    p, black_or_white = state.network.decode(z).numpy(), images.reshape(-1, 784) / 255
    assert abs((black_or_white - p).sum() / np.sqrt((p * (1 - p)).sum())) < 5
    agree = np.where(black_or_white > 0, p, 1 - p).mean()
    assert agree == pytest.approx((p**2 + (1 - p) ** 2).mean(), abs=0.001)  # each image is of its own z

    before = files(binarized)
    capsys.readouterr()
    assert run(f"--load={binarized}", "--n_generate=10") == 2
    err = one_line(capsys.readouterr().err)
    assert [word for word in ("generated.npz", "--overwrite") if word not in err] == []
    assert files(binarized) == before
    assert run(f"--load={binarized}", "--n_generate=10", "--overwrite") == 0
    with np.load(binarized / "generated.npz") as arrays:
        np.testing.assert_array_equal(arrays["z"], z[:10])
    assert set(files(binarized)) == set(before)  # --overwrite has removed nothing else


def test_grey_networks_generate_their_means(trained, tmp_path):
    """New images need no data, and nothing else is drawn anew."""
    found = []
    for seed in (0, 6):
        folder, no_data = tmp_path / f"seed {seed}", f"--data_dir={tmp_path / 'no data'}"
        command = [f"--load={trained}", f"--results_path={folder}", "--n_generate=50", f"--seed={seed}"]
        assert run_main.main([*command, no_data]) == 0
        assert {path.name for path in folder.iterdir()} == {"config.json", "generated.npz"}
        assert run_main.main([*command, no_data]) == 2  # what was made before stays
        with np.load(folder / "generated.npz") as arrays:
            found.append(dict(arrays))
    _, _, state = load(trained)
    expected = np.rint(255 * state.network.decode(found[0]["z"]).numpy()).reshape(-1, 28, 28)
    np.testing.assert_array_equal(found[0]["images"], expected)
    assert (found[0]["z"] != found[1]["z"]).all()
    assert not (tmp_path / "no data").exists()


def test_own_images_are_reconstructed(trained, few_digits, tmp_path, capsys):
    """They need no data either; --n_importance is for them, and nothing else is drawn anew."""
    x = few_digits.test_images[:13]
    (tmp_path / "mine").mkdir()
    np.save(tmp_path / "mine" / "b.npy", x[1:].reshape(-1, 28, 28))
    Image.fromarray(x[0].reshape(28, 28)).save(tmp_path / "mine" / "a.png")
    command = [f"--load={trained}", f"--results_path={tmp_path / 'out'}", "--n_importance=300"]
    command.append(f"--data_dir={tmp_path / 'no data'}")
    assert run_main.main([*command, f"--reconstruct={tmp_path / 'mine'}"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "reconstructed.npz",
        "reconstructed.png",
    }
    with np.load(tmp_path / "out" / "reconstructed.npz") as arrays:
        images, z, elbo, log_px = (arrays[name] for name in ("images", "z", "elbo", "log_px"))
    _, _, state = load(trained)
    assert elbo.shape == log_px.shape == (13,)
    pixels_ = x / np.float32(255)
    draws = -np.sum([state.network.elbo_terms(pixels_, pixels_, seed=[i, 0]) for i in range(100)], axis=1)
    np.testing.assert_allclose(elbo, draws.mean(axis=0), atol=6 * draws.std(axis=0).max())
    assert (log_px > draws.mean(axis=0) - 0.5 * draws.std(axis=0)).all()
    np.testing.assert_allclose(z, state.network.encode(x / 255), atol=1e-5)
    assert images.shape == (13, 28, 28)
    assert np.abs(images.reshape(13, 784) - 255 * state.network.decode(z).numpy()).max() < 0.51
    picture = pixels(tmp_path / "out" / "reconstructed.png")
    np.testing.assert_array_equal(picture[:28], np.hstack(x[:10].reshape(-1, 28, 28)))
    np.testing.assert_array_equal(picture[28:56], np.hstack(images[:10]))


def test_a_notebook_goes_on_with_a_run(trained, capsys):
    """The lines that the README shows."""
    lines = (ROOT / "README.md").read_text().split("From Python, in the folder of this README:\n")[1]
    lines = textwrap.dedent(lines[: lines.index("`state.network`")]).replace("results/run1", str(trained))
    names = {}
    exec(lines, names)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert (names["x"].shape, names["plane"].shape) == ((10, 784), (400, 784))
    shown = pixels(trained / "reconstruction.png")[:28].reshape(28, 10, 28).swapaxes(0, 1)
    np.testing.assert_allclose(255 * names["x"].numpy(), shown.reshape(10, 784), atol=0.51)
    said = capsys.readouterr().out.splitlines()[-1]
    reconstruction, kl = map(float, re.findall(r"[-\d.]+(?:e[-+]\d+)?", said.partition(":")[2]))
    assert -(reconstruction + kl) == pytest.approx(metrics["test_elbo"], abs=10)
    state, digits, flags = (names[name] for name in ("state", "digits", "flags"))
    assert -run_main.evaluate(state.network, *digits.test, flags).sum() > metrics["test_elbo"]


def test_the_readme_has_the_flags_and_their_defaults():
    """Where a default is one value of the table of flags."""
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    rows = [(re.findall(r"`--(\w+)`", names), default.split(", ")) for names, default in rows]
    assert {name for names, _ in rows for name in names} == set(run_main.WHOSE)
    defaults = vars(run_main.make_parser().parse_args([]))
    for names, shown in rows:
        for name, text in zip(names, shown if len(shown) == len(names) else shown * len(names), strict=False):
            if defaults[name] is not None and name != "PMLR_n_samples":
                assert text.removesuffix(".0") == str(defaults[name]).removesuffix(".0"), name
