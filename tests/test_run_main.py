"""The program: flags, training, what a run leaves behind, and how it ends."""

import csv
import json
import math
import os
import pty
import shutil
import signal
import sys
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats
from scipy.special import logsumexp

import mnist_data
import run_main

run_main.import_tensorflow()

FLAGS = ("--n_hidden", "64", "--batch_size", "500")  # small enough that a real run takes seconds


@pytest.fixture
def without_tensorflow(tmp_path):
    """An environment in which importing TensorFlow fails."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    return {"PYTHONPATH": str(tmp_path / "trap")}


def read_log(folder):
    with (folder / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def few(mnist, n_train, flags):
    """Returns the real MNIST with fewer training and validation digits."""
    some = mnist._replace(train_images=mnist.train_images[:n_train], valid_images=mnist.valid_images[:1_000])
    return run_main.make_digits(some, flags)


# --- flags -------------------------------------------------------------------------------------------


def test_help_answers_without_tensorflow(program, without_tensorflow):
    run = program("--help", env=without_tensorflow)
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    for flag in ("--dim_z", "--PRR_n_img_x", "--plot_manifold_z_range", "--learn_rate"):
        assert flag in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dim_z 0", ["--dim_z", "'0'", "from 1"]),
        ("--dim_z 2.5", ["--dim_z", "'2.5'", "whole number"]),
        ("--n_hidden many", ["--n_hidden", "'many'"]),
        ("--keep_prob 0", ["--keep_prob", "'0'", "greater than 0.001", "at most 1"]),
        ("--keep_prob 1.1", ["--keep_prob", "'1.1'"]),
        ("--learn_rate nan", ["--learn_rate", "'nan'"]),
        ("--learn_rate 1e400", ["--learn_rate", "'1e400'", "finite"]),
        ("--learn_rate -1", ["--learn_rate", "'-1'"]),
        ("--num_epochs -1", ["--num_epochs", "'-1'"]),
        ("--batch_size 55001", ["--batch_size", "'55001'", "55000"]),
        ("--seed -1", ["--seed", "'-1'", "from 0"]),
        ("--optimizer rmsprop", ["--optimizer", "'rmsprop'", "sgd", "adam"]),
        ("--PMLR Yes", ["--PMLR", "'Yes'", "True"]),
        ("--PMLR True --dim_z 3", ["--PMLR", "--dim_z is 3"]),
        ("--plot_manifold --dim_z 3", ["--PMLR", "--dim_z is 3"]),
        ("--PRR_n_img_x 101 --PRR_n_img_y 100", ["--PRR_n_img_x", "--PRR_n_img_y", "101 times 100", "10000"]),
        ("--PMLR_n_samples 10001", ["--PMLR_n_samples", "10001", "10000"]),
        ("--PMLR_resize_factor 50", ["--PMLR_resize_factor 50.0", "at most 18"]),
        ("--PRR_resize_factor 0.01", ["--PRR_resize_factor 0.01", "0.04"]),
        ("--PMLR_n_img_x 1000 --PMLR_n_img_y 1000 --PMLR_resize_factor 0.1", ["--PMLR_n_img_x", "10000"]),
        ("--noise_level 0.3", ["--noise_level 0.3", "--add_noise"]),
        ("--animate --dim_z 5", ["--animate", "--PMLR", "--dim_z"]),
        ("--animate --PMLR_n_img_x 51", ["--animate", "--PMLR_n_img_x", "50"]),
        ("--add_noise --noise_level 0.001", ["--noise_level", "0.001"]),
        ("--animate --num_epochs 101", ["--animate", "101", "100"]),
        ("--n_importance 0", ["--n_importance", "'0'", "from 1"]),
        ("--n_generate 1e6", ["--n_generate", "'1e6'", "10000000"]),
        ("--load nowhere", ["--load nowhere", "config.json"]),
        ("--load nowhere --resume", ["--load", "--resume"]),
        ("--reconstruct nowhere.png", ["--reconstruct nowhere.png", "No such file"]),
        ("--add_noise --noise_level 1.5", ["--noise_level", "'1.5'"]),
        ("--results_path=", ["--results_path", "folder"]),
        ("--dim", ["--dim"]),
        ("--epochs 3", ["--epochs"]),
    ],
)
def test_wrong_flags_are_one_line_without_tensorflow(program, without_tensorflow, tmp_path, flags, words):
    run = program(*flags.split(), env=without_tensorflow)
    out, err = run.communicate()
    assert (run.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("run_main.py: error: ")
    assert [word for word in words if word not in err] == []
    assert [path.name for path in tmp_path.iterdir()] == ["trap"]  # nothing was loaded, written or downloaded


def test_a_switch_takes_three_forms():
    assert run_main.parse_flags(["--add_noise"]).add_noise is True
    assert run_main.parse_flags(["--add_noise", "True"]).add_noise is True
    assert run_main.parse_flags(["--add_noise", "false"]).add_noise is False
    assert run_main.parse_flags(["--PRR", "False"]).PRR is False


def test_the_examples_commands_are_understood():
    for dim_z, more in (
        (20, "--num_epochs 60"),
        (20, "--add_noise True --num_epochs 40"),
        (2, "--PMLR True"),
    ):
        flags = run_main.parse_flags(["--dim_z", str(dim_z), *more.split()])
        assert (dim_z == 2) == flags.PMLR


def test_long_names_are_the_short_ones():
    long = "--plot_reconstruction False --plot_manifold_n_img_x 7 --plot_reconstruction_resize_factor 2"
    flags = run_main.parse_flags(long.split())
    assert (flags.PRR, flags.PMLR_n_img_x, flags.PRR_resize_factor) == (False, 7, 2.0)


def test_the_rate_is_the_optimizers_own():
    for optimizer, rate in run_main.LEARN_RATE.items():
        assert run_main.parse_flags(["--optimizer", optimizer]).learn_rate == rate
        assert run_main.parse_flags(["--optimizer", optimizer, "--learn_rate", "0.5"]).learn_rate == 0.5


# --- training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", run_main.LEARN_RATE)
def test_training_on_few_digits_lowers_the_loss(mnist, tmp_path, console, optimizer):
    flags = run_main.parse_flags(
        [*FLAGS, "--batch_size", "50", "--num_epochs", "15", "--optimizer", optimizer]
    )
    data = few(mnist, 500, flags)
    strategy, state = conftest.build(data, flags)
    evaluate = run_main.make_evaluate(state.network, flags)
    before = evaluate(data.valid_images, data.valid_seen)["elbo"]
    run_main.train(strategy, state, evaluate, data, flags, tmp_path, console)
    log = read_log(tmp_path)
    assert [row["epoch"] for row in log] == list(range(1, 16))
    assert log[0]["train_elbo"] < log[-1]["train_elbo"] - 15
    assert before < log[-1]["valid_elbo"] - 15
    assert log[-1]["valid_kl"] > 1  # the latent space did not collapse
    for row in log:
        for part in ("train", "valid"):
            total = -(row[f"{part}_reconstruction"] + row[f"{part}_kl"])
            assert row[f"{part}_elbo"] == pytest.approx(total, abs=1e-4)
    rates = [row["learn_rate"] for row in log]
    expected = [flags.learn_rate * (1 + math.cos(math.pi * epoch / 15)) / 2 for epoch in range(15)]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_batches_go_through_every_image_in_an_order_of_the_epoch():
    flags = run_main.parse_flags(["--batch_size", "7"])
    first, again, second = (run_main.shuffled_batches(30, epoch, flags).numpy() for epoch in (1, 1, 2))
    assert first.shape == (4, 7)
    assert len(set(first.ravel())) == 28
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    assert set(range(30)) - set(first.ravel()) != set(range(30)) - set(second.ravel())


def test_cutting_an_epoch_into_pieces_changes_no_bit(mnist):
    """What a step draws depends on seed, epoch and step, not on how many steps are compiled into one call."""
    flags = run_main.parse_flags([*FLAGS, "--add_noise"])
    images = run_main.tf.constant(mnist.train_images[:3_000])
    batches = run_main.shuffled_batches(3_000, 1, flags)

    def weights_after(*pieces):
        strategy, state = conftest.build(mnist, flags)
        train_steps = run_main.make_train_steps(strategy, state.network, state.optimizer, flags)
        for piece in pieces:
            train_steps(images, batches, *map(run_main.tf.constant, (1, *piece)))
        return [weight.numpy() for weight in state.network.weights]

    for whole, cut in zip(weights_after((0, 6)), weights_after((0, 1), (1, 4), (4, 6)), strict=True):
        np.testing.assert_array_equal(whole, cut)


class Recorder:
    """In place of the network: its loss shows what it is called with, its pictures show z."""

    def __init__(self):
        self.trainable_variables = [run_main.tf.Variable(0.0)]

    def negative_elbo(self, x, x_seen, seed, keep_prob=1.0):
        tf = run_main.tf
        nothing = 0 * self.trainable_variables[0]
        return tf.reduce_mean(x, axis=1) + nothing, tf.reduce_mean(x_seen, axis=1) + 1_000 * keep_prob

    def gaussian_encoder(self, x):
        return x[:, :2] * 0, None

    def bernoulli_decoder(self, z):
        """The left half of an image is as bright as the first latent number, the right as the second."""
        tf = run_main.tf
        return tf.reshape(tf.repeat(tf.repeat(z, 14, axis=1)[:, None], 28, axis=1), (-1, 784))


@pytest.mark.parametrize("noise", [False, True])
def test_training_and_evaluation_show_the_network_what_they_should(mnist, noise):
    """The clean image to reconstruct, the noisy one to see, and dropout in training alone."""
    flags = run_main.parse_flags([*FLAGS, "--keep_prob", "0.8", f"--add_noise={noise}"])
    flags.noise_level = 1.0
    images = mnist.train_images[:1_000]
    clean, expected_seen = images.mean() / 255, 0.5 if noise else images.mean() / 255
    network = Recorder()
    optimizer = run_main.make_optimizer(flags, 2, network.trainable_variables)
    strategy = run_main.tf.distribute.get_strategy()
    train_steps = run_main.make_train_steps(strategy, network, optimizer, flags)
    batches = run_main.shuffled_batches(1_000, 1, flags)
    arguments = map(run_main.tf.constant, (1, 0, 2))
    x, x_seen = train_steps(run_main.tf.constant(images), batches, *arguments).numpy() / 2
    assert x == pytest.approx(clean, rel=1e-3)
    assert x_seen - 800 == pytest.approx(expected_seen, abs=0.01)
    terms = run_main.make_evaluate(network, flags)(images, images[::-1] if noise else images)
    assert terms["reconstruction"] == pytest.approx(clean, rel=1e-3)
    assert terms["kl"] - 1_000 == pytest.approx(clean, abs=0.01)
    assert terms["elbo"] == pytest.approx(-(terms["reconstruction"] + terms["kl"]))


def test_the_manifolds_axes_are_the_latent_ones(mnist, tmp_path):
    """z1 grows to the right, z2 upwards."""
    flags = run_main.parse_flags(["--PMLR_n_img_x", "4", "--PMLR_n_img_y", "3"])
    history = [{"train_elbo": -1.0, "valid_elbo": -1.0}]
    state = SimpleNamespace(network=Recorder())
    run_main.draw_pictures(state, run_main.make_digits(mnist, flags), flags, history, tmp_path)
    picture = imread(tmp_path / "manifold.png")[10 : 10 + 3 * 28, 60 : 60 + 4 * 28, 0]
    tiles = picture.reshape(3, 28, 4, 28)
    first, second = tiles[:, 14, :, 7], tiles[:, 14, :, 21]
    assert (np.diff(first, axis=1) > 0.05).all()
    assert (np.diff(first, axis=0) == 0).all()
    assert (np.diff(second, axis=0) < -0.05).all()
    assert (np.diff(second, axis=1) == 0).all()
    assert first[0, -1] == pytest.approx(1 / (1 + math.exp(-2)), abs=0.01)


# --- a run -------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_says(program, data_dir, mnist, tmp_path):
    run = program("--data_dir", data_dir, "--num_epochs", 2, "--seed", 5, *FLAGS)
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    folder = tmp_path / "results" / "run1"
    pictures = [
        "input.png",
        "reconstruction.png",
        "manifold.png",
        "latent_map.png",
        "samples.png",
        "interpolation.png",
        "elbo.png",
    ]
    assert {path.name for path in folder.iterdir()} == {
        *pictures,
        "config.json",
        "log.csv",
        "metrics.json",
        "checkpoint",
    }

    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["n_hidden"] == 64
    assert config["seed"] == 5
    assert config["data_sha256"] == mnist_data.SHA256
    assert set(config["versions"]) >= {"python", "tensorflow", "numpy"}

    columns = "epoch,train_elbo,train_reconstruction,train_kl,valid_elbo,valid_reconstruction,valid_kl"
    assert (folder / "log.csv").read_text().splitlines()[0] == f"{columns},learn_rate,seconds"
    log = read_log(folder)
    assert len(log) == 2
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_elbo"] == pytest.approx(-(metrics["test_reconstruction"] + metrics["test_kl"]))
    assert abs(metrics["test_elbo"] - log[-1]["valid_elbo"]) < 5

    lines = out.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 2
    for line, row in zip(epochs, log, strict=True):
        for name in ("train_elbo", "train_kl", "valid_elbo", "valid_reconstruction"):
            assert f"{row[name]:.2f}" in line
        assert "left" in line
    assert "\r" not in out  # the bar is for terminals
    assert f"{metrics['test_elbo']:.2f}" in lines[-8]
    assert [line.strip() for line in lines[-7:]] == [f"results/run1/{picture}" for picture in pictures]

    pixels = (255 * imread(folder / "input.png")[..., 0]).round()
    rows = [np.hstack(mnist.test_images[10 * row : 10 * row + 10].reshape(-1, 28, 28)) for row in range(10)]
    np.testing.assert_array_equal(pixels, np.vstack(rows))
    reconstruction = 255 * imread(folder / "reconstruction.png")[..., 0]
    same, transposed = (
        np.corrcoef(reconstruction.ravel(), other.ravel())[0, 1] for other in (pixels, pixels.T)
    )
    assert same > 0.5 > transposed


def test_denoising_run(program, data_dir, tmp_path):
    flags = [
        "--add_noise",
        "True",
        "--noise_level",
        "0.4",
        "--dim_z",
        "5",
        "--num_epochs",
        "1",
        "--results_path",
        "out",
    ]
    run = program("--data_dir", data_dir, *flags, *FLAGS)
    assert run.communicate()[1] == ""
    assert run.returncode == 0
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    every_run = {"input.png", "reconstruction.png", "samples.png", "interpolation.png", "elbo.png"}
    assert pictures == every_run | {"input_noise.png", "denoising.png"}
    names = ("input.png", "input_noise.png", "reconstruction.png", "denoising.png")
    clean, noisy, restored, stacked = (imread(tmp_path / "out" / name)[..., 0] for name in names)
    np.testing.assert_array_equal(stacked[: 3 * 28], np.vstack([clean[:28], noisy[:28], restored[:28]]))
    replaced = noisy != clean
    assert set(np.unique(noisy[replaced])) == {0, 1}
    grey = (clean > 0) & (clean < 1)
    assert replaced[grey].mean() == pytest.approx(0.4, abs=0.02)


def test_pictures_can_be_left_out(program, data_dir, tmp_path):
    run = program("--data_dir", data_dir, *["--PRR", "False", "--PMLR", "False", "--num_epochs", "1"], *FLAGS)
    run.communicate()
    assert {path.name for path in (tmp_path / "results/run1").glob("*.png")} == {
        *("samples.png", "interpolation.png", "elbo.png"),
    }


@pytest.fixture(scope="module")
def trained(mnist, tmp_path_factory):
    """The folder of a small run on binarized digits, and a function that does more with it afterwards."""
    folder = tmp_path_factory.mktemp("trained")
    common = ["--data_dir", str(conftest.ROOT / "data")]
    training = [*FLAGS, "--num_epochs", "3", "--binarize", "--results_path", str(folder)]

    def afterwards(*flags):
        return run_main.main([*common, "--load", str(folder), *map(str, flags)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_main, "fcntl", None)  # folders stay locked until the program ends: here, the tests
        assert run_main.main([*common, *training]) == 0
        yield folder, afterwards


@pytest.fixture
def loaded(trained, mnist):
    """The flags, the network and the binarized data of that run."""
    folder, _ = trained
    flags = run_main.parse_flags(["--load", str(folder), "--n_importance", "5000"])
    data = run_main.make_digits(mnist, flags)
    network = run_main.vae.VAE(2, 64, mnist.train_images.mean(axis=0) / 255, seed=9)
    optimizer = run_main.make_optimizer(flags, 1, network.trainable_variables)
    state = run_main.make_state(network, optimizer)
    run_main.restore_checkpoint(state, folder, conftest.Listener())
    return flags, network, data


def test_log_px_against_integration_on_a_grid(loaded):
    _, network, data = loaded
    images = data.test_images[:20]
    axis, step = np.linspace(-6, 6, 241, retstep=True)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    logits = network.bernoulli_decoder(run_main.tf.constant(z, run_main.tf.float32)).numpy()
    log_px_z = images.astype(float) / 255 @ logits.T - np.logaddexp(0, logits).sum(axis=1)
    log_joint = log_px_z + stats.norm.logpdf(z).sum(axis=1)
    expected = logsumexp(log_joint, axis=1) + 2 * np.log(step)
    # log p(x) does not depend on q(z|x), but how sure its estimate is. After three epochs q(z|x) is too
    # narrow for most digits, which makes the weights' variance infinite; here it is wider.
    network.z_mean_log_var.bias.assign_add([0, 0, 3, 3])
    x = run_main.pixels(images)
    log_px = network.log_marginal_likelihood(x, x, 50_000, [0, 0]).numpy()
    # The estimate of p(x) is a mean of weights with the relative variance E_p(z|x)[p(z|x) / q(z|x)] - 1.
    mean, log_var = (array.numpy()[:, None] for array in network.gaussian_encoder(x))
    log_q = stats.norm(mean, np.exp(log_var / 2)).logpdf(z).sum(axis=2)
    log_posterior = log_joint - expected[:, None]
    variance = np.exp(logsumexp(2 * log_posterior - log_q, axis=1)) * step**2 - 1
    standard_error = np.sqrt(variance / 50_000)
    assert (standard_error < 0.025).all()
    assert (np.abs(log_px - expected) < 5 * standard_error).all()


def test_log_px_rises_from_the_elbo_with_the_draws(loaded):
    flags, network, data = loaded
    images = data.test_images[:1_000]
    elbo = run_main.make_evaluate(network, flags)(images, images)["elbo"]
    log_px = []
    for flags.n_importance in (1, 10, 300):
        log_px.append(run_main.mean_log_px(network, images, images, flags, conftest.Listener()))
    assert log_px[0] == pytest.approx(elbo, abs=0.5)  # two estimates of one thing, 0.1 apart on average
    assert elbo + 0.5 < log_px[1] < log_px[2]


def test_metrics_of_a_loaded_run(trained, loaded):
    folder, afterwards = trained
    flags, network, data = loaded
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics) == {"test_elbo", "test_reconstruction", "test_kl"}
    assert afterwards("--n_importance", 2) == 0
    more = json.loads((folder / "metrics.json").read_text())
    assert {name: more[name] for name in metrics} == metrics
    assert set(more) - set(metrics) == {"test_log_px", "n_importance", "active_units"}
    assert (more["n_importance"], more["active_units"]) == (2, 2)
    flags.n_importance = 2
    images = data.test_images
    log_px = run_main.mean_log_px(network, images, images, flags, conftest.Listener())
    assert more["test_log_px"] == log_px
    (folder / "metrics.json").write_bytes(before[folder / "metrics.json"])
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before  # the same pictures, too


def test_a_loaded_run_can_leave_its_results_elsewhere(trained, tmp_path, capsys):
    folder, afterwards = trained
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    out = tmp_path / "out"
    with pytest.raises(SystemExit):  # the run's numbers and another seed's would stand side by side
        afterwards("--seed", 3)
    assert "--seed 3 is not the run's" in capsys.readouterr().err
    assert afterwards("--results_path", out, "--seed", 3, "--PMLR", "False") == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert {path.name for path in out.glob("*.png")} == {
        *("input.png", "reconstruction.png", "samples.png", "interpolation.png", "elbo.png"),
    }
    flags = json.loads((out / "config.json").read_text())["flags"]
    assert (flags["load"], flags["seed"], flags["n_hidden"]) == (str(folder), 3, 64)
    capsys.readouterr()
    for wrong in (["--load"], ["--resume", "--results_path"]):
        with pytest.raises(SystemExit):
            run_main.main([*wrong, str(out)])
        assert f"{out} has no run that was trained there" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--dim_z 3", "--num_epochs 5", "--add_noise", "--optimizer adam"])
def test_load_refuses_other_flags_of_training(trained, capsys, flags):
    _, afterwards = trained
    with pytest.raises(SystemExit) as exit_:
        afterwards(*flags.split())
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), flags.split()[0] in err) == (1, True)


def test_a_damaged_run_costs_no_other_run(trained, tmp_path, capsys):
    folder, _ = trained
    for name in ("damaged", "other"):
        shutil.copytree(folder, tmp_path / name)
    for path in (tmp_path / "damaged" / "checkpoint").glob("*.index"):
        path.write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    command = ["--data_dir", str(conftest.ROOT / "data"), "--load", str(tmp_path / "damaged")]
    for where in (
        ["--results_path", str(tmp_path / "other"), "--overwrite"],
        ["--results_path", str(tmp_path / "new")],
    ):
        assert run_main.main([*command, *where]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert list((tmp_path / "new").iterdir()) == []


def test_load_needs_a_finished_epoch(tmp_path, capsys):
    run_main.write_json(tmp_path / "config.json", run_main.configuration(run_main.parse_flags([])))
    with pytest.raises(SystemExit) as exit_:
        run_main.main(["--load", str(tmp_path)])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), "no checkpoint of a finished epoch" in err) == (1, True)


def test_generated_images_are_draws_from_the_network(trained, loaded, monkeypatch, capsys):
    folder, afterwards = trained
    _, network, _ = loaded
    monkeypatch.setattr(run_main, "IMAGES_BLOCK", 3_000)
    assert afterwards("--n_generate", 7_000) == 0
    with np.load(folder / "generated.npz") as arrays:
        assert set(arrays.files) == {"images", "z"}
        images, z = arrays["images"], arrays["z"]
    assert (images.shape, images.dtype, z.shape, z.dtype) == (
        (7_000, 28, 28),
        np.uint8,
        (7_000, 2),
        np.float32,
    )
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert len(np.unique(z, axis=0)) == 7_000  # no block repeats another
    assert set(np.unique(images)) == {0, 255}
    p = run_main.decode(network, z)
    error = (images.reshape(-1, 784) / 255 - p).sum() / np.sqrt((p * (1 - p)).sum())
    assert abs(error) < 5
    likelier = (np.where(images.reshape(-1, 784) > 0, p, 1 - p) > 0.5).mean()
    assert likelier == pytest.approx(np.maximum(p, 1 - p).mean(), abs=0.01)  # each image is of its own z

    before = (folder / "generated.npz").read_bytes()
    assert afterwards("--n_generate", 10) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), "generated.npz" in err, "--overwrite" in err) == (1, True, True)
    assert (folder / "generated.npz").read_bytes() == before
    assert afterwards("--n_generate", 10, "--overwrite") == 0
    with np.load(folder / "generated.npz") as arrays:
        np.testing.assert_array_equal(arrays["z"], z[:10])
    assert (folder / "log.csv").exists()  # --overwrite has removed nothing else
    (folder / "generated.npz").unlink()


def test_grey_networks_generate_their_means(loaded, monkeypatch):
    flags, network, _ = loaded
    flags.binarize, flags.n_generate = False, 50
    arrays = run_main.generate(network, flags, conftest.Listener())
    expected = np.rint(255 * run_main.decode(network, arrays["z"])).reshape(-1, 28, 28)
    np.testing.assert_array_equal(arrays["images"], expected)


def test_own_images_are_reconstructed(trained, loaded, mnist, tmp_path):
    folder, afterwards = trained
    _, network, _ = loaded
    x = mnist.test_images[:13]
    np.save(tmp_path / "mine.npy", x.reshape(-1, 28, 28))
    assert afterwards("--reconstruct", tmp_path / "mine.npy") == 0
    with np.load(folder / "reconstructed.npz") as arrays:
        images, z = arrays["images"], arrays["z"]
    mean, _ = network.gaussian_encoder(run_main.pixels(x))
    np.testing.assert_allclose(z, mean, atol=1e-5)
    assert images.shape == (13, 28, 28)
    assert np.abs(images.reshape(13, 784) - 255 * run_main.decode(network, z)).max() < 0.51
    picture = (255 * imread(folder / "reconstructed.png")[..., 0]).round()
    np.testing.assert_array_equal(picture[:28], np.hstack(x[:10].reshape(-1, 28, 28)))
    np.testing.assert_array_equal(picture[28:56], np.hstack(images[:10]))
    second = picture[56 + run_main.plot_utils.GAP :]
    np.testing.assert_array_equal(second[:28, : 3 * 28], np.hstack(x[10:].reshape(-1, 28, 28)))
    for name in ("reconstructed.npz", "reconstructed.png"):
        (folder / name).unlink()


def test_unusable_images_stop_the_program_before_it_takes_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("mine.npy", np.zeros((3, 14, 14)))
    assert run_main.main(["--reconstruct", "mine.npy"]) == 2
    problem = "has the shape (3, 14, 14); an image has 28 by 28 pixels"
    assert capsys.readouterr().err == f"run_main.py: error: --reconstruct mine.npy {problem}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npy"]


def test_binarized_digits_are_drawn_anew_to_train_and_once_to_test(mnist):
    flags = run_main.parse_flags(["--binarize"])
    images = mnist.train_images[:500]
    first, second = (run_main.shown(images, flags, [0, step]).numpy() for step in (1, 2))
    assert set(np.unique(first)) == {0, 1}
    assert 0.01 < (first != second).mean() < 0.1
    assert first.mean() == pytest.approx(images.mean() / 255, rel=0.02)
    data, again = (run_main.make_digits(mnist, flags) for _ in range(2))
    flags.seed = 1
    other = run_main.make_digits(mnist, flags)
    assert data.train_images is mnist.train_images
    for name in ("valid_images", "test_images"):
        drawn, grey = getattr(data, name), getattr(mnist, name)
        assert drawn.dtype == np.uint8
        assert set(np.unique(drawn)) == {0, 255}
        assert (drawn[grey == 255] == 255).all()
        assert (drawn[grey == 0] == 0).all()
        assert drawn.mean() == pytest.approx(grey.mean(), rel=0.01)
        np.testing.assert_array_equal(drawn, getattr(again, name))
        np.testing.assert_array_equal(drawn, getattr(data, name.replace("images", "seen")))
        assert (drawn != getattr(other, name)).mean() > 0.01


def test_peak_signal_to_noise():
    clean = np.zeros((2, 784))
    assert run_main.peak_signal_to_noise(clean + 0.1, clean) == pytest.approx(20)
    assert run_main.peak_signal_to_noise(clean + np.array([[1], [0]]), clean) == pytest.approx(
        3.0103, abs=1e-4
    )


def test_metrics_of_denoising(mnist):
    """A network that answers with a grey of 1/2, whatever it sees."""
    flags = run_main.parse_flags(["--add_noise", "--noise_level", "0.4"])
    network = run_main.vae.VAE(2, 20, np.full(784, 0.5), seed=0)
    network.x_logits.kernel.assign(run_main.tf.zeros((20, 784)))
    evaluate = run_main.make_evaluate(network, flags)
    data = run_main.make_digits(mnist, flags)
    metrics = run_main.make_metrics(network, evaluate, data, flags, conftest.Listener())
    clean = mnist.test_images / 255
    noisy = 0.2 * np.mean(clean**2) + 0.2 * np.mean((1 - clean) ** 2)
    assert metrics["psnr_noisy"] == pytest.approx(-10 * math.log10(noisy), abs=0.02)
    assert metrics["psnr_restored"] == pytest.approx(-10 * math.log10(np.mean((0.5 - clean) ** 2)), abs=1e-4)


def test_a_folder_that_holds_a_run_is_refused_and_kept(program, data_dir, tmp_path):
    (tmp_path / "out").mkdir()
    run_main.write_json(tmp_path / "out" / "config.json", run_main.configuration(run_main.parse_flags([])))
    content = (tmp_path / "out" / "config.json").read_text()
    run = program("--data_dir", data_dir, "--results_path", "out")
    out, err = run.communicate()
    assert (run.returncode, out) == (2, "")
    assert err.count("\n") == 1
    assert "--results_path" in err
    assert "--resume" in err
    assert (tmp_path / "out" / "config.json").read_text() == content


def test_results_that_cannot_be_written_are_an_error_before_the_data(program, tmp_path):
    (tmp_path / "file").write_text("in the way")
    run = program("--data_dir", "nowhere", "--results_path", "file/out")
    out, err = run.communicate()
    assert (run.returncode, out) == (2, "")
    assert "--results_path" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_file_with_a_results_name_is_refused_and_kept(program, data_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "input.png").write_text("mine")
    run = program("--data_dir", data_dir, "--results_path", "out")
    _, err = run.communicate()
    assert run.returncode == 2
    assert "input.png" in err
    assert (tmp_path / "out" / "input.png").read_text() == "mine"


def test_numbered_folders_are_taken_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "run2").mkdir(parents=True)
    flags = run_main.parse_flags([])
    folders = [str(run_main.take_folder(flags)) for _ in range(3)]
    assert folders == ["results/run1", "results/run3", "results/run4"]


def test_missing_packages_are_one_line_and_take_no_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_main, "PACKAGES", ("numpy", "no_such_package"))
    assert run_main.main([]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no_such_package" in err
    assert "numpy" not in err
    assert list(tmp_path.iterdir()) == []


def test_missing_data_are_one_error_and_leave_no_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist_data, "MIRRORS", ("http://127.0.0.1:1/",))
    monkeypatch.setattr(run_main, "PACKAGES", ())  # they are looked for as pip is
    monkeypatch.setattr(mnist_data.importlib.util, "find_spec", lambda name: None)
    assert run_main.main([]) == 1
    assert "http://127.0.0.1:1/" in capsys.readouterr().err
    assert list((tmp_path / "results").iterdir()) == []


def test_numbers_lost_in_a_later_epoch_leave_the_good_ones(mnist, tmp_path, console, monkeypatch):
    flags = run_main.parse_flags([*FLAGS, "--num_epochs", "3"])
    data = few(mnist, 1_000, flags)
    strategy, state = conftest.build(data, flags)
    real, good = run_main.make_train_steps, {}

    def failing(*arguments):
        sound = real(*arguments)

        def train_steps(images, batches, epoch, first, last):
            if epoch == 2:
                good.update({path: path.read_bytes() for path in tmp_path.rglob("*.*")})
                return run_main.tf.constant([math.nan, 1.0])
            return sound(images, batches, epoch, first, last)

        return train_steps

    monkeypatch.setattr(run_main, "make_train_steps", failing)
    evaluate = run_main.make_evaluate(state.network, flags)
    with pytest.raises(run_main.UserError, match="epoch 2"):
        run_main.train(strategy, state, evaluate, data, flags, tmp_path, console)
    assert len(good) == 10
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == good


@pytest.mark.parametrize("optimizer", run_main.LEARN_RATE)
def test_training_that_leaves_the_numbers_stops_at_once(program, data_dir, tmp_path, optimizer):
    flags = ["--learn_rate", "1e30", "--optimizer", optimizer, "--results_path", "out", *FLAGS]
    run = program("--data_dir", data_dir, *flags)
    _, err = run.communicate()
    assert run.returncode == 1
    assert err.count("\n") == 1
    assert "epoch 1" in err
    assert "--learn_rate" in err
    assert list((tmp_path / "out").glob("*.png")) == []


def test_ctrl_c_ends_in_order(program, data_dir, tmp_path):
    # Where these tests run in the background of a shell, Ctrl-C may be ignored and would be in the program.
    ordinary = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    run = program("--data_dir", data_dir, "--num_epochs", 1_000, *FLAGS, **ordinary)
    for line in run.stdout:
        if line.startswith("epoch    2"):
            run.send_signal(signal.SIGINT)
            break
    out, err = run.communicate()
    assert (run.returncode, err) == (130, "")
    folder = tmp_path / "results" / "run1"
    epochs = len(read_log(folder))
    assert epochs >= 2
    last = out.splitlines()[-1]
    assert f"{epochs} finished epochs" in last
    assert "results/run1" in last
    for picture in folder.glob("*.png"):
        imread(picture)
    assert len(list(folder.glob("*.png"))) == 7
    assert list(folder.glob("*.part")) == []


def test_ctrl_c_while_the_last_epoch_is_written(mnist, tmp_path, console, monkeypatch):
    flags = run_main.parse_flags([*FLAGS, "--num_epochs", "1"])
    data = few(mnist, 1_000, flags)
    strategy, state = conftest.build(data, flags)
    draw = run_main.draw_pictures

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(run_main, "draw_pictures", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    evaluate = run_main.make_evaluate(state.network, flags)
    with pytest.raises(KeyboardInterrupt, match="1 finished"):
        run_main.train(strategy, state, evaluate, data, flags, tmp_path, console)
    assert len(list(tmp_path.glob("*.png"))) == 7
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler


def test_ctrl_c_before_training(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist_data, "load_mnist", interrupted)
    assert run_main.main([]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == "interrupted"
    assert list((tmp_path / "results").iterdir()) == []


def test_a_terminal_has_a_moving_bar(program, data_dir):
    ours, theirs = pty.openpty()
    run = program("--data_dir", data_dir, "--num_epochs", 1, *FLAGS, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            screen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert run.wait() == 0
    bars = [part for part in screen.decode().split("\r\033[K") if part.startswith("epoch 1/1 [")]
    assert len(bars) == run_main.UPDATES_PER_EPOCH
    assert [bar.count("#") for bar in bars] == sorted({bar.count("#") for bar in bars})
    assert "\r\033[Kepoch 1/1  training" in screen.decode()


def test_start_up_chatter_is_held_back_and_errors_are_not(capfd):
    with run_main.quiet_stderr():
        os.write(
            2, b"I0000 00:00:1.2 345 cpu.cc:1] chatter\nE0000 00:00:1.2 345 gpu.cc:1] failed call to cuInit\n"
        )
        os.write(2, b"E0000 00:00:1.2 345 gpu.cc:1] the driver is broken\n")
    assert capfd.readouterr().err == "E0000 00:00:1.2 345 gpu.cc:1] the driver is broken\n"
    with pytest.raises(ImportError), run_main.quiet_stderr():
        os.write(2, b"the cause\n")
        raise ImportError
    print("later", file=sys.stderr)
    assert capfd.readouterr().err == "the cause\nlater\n"
