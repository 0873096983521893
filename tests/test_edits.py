"""Experiments: each edit is made in one place, and all else follows it or refuses with one line.

An edit is a subclass or a patched function or table here. What must follow: training, ELBO, log p(x),
samples, pictures, --resume and --load. Where an edit makes another network, a run of the unedited program has
to be refused.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import conftest
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import stats

import mnist_data
import plot_utils
import run_main
import vae

SMALL = ("--n_hidden=32", "--batch_size=50", "--num_epochs=2", f"--data_dir={conftest.ROOT / 'data'}")
RUN = Path("run")  # in the test's own folder


class Mixture(vae.Prior):
    """Two Gaussians of variance 1 around (1.5, 1.5, ...) and (-1.5, -1.5, ...), equally likely."""

    means = (-1.5, 1.5)

    def log_prob(self, z):
        zeros = tf.zeros_like(z)
        terms = [vae.log_normal(z, zeros + mean, zeros) for mean in self.means]
        return tf.reduce_logsumexp(terms, axis=0) - math.log(2)

    def sample(self, n, dim_z, seed):
        mean = tf.gather(self.means, tf.random.stateless_uniform((n, 1), seed, 0, 2, tf.int32))
        return mean + tf.random.stateless_normal((n, dim_z), tf.random.fold_in(seed, 1))

    def cdf(self, z):
        return np.mean([stats.norm.cdf(z - mean) for mean in self.means], axis=0)


class Gaussian:
    """p(x|z) = N(x; output, 0.1 I)."""

    variance = 0.1

    def log_prob(self, x, output):
        return vae.log_normal(x, output, tf.fill(tf.shape(output), math.log(self.variance)))

    def log_prob_table(self, x, output):
        squares = tf.reduce_sum(x**2, axis=1)[:, None] + tf.reduce_sum(output**2, axis=1)
        squares -= 2 * tf.matmul(x, output, transpose_b=True)
        return -squares / (2 * self.variance) - 392 * math.log(2 * math.pi * self.variance)

    def mean(self, output):
        return output

    def sample(self, output, seed):
        return output + math.sqrt(self.variance) * tf.random.stateless_normal(output.shape, seed)

    def output_bias(self, mean_image):
        return mean_image


@pytest.fixture(scope="module")
def base(small_mnist, tmp_path_factory):
    """The folder of a finished run of the unedited program, which no test may change."""
    folder = tmp_path_factory.mktemp("base") / "run"
    assert run_main.main([*SMALL, f"--results_path={folder}"]) == 0
    return folder


@pytest.fixture(autouse=True)
def own_folder(small_mnist, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    """Runs the program in RUN; returns the numbers it measured."""
    assert run_main.main([f"--results_path={RUN}", *arguments]) == 0
    return run_main.read_json(RUN / "metrics.json")


def load():
    """Returns the state, the digits and the flags of RUN, as --load does."""
    flags = run_main.parse_flags(["--load", RUN])
    digits = run_main.make_digits(mnist_data.load_mnist(flags.data_dir), flags)
    state = run_main.build(digits, flags)
    run_main.load_checkpoint(state, RUN)
    return state, digits, flags


def log(name):
    """Returns a column of log.csv."""
    return [row[name] for row in conftest.read_log(RUN)]


def assert_refused(folder, capsys, *words):
    """A run in another folder is neither loaded nor resumed, nor changed."""
    before = conftest.files(folder)
    for how in (["--load", folder], ["--resume", "--num_epochs=3", "--results_path", folder]):
        capsys.readouterr()
        assert run_main.main(how) == 2
        error = conftest.one_line(capsys.readouterr().err)
        assert all(word in error for word in words), error
    assert conftest.files(folder) == before


def assert_goes_on():
    """The run is resumed and loaded within the edit."""
    metrics = run("--resume", "--num_epochs=3")
    assert log("epoch") == [1, 2, 3]
    loaded = run("--load", RUN, "--n_importance=10")
    assert {name: loaded[name] for name in metrics} == pytest.approx(metrics)
    assert loaded["test_log_px"] > loaded["test_elbo"]


def assert_consistent(network, x):
    """log p(x) with one sample equals the ELBO in the mean, for each digit, and it rises with the samples."""

    @tf.function
    def log_px_minus_elbo(seed):
        log_px = network.log_marginal_likelihood(x, x, 1, seed=seed)
        return log_px + tf.add_n(network.elbo_terms(x, x, seed=seed))

    differences = np.stack([log_px_minus_elbo(tf.constant([0, seed])) for seed in range(50)])
    mean, standard_error = differences.mean(axis=0), differences.std(axis=0) / math.sqrt(len(differences))
    assert abs(mean.mean()) < 4 * mean.std() / math.sqrt(len(x))
    assert np.mean((mean / standard_error) ** 2) == pytest.approx(1, abs=0.3)
    log_px = [np.mean(network.log_marginal_likelihood(x, x, n, seed=[0, 0])) for n in (1, 10, 100)]
    assert log_px == sorted(log_px)
    assert log_px[-1] > log_px[0] + 0.1


def test_another_prior(base, capsys, monkeypatch):
    prior = Mixture()
    monkeypatch.setattr(vae.VAE, "prior", prior)
    run(*SMALL, "--n_generate=2000")
    assert np.all(np.diff(log("train_elbo")) > 0)
    assert {"manifold.png", "latent_map.png", "samples.png"} < {file.name for file in RUN.iterdir()}

    state, digits, flags = load()
    network = state.network
    assert_consistent(network, tf.constant(digits.test[0][:300]))
    with np.load(RUN / "generated.npz") as generated:
        assert stats.kstest(generated["z"].ravel(), prior.cdf).pvalue > 0.001
        assert stats.kstest(generated["z"].ravel(), "norm").pvalue < 1e-6
    z = prior.sample(100, 2, (flags.seed, 0))
    np.testing.assert_array_equal(plot_utils.Scene(state, digits, flags).samples, network.decode(z))
    assert_refused(base, capsys, "epoch-2.npz", "network")


def test_another_likelihood(base, capsys, few_digits, monkeypatch):
    monkeypatch.setattr(vae.VAE, "likelihood", Gaussian())
    mean_image = few_digits.train_images.mean(axis=0) / 255
    np.testing.assert_allclose(vae.VAE(2, 8, mean_image).decoder_output.bias, mean_image, atol=1e-6)
    run(*SMALL, "--n_generate=300")
    assert np.all(np.diff(log("train_elbo")) > 0)

    state, digits, flags = load()
    network, x = state.network, tf.constant(digits.test[0])
    assert_consistent(network, x[:300])
    # The mean is the decoder's output as it is.
    restored = network.decoder(network.encode(x))
    np.testing.assert_array_equal(network.reconstruct(x), restored)
    picture = plot_utils.tile(restored.numpy()[:100], 10, 10)
    np.testing.assert_array_equal(Image.open(RUN / "reconstruction.png"), picture)
    images, z_x, z_y = plot_utils.Scene(state, digits, flags).manifold()
    np.testing.assert_array_equal(images[0], network.decoder(tf.constant([[z_x[0], z_y[0]]], tf.float32))[0])
    with np.load(RUN / "generated.npz") as generated:
        mean = tf.reshape(network.decoder(generated["z"]), (-1, 28, 28))
        np.testing.assert_allclose(generated["images"], 255 * np.clip(mean, 0, 1), atol=0.501)
    flags.binarize, flags.n_generate = True, 300
    run_main.generate(network, flags, RUN)
    with np.load(RUN / "generated.npz") as generated:
        errors = generated["images"] / 255 - mean
    grey = np.abs(mean - 0.5) < 0.1  # half of the draws are cut off neither at 0 nor at 1
    assert np.median(np.abs(errors[grey])) == pytest.approx(0.6745 * math.sqrt(0.1), rel=0.05)
    assert_refused(base, capsys, "epoch-2.npz", "network")


def test_another_noise(few_digits, monkeypatch):
    """Training and evaluation see the same numbers, which are neither rounded nor cut."""

    def gaussian_noise(x, noise_level, seed):
        noise = tf.random.stateless_normal(x.shape, tf.random.fold_in(seed, vae.NOISE))
        return x + noise_level * noise

    monkeypatch.setattr(vae, "salt_and_pepper", gaussian_noise)
    images = few_digits.train_images
    same = {"train_images": images, "valid_images": images, "test_images": images}
    same = SimpleNamespace(**vars(few_digits) | same)
    monkeypatch.setattr(mnist_data, "load_mnist", lambda data_dir: same)
    # With weights that stand still, the KL divergence depends on the encoder's inputs only.
    metrics = run(*SMALL, "--add_noise", "--keep_prob=1", "--learn_rate=1e-12", "--PMLR=False")
    # Its standard error is 2%; of inputs cut to [0, 1] it is a third smaller.
    assert log("train_kl") == pytest.approx(log("valid_kl"), rel=0.1)
    assert log("train_kl")[0] == pytest.approx(metrics["test_kl"], rel=0.1)
    assert metrics["psnr_noisy"] == pytest.approx(-20 * math.log10(0.5), abs=0.02)

    _, digits, flags = load()
    x, x_corrupted = digits.valid
    assert x_corrupted.dtype == np.float32
    assert x_corrupted.min() < -1
    assert x_corrupted.max() > 2
    flags.add_noise = False
    np.testing.assert_array_equal(run_main.prepare(images, flags, [0, 0])[0], x)


class Relu(vae.VAE):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.encoder_hidden[1].activation = keras.activations.relu


class Deeper(vae.VAE):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        layer = keras.layers.Dense(self.n_hidden, "tanh", name="encoder_3")
        layer.build((None, self.n_hidden))
        self.encoder_hidden.append(layer)


def test_another_activation(base, capsys, monkeypatch):
    monkeypatch.setattr(vae, "VAE", Relu)
    assert_refused(base, capsys, "epoch-2.npz", "network")


def test_a_third_hidden_layer(base, capsys, monkeypatch):
    monkeypatch.setattr(vae, "VAE", Deeper)
    run(*SMALL, "--dim_z=3")  # no quadrature, which takes 20 s here
    assert_goes_on()
    assert_refused(base, capsys, "epoch-2.npz", "shapes")


def test_random_streams_of_a_deeper_network(monkeypatch):
    """Each layer's dropout has random numbers of its own, which no other purpose has."""
    streams, dropout = [], vae.dropout

    def recorder(h, keep_prob, seed, stream):
        streams.append(stream)
        return dropout(h, keep_prob, seed, stream)

    monkeypatch.setattr(vae, "dropout", recorder)
    x = np.full((2, 784), 0.5, np.float32)
    Deeper(2, 8).elbo_terms(x, x, seed=[0, 0], keep_prob=0.5)
    assert len(streams) == len(set(streams)) == 5
    purposes = {vae.UPPER_LAYER, vae.IMPORTANCE, vae.BINARIZATION, vae.NOISE, vae.DROPOUT}
    assert set(streams) & purposes == {vae.DROPOUT}


def add_flag(monkeypatch, *row):
    """Adds a row to the table of flags, in place of the one of the same name."""
    for group, rows in run_main.FLAGS.items():
        monkeypatch.setitem(run_main.FLAGS, group, tuple(old for old in rows if old[0] != row[0]))
    monkeypatch.setitem(run_main.FLAGS, "edits", (row,))
    monkeypatch.setitem(run_main.WHOSE, row[0], row[3])


def test_another_optimizer(capsys, monkeypatch):
    class SignSGD(tf.keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            variable.assign_sub(learning_rate * tf.sign(gradient))

    monkeypatch.setitem(run_main.OPTIMIZERS, "sign", (SignSGD, 0.25))
    # The edited script would make the choices from the table.
    add_flag(monkeypatch, "optimizer", tuple(run_main.OPTIMIZERS), "sgd", run_main.OWN, "update rule")
    run(*SMALL, "--optimizer=sign", "--batch_size=2000", "--num_epochs=1")  # one step
    assert log("learn_rate") == [0.25]
    state, digits, flags = load()
    before = run_main.build(digits, flags).network.trainable_variables
    for old, new in zip(before, state.network.trainable_variables, strict=True):
        step = np.abs(new - old)
        assert np.all((step < 1e-6) | (np.abs(step - 0.25) < 1e-6))
        assert step.max() > 0.2
    for name in ("lion", "SIGN"):
        assert run_main.main(["--optimizer", name]) == 2
        error = conftest.one_line(capsys.readouterr().err)
        assert "--optimizer" in error
        assert name in error


def test_another_schedule(monkeypatch):
    def make_optimizer(network, digits, flags):
        n_steps = len(digits.train_images) // flags.batch_size
        rate = tf.keras.optimizers.schedules.ExponentialDecay(flags.learn_rate, n_steps, 0.5)
        optimizer = run_main.OPTIMIZERS[flags.optimizer][0](rate)
        optimizer.build(network.trainable_variables)
        return optimizer

    monkeypatch.setattr(run_main, "make_optimizer", make_optimizer)
    run(*SMALL, "--learn_rate=0.008")
    assert log("learn_rate") == pytest.approx([0.008, 0.004])


def test_a_new_flag_of_the_run(base, capsys, monkeypatch):
    """Free nats: in training, a KL divergence below them costs nothing."""

    def freer_step(training_terms, images, weights, optimizer, flags, **options):
        def terms(*images, **options):
            reconstruction, kl = training_terms(*images, **options)
            return reconstruction, tf.maximum(kl, flags.free_nats)

        return sgd_step(terms, images, weights, optimizer, flags, **options)

    sgd_step = run_main.sgd_step
    with monkeypatch.context() as edit:
        edit.setattr(run_main, "sgd_step", freer_step)
        add_flag(
            edit, "free_nats", run_main.real(0, 100), 0.0, run_main.OWN, "KL divergence that costs nothing"
        )
        run(*SMALL, "--free_nats=30")
        assert log("train_kl")[0] >= 30
        assert run_main.read_json(RUN / "config.json")["flags"]["free_nats"] == 30
        assert run_main.main(["--load", RUN, "--free_nats=1"]) == 2
        assert "--free_nats" in conftest.one_line(capsys.readouterr().err)
        assert_refused(base, capsys, "--free_nats")
    assert_refused(RUN, capsys, "--free_nats")  # by the program without the flag


def test_a_new_picture_with_a_flag(base, monkeypatch):
    """One row in each of two tables: drawn where asked for, loaded, and removed when out of date."""
    add_flag(monkeypatch, "stripe", run_main.switch, False, run_main.KEPT, "draw the first test digits")
    picture = (lambda flags: flags.stripe, lambda scene: plot_utils.png(plot_utils.tile(scene.x[:10], 10, 1)))
    monkeypatch.setitem(plot_utils.PICTURES, "stripe.png", picture)
    stripe = RUN / "stripe.png"
    run("--load", base, "--stripe")  # which was trained before there was such a flag
    assert stripe.exists()
    run("--load", base, "--overwrite")
    assert not stripe.exists()
