"""Experiments: each edit of README's table, made in a copy of the scripts. Everything else follows it.

What must follow: training, ELBO, log p(x), samples, pictures, --resume and --load. Where an edit makes
another network, it must refuse a run of the unedited program in one line.
"""

import csv
import dataclasses
import importlib
import math
import os
import random
import shutil
import sys
from pathlib import Path

import conftest
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy import integrate, stats

import mnist_data
import plot_utils  # noqa: F401
import run_main
import vae  # noqa: F401

SCRIPTS = ("mnist_data", "vae", "plot_utils", "run_main")
RUN = Path("run")  # in the test's own folder

pytestmark = pytest.mark.architecture  # each edit starts from the scripts as they are


# --- Helpers ------------------------------------------------------------------------------------------


class Program:
    """A copy of the scripts. Once its modules are imported, `import` finds them in place of the originals."""

    def __init__(self, folder, data_dir):
        self.folder = folder
        self.data_dir = data_dir
        folder.mkdir()
        for name in SCRIPTS:
            shutil.copy(conftest.ROOT / f"{name}.py", folder)

    def replace(self, file_name, old, new):
        """Replaces a text that occurs once in a file."""
        file = self.folder / file_name
        text = file.read_text()
        assert text.count(old) == 1, f"{file_name} has {text.count(old)} times: {old}"
        file.write_text(text.replace(old, new))

    def insert(self, file_name, code, *, before):
        """Inserts functions or classes before a text that occurs once in a file."""
        self.replace(file_name, before, f"{code.strip()}\n\n\n{before}")

    def start(self):
        """Imports the edited scripts."""
        importlib.invalidate_caches()
        for name in SCRIPTS:
            setattr(self, name, importlib.import_module(name))
            assert Path(getattr(self, name).__file__).parent == self.folder
        self.run_main.import_tensorflow()

    def main(self, *flags):
        """Runs the program in RUN, a new run with a small network; returns its exit status."""
        if "--resume" not in flags and "--load" not in flags:
            flags = [f"--data_dir={self.data_dir}", *SMALL, *flags]
        if "--load" not in flags:
            flags = [f"--results_path={RUN}", *flags]
        return self.run_main.main(flags)

    def run(self, *flags):
        """The same for a run that succeeds; returns the content of metrics.json."""
        assert self.main(*flags) == 0
        return self.run_main.read_json(RUN / "metrics.json")

    def load(self):
        """Returns the network of RUN, its digits and its flags."""
        network, digits = self.run_main.load(RUN)
        return network, digits, self.run_main.parse_flags(["--load", RUN])


# A network whose epochs take a fraction of a second, and without dropout, for half the time to compile.
SMALL = ("--n_hidden=16", "--batch_size=50", "--num_epochs=2", "--keep_prob=1")


@pytest.fixture(scope="module")
def few_data(mnist, tmp_path_factory):
    """A data folder with 2,200 training, 200 validation and 1,000 test digits of the real MNIST."""
    folder = tmp_path_factory.mktemp("few_data")
    train_images = np.concatenate([mnist.valid_images[:200], mnist.train_images[:2_200]])
    train_labels = np.concatenate([mnist.valid_labels[:200], mnist.train_labels[:2_200]])
    write_data(folder, train_images, train_labels, mnist.test_images[:1_000], mnist.test_labels[:1_000])
    return folder


def write_data(folder, train_images, train_labels, test_images, test_labels):
    """Writes images, (n, n_pixels) uint8, and labels, (n,), in MNIST's format."""
    side = math.isqrt(train_images.shape[1])
    contents = {
        mnist_data.TRAIN_IMAGES: train_images.reshape(-1, side, side),
        mnist_data.TRAIN_LABELS: train_labels,
        mnist_data.TEST_IMAGES: test_images.reshape(-1, side, side),
        mnist_data.TEST_LABELS: test_labels,
    }
    for name, array in contents.items():
        (folder / name).write_bytes(mnist_data.to_idx(array))


@pytest.fixture(scope="module")
def base(few_data, tmp_path_factory):
    """The folder of a finished run of the unedited program, which no test may change."""
    folder = tmp_path_factory.mktemp("base") / "run"
    flags = [f"--data_dir={few_data}", f"--results_path={folder}", *SMALL]
    assert run_main.main(flags) == 0
    return folder


@pytest.fixture
def program(few_data, tmp_path, monkeypatch):
    """A Program, whose modules and Keras classes are replaced by the original ones after the test."""
    registered = dict(keras.saving.get_custom_objects())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "scripts")
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name)
    yield Program(tmp_path / "scripts", few_data)
    keras.saving.get_custom_objects().clear()
    keras.saving.get_custom_objects().update(registered)


def rows():
    """Returns the rows of log.csv, {column: text}."""
    with (RUN / "log.csv").open() as file:
        return list(csv.DictReader(file))


def log(name):
    """Returns a column of log.csv."""
    return [float(row[name]) for row in rows()]


def as_array(picture):
    """Returns the pixels of a picture file."""
    return np.asarray(Image.open(picture))


def assert_refused(edited_run_main, folder, capsys, words):
    """A run of another program is neither loaded nor resumed, nor changed."""
    before = conftest.files(folder)
    for flags in (["--load", folder], ["--resume", "--num_epochs=3", f"--results_path={folder}"]):
        capsys.readouterr()
        assert edited_run_main.main(flags) == 2
        conftest.assert_mentions(conftest.one_line(capsys.readouterr().err), words)
    assert conftest.files(folder) == before


def assert_goes_on(program):
    """The run is resumed and loaded within the edit."""
    metrics = program.run("--resume", "--num_epochs=3")
    assert log("epoch") == [1, 2, 3]
    assert program.run("--load", RUN) == pytest.approx(metrics)
    assert_saved(program)


def assert_saved(program):
    """vae.keras holds the network of the newest checkpoint."""
    network, digits = program.run_main.load(RUN)
    saved = keras.models.load_model(RUN / "vae.keras")
    for variable, other in zip(network.variables, saved.variables, strict=True):
        if "seed_generator" not in variable.path:
            np.testing.assert_array_equal(variable, other)
    np.testing.assert_array_equal(saved(digits.test.targets[:5]), network(digits.test.targets[:5]))


def assert_consistent(network, batch):
    """log p(x) with one sample equals the ELBO in the mean, for each digit, and it rises with the samples."""

    @tf.function
    def log_px_minus_elbo(seed):
        negative_elbo, _, _ = network.negative_elbo(batch, seed=seed)
        return network.log_marginal_likelihood(batch, 1, seed=seed) + negative_elbo

    differences = np.stack([log_px_minus_elbo(tf.constant([0, seed])) for seed in range(50)])
    mean = differences.mean(axis=0)
    standard_error = differences.std(axis=0) / math.sqrt(len(differences))
    assert abs(mean.mean()) < 4 * mean.std() / math.sqrt(len(mean))
    assert np.mean((mean / standard_error) ** 2) == pytest.approx(1, abs=0.4)
    log_px = [np.mean(network.log_marginal_likelihood(batch, n, seed=(0, 0))) for n in (1, 10, 100)]
    assert log_px == sorted(log_px)
    assert log_px[-1] > log_px[0] + 0.1


def first(batch, n):
    """Returns the first n images of a batch, as a batch of the program that made it."""
    return type(batch)(*[array[:n] for array in batch])


# --- Densities ----------------------------------------------------------------------------------------

LAPLACE = '''
class Laplace(Prior):
    """p(z): independent Laplace distributions of scale 1."""

    def log_prob(self, z):
        return -tf.reduce_sum(tf.abs(z) + math.log(2), axis=-1)

    def sample(self, n, dim_z, seed):
        u = uniform((n, dim_z), seed, Stream.PRIOR) - 0.5
        return -tf.sign(u) * tf.math.log1p(-2 * tf.abs(u))

    def cdf(self, z):
        return 0.5 - 0.5 * np.sign(z) * np.expm1(-np.abs(z))

    def quantile(self, p):
        return -np.sign(p - 0.5) * np.log1p(-2 * np.abs(p - 0.5))
'''


def test_another_prior(base, capsys, program):
    """A Laplace distribution. The manifold's axes are in equal steps of its probability."""
    program.insert("vae.py", LAPLACE, before="class GaussianPosterior(Density):")
    program.replace("vae.py", "return StandardNormal()\n", "return Laplace()")
    program.start()
    program.run("--n_generate=2000", "--PMLR_n_img_x=9", "--PMLR_n_img_y=5", "--PMLR_z_range=2")
    assert np.all(np.diff(log("train_elbo")) > 0)
    assert {"manifold.png", "latent_map.png", "samples.png"} < {file.name for file in RUN.iterdir()}

    network, digits, flags = program.load()
    assert_consistent(network, first(digits.test, 300))
    with np.load(RUN / "generated.npz") as generated:
        assert stats.kstest(generated["z"].ravel(), "laplace").pvalue > 0.001
        assert stats.kstest(generated["z"].ravel(), "norm").pvalue < 1e-6
    z = network.prior.sample(100, 2, (flags.seed, 0))
    data = program.plot_utils.PlotData(network, digits, flags)
    np.testing.assert_array_equal(data.samples, network.decode(z))
    (images,), z_x, z_y = data.manifold
    std = np.std(network.encode(digits.valid.inputs), axis=0)
    assert_equal_steps(z_x, std[0], 9)
    assert_equal_steps(z_y[::-1], std[1], 5)
    corner = network.decode(np.array([[z_x[0], z_y[0]]]))
    np.testing.assert_allclose(images[0], corner[0], atol=1e-6)
    assert_refused(program.run_main, base, capsys, "epoch-2.npz network")


def assert_equal_steps(z, std, n):
    """z are n numbers from -2 to 2, in equal steps of probability under a Laplace distribution."""
    width = max(1, std)
    expected = np.linspace(stats.laplace.cdf(-2 / width), stats.laplace.cdf(2 / width), n)
    np.testing.assert_allclose(stats.laplace.cdf(z / width), expected, atol=1e-6)
    assert z[0] == pytest.approx(-2, abs=1e-5)


MIXTURE = '''
class Mixture(Prior):
    """A mixture of Gaussians of variance 1, whose means and weights are trained."""

    def __init__(self, n_components, dim_z):
        super().__init__()
        initial = keras.initializers.RandomNormal(stddev=1.0)
        self.means = self.add_weight((n_components, dim_z), initial, name="means")
        self.logits = self.add_weight((n_components,), "zeros", name="logits")

    def log_prob(self, z):
        means = tf.convert_to_tensor(self.means)
        log_probs = log_normal(z[..., None, :], means, tf.zeros_like(means))
        return tf.reduce_logsumexp(tf.nn.log_softmax(self.logits) + log_probs, axis=-1)

    def sample(self, n, dim_z, seed):
        one_per_draw = tf.random.stateless_categorical(self.logits[None], n, seed)[0]
        return tf.gather(self.means, one_per_draw) + normal((n, dim_z), seed, Stream.PRIOR)
'''

VAMP_PRIOR = '''
class VampPrior(Prior):
    """The mean of q(z|u) over pseudo-inputs u, which are trained: Tomczak and Welling, arXiv:1705.07120."""

    def __init__(self, n_components, encoder, n_pixels):
        super().__init__()
        self.encoder = encoder
        initial = keras.initializers.RandomUniform(0.0, 1.0)
        self.pseudo_inputs = self.add_weight((n_components, n_pixels), initial, name="pseudo_inputs")

    def log_prob(self, z):
        log_probs = log_normal(z[..., None, :], *self.encoder(self.pseudo_inputs))
        return tf.reduce_logsumexp(log_probs, axis=-1) - math.log(self.pseudo_inputs.shape[0])

    def sample(self, n, dim_z, seed):
        mean, log_var = self.encoder(self.pseudo_inputs)
        one_per_draw = tf.random.stateless_uniform((n,), seed, 0, mean.shape[0], tf.int32)
        mean = tf.gather(mean, one_per_draw)
        return reparameterize(mean, tf.gather(log_var, one_per_draw), seed, Stream.PRIOR)
'''


@pytest.mark.parametrize(
    ("code", "call", "names"),
    [
        (MIXTURE, "Mixture(5, self.dim_z)", ["means", "logits"]),
        (VAMP_PRIOR, "VampPrior(5, self.encoder, self.n_pixels)", ["pseudo_inputs"]),
    ],
    ids=["mixture", "vamp_prior"],
)
def test_a_prior_with_weights(code, call, names, base, capsys, program):
    """Its weights are trained without weight decay, saved and resumed; the manifold follows digits."""
    program.insert("vae.py", code, before="class GaussianPosterior(Density):")
    program.replace("vae.py", "return StandardNormal()\n", f"return {call}")
    program.start()
    program.run("--dim_z=3", "--PRR=False", "--PMLR=False")
    assert np.all(np.diff(log("train_elbo")) > 0)
    network, digits, flags = program.load()
    assert [variable.name for variable in network.prior.trainable_variables] == names
    before = program.run_main.build_network(digits, flags)
    for old, new in zip(before.prior.weights, network.prior.weights, strict=True):
        assert np.abs(old - new).max() > 1e-3
    assert_consistent(network, first(digits.test, 300))
    assert_no_weight_decay(program, network, flags)
    assert_goes_on(program)
    assert_refused(program.run_main, base, capsys, "epoch-2.npz shapes")
    # Without quantiles of the prior, the manifold's axes are quantiles of the digits' means.
    plane_flags = program.run_main.parse_flags(["--PMLR_n_img_x=5"])
    plane = program.vae.VAE(2, 16)
    _, z_x, _ = program.plot_utils.PlotData(plane, digits, plane_flags).manifold
    mean = plane.encode(digits.valid.inputs)[:, 0]
    np.testing.assert_allclose(z_x, np.quantile(mean, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-5)


def assert_no_weight_decay(program, network, flags):
    """A step without gradients changes the matrices of the layers, and nothing else."""
    variables = network.trainable_variables
    before = [variable.numpy() for variable in variables]
    optimizer = program.run_main.make_optimizer(network, 10, flags)
    optimizer.apply([tf.zeros_like(variable) for variable in variables], variables)
    for old, variable in zip(before, variables, strict=True):
        assert np.array_equal(old, variable) == (variable.name != "kernel")


PLAIN_CLASS = '''
class Shifted:
    """A standard normal distribution around a mean that training would miss."""

    def __init__(self, dim_z):
        self.mean = tf.Variable(tf.zeros(dim_z), name="prior_mean")

    def log_prob(self, z):
        return log_normal(z - self.mean, tf.zeros_like(z), tf.zeros_like(z))

    def sample(self, n, dim_z, seed):
        return self.mean + normal((n, dim_z), seed, Stream.PRIOR)

    kl_divergence = Prior.kl_divergence
    cdf = quantile = None
'''


@pytest.mark.parametrize("base_class", ["", "(Prior)"])
def test_a_variable_that_training_would_miss(base_class, capsys, program):
    code = PLAIN_CLASS.replace("class Shifted:", f"class Shifted{base_class}:")
    if base_class:
        code = code.replace("self.mean = tf", "super().__init__()\n        self.mean = tf")
    program.insert("vae.py", code, before="class GaussianPosterior(Density):")
    program.replace("vae.py", "return StandardNormal()\n", "return Shifted(self.dim_z)")
    program.start()
    assert program.main() == 2
    conftest.assert_mentions(conftest.one_line(capsys.readouterr().err), "prior_mean add_weight")
    assert not RUN.exists()


FULL_COVARIANCE = '''
class FullCovariance(Density):
    """q(z|x) = N(z; mean, scale scale^T). q is (mean, scale); scale: (..., dim_z, dim_z), triangular."""

    def n_outputs(self, dim_z):
        return dim_z + dim_z**2

    def parameters(self, outputs):
        dim_z = math.isqrt(outputs.shape[-1])
        matrix = tf.reshape(outputs[..., dim_z:], (-1, dim_z, dim_z))
        std = tf.exp(tf.linalg.diag_part(matrix) / 2)
        return outputs[..., :dim_z], tf.linalg.set_diag(tf.linalg.band_part(matrix, -1, 0), std)

    def sample(self, q, seed):
        mean, scale = q
        return mean + tf.linalg.matvec(scale, normal(tf.shape(mean), seed, Stream.LATENT))

    def log_prob(self, z, q):
        mean, scale = q
        epsilon = tf.linalg.triangular_solve(scale, (z - mean)[..., None])[..., 0]
        log_det = tf.reduce_sum(tf.math.log(tf.linalg.diag_part(scale)), axis=-1)
        return log_normal(epsilon, tf.zeros_like(epsilon), tf.zeros_like(epsilon)) - log_det

    def moments(self, q):
        mean, scale = q
        return mean, tf.math.log(tf.reduce_sum(scale**2, axis=-1))
'''


def test_another_posterior(base, capsys, program):
    """A Gaussian with all covariances, which posterior.png shows."""
    program.insert("vae.py", FULL_COVARIANCE, before="class Likelihood(Density):")
    program.replace("vae.py", "return GaussianPosterior()\n", "return FullCovariance()")
    program.start()
    program.run("--PRR=False", "--num_epochs=3")
    assert np.all(np.diff(log("train_elbo")) > 0)
    network, digits, flags = program.load()
    assert_consistent(network, first(digits.test, 300))
    mean, scale = network.encoder(digits.test.inputs[:5])
    z = np.array([0.3, -0.5], np.float32)
    log_prob = network.posterior.log_prob(z, (mean, scale))
    for i in range(5):
        expected = stats.multivariate_normal(mean[i], scale[i] @ tf.transpose(scale[i])).logpdf(z)
        assert float(log_prob[i]) == pytest.approx(expected, rel=1e-4)
    data = program.plot_utils.PlotData(network, digits, flags)
    window, _, log_q, log_q_at_mean = data.posterior(0)
    steps = window - np.mean(window, axis=0)
    covariance = (scale @ tf.transpose(scale, (0, 2, 1)))[0]
    z_1, z_2 = np.meshgrid(steps[:, 0], steps[:, 1])
    expected = stats.multivariate_normal(cov=covariance).logpdf(np.stack([z_1, z_2], axis=-1))
    np.testing.assert_allclose(log_q, expected, rtol=1e-3, atol=1e-3)
    assert log_q_at_mean == pytest.approx(expected.max(), abs=1e-3)
    assert abs(covariance[0, 1]) / math.sqrt(covariance[0, 0] * covariance[1, 1]) > 0.1
    assert_refused(program.run_main, base, capsys, "epoch-2.npz shapes")


FIXED_GAUSSIAN = '''
class Gaussian(Likelihood):
    """p(x|z) = N(x; logits, 0.1 I)."""

    def log_prob(self, x, logits):
        return log_normal(x, logits, math.log(0.1) * tf.ones_like(logits))

    def mean(self, logits):
        return logits

    def initial_output_bias(self, mean_image):
        return mean_image
'''

LEARNED_GAUSSIAN = '''
class Gaussian(Likelihood):
    """p(x|z) = N(x; logits, std^2 I) with a trained std."""

    def __init__(self):
        super().__init__()
        self.log_std = self.add_weight((), keras.initializers.Constant(-1.0), name="log_std")

    def log_prob(self, x, logits):
        return log_normal(x, logits, 2 * self.log_std * tf.ones_like(logits))

    def mean(self, logits):
        return logits

    def initial_output_bias(self, mean_image):
        return mean_image
'''

CONTINUOUS_BERNOULLI = '''
class ContinuousBernoulli(Likelihood):
    """p(x|z) ~ exp(logits x) on [0, 1]: Loaiza-Ganem and Cunningham, arXiv:1907.06845."""

    def log_prob(self, x, logits):
        size = self.size(logits)
        log_normalizer = (logits + size) / 2 + tf.math.log(-tf.math.expm1(-size) / size)
        return tf.reduce_sum(x * logits - log_normalizer, axis=-1)

    def mean(self, logits):
        size = self.size(logits)
        return 0.5 + logits / size * (0.5 / tf.tanh(size / 2) - 1 / size)

    def size(self, logits):
        return tf.sqrt(logits**2 + 1e-3)  # |logits|, but never 0
'''


def test_another_likelihood(base, capsys, program):
    """Gaussian pixels, whose mean is the decoder's output itself."""
    program.insert("vae.py", FIXED_GAUSSIAN, before="# --- The network -")
    program.replace("vae.py", RETURN_BERNOULLI, RETURN_BERNOULLI.replace("Bernoulli", "Gaussian"))
    program.start()
    program.run("--n_generate=300", "--PMLR=False")
    assert np.all(np.diff(log("train_elbo")) > 0)

    network, digits, flags = program.load()
    test = digits.test
    assert_consistent(network, first(test, 300))
    new_network = program.run_main.build_network(digits, flags)
    np.testing.assert_allclose(new_network.decoder_output.bias, new_network.mean_image, atol=1e-6)
    restored = network.decoder(network.encode(test.inputs))
    np.testing.assert_array_equal(network.reconstruct(test.inputs), restored)
    picture = program.plot_utils.tile(restored.numpy()[:100], 10, 10)
    np.testing.assert_array_equal(Image.open(RUN / "reconstruction.png"), picture)
    (images,), z_x, z_y = program.plot_utils.PlotData(network, digits, flags).manifold
    corner = network.decoder(np.array([[z_x[0], z_y[0]]], np.float32))
    np.testing.assert_allclose(images[0], corner[0], atol=1e-6)
    with np.load(RUN / "generated.npz") as generated:
        mean = tf.reshape(network.decoder(generated["z"]), (-1, 28, 28))
        np.testing.assert_allclose(generated["images"], 255 * np.clip(mean, 0, 1), atol=0.501)
    assert_refuses_binarize(program, capsys, "Gaussian")
    assert_refused(program.run_main, base, capsys, "epoch-2.npz network")


def test_a_likelihood_with_a_weight(base, capsys, program):
    """A trained standard deviation, which is saved and resumed, and whose logarithm does not decay to 0."""
    program.insert("vae.py", LEARNED_GAUSSIAN, before="# --- The network -")
    program.replace("vae.py", RETURN_BERNOULLI, RETURN_BERNOULLI.replace("Bernoulli", "Gaussian"))
    program.start()
    program.run("--dim_z=3", "--PRR=False", "--PMLR=False")
    assert np.all(np.diff(log("train_elbo")) > 0)
    network, digits, flags = program.load()
    assert network.likelihood.log_std.numpy() < -1.05
    assert_consistent(network, first(digits.test, 300))
    assert_no_weight_decay(program, network, flags)
    assert_goes_on(program)
    assert_refuses_binarize(program, capsys, "Gaussian")
    assert_refused(program.run_main, base, capsys, "epoch-2.npz shapes")


def test_a_continuous_likelihood(base, capsys, program):
    program.insert("vae.py", CONTINUOUS_BERNOULLI, before="# --- The network -")
    program.replace("vae.py", RETURN_BERNOULLI, RETURN_BERNOULLI.replace("Bernoulli", "ContinuousBernoulli"))
    program.start()
    program.run("--PMLR=False")
    assert np.all(np.diff(log("train_elbo")) > 0)
    network, digits, _ = program.load()
    assert_consistent(network, first(digits.test, 300))
    likelihood = network.likelihood
    logits = np.array([[-20.0], [-1.0], [0.0], [0.01], [5.0]], np.float32)
    pixels = np.linspace(0, 1, 2_001, dtype=np.float32)
    density = np.exp(likelihood.log_prob(pixels[:, None, None], logits))
    np.testing.assert_allclose(integrate.trapezoid(density, pixels, axis=0), 1, atol=1e-3)
    means = integrate.trapezoid(pixels[:, None] * density, pixels, axis=0)
    np.testing.assert_allclose(likelihood.mean(logits)[:, 0], means, atol=1e-3)
    assert_refuses_binarize(program, capsys, "ContinuousBernoulli")
    assert_refused(program.run_main, base, capsys, "epoch-2.npz network")


# The end of `make_likelihood`.
RETURN_BERNOULLI = '''Returns p(x|z)."""
        return Bernoulli()
'''


def assert_refuses_binarize(program, capsys, name):
    capsys.readouterr()
    assert program.main(f"--data_dir={program.data_dir}", "--results_path=binarized", "--binarize") == 2
    conftest.assert_mentions(conftest.one_line(capsys.readouterr().err), ["--binarize", name])
    assert not Path("binarized").exists()


# --- Layers -------------------------------------------------------------------------------------------


def test_another_activation(base, capsys, program):
    elu = 'hidden_layer(self.n_hidden, "elu", name="encoder_1")'
    program.replace("vae.py", elu, elu.replace("elu", "relu"))
    program.start()
    assert_refused(program.run_main, base, capsys, "epoch-2.npz network computes")


# The end of the list in `encoder_layers`.
ENCODER_2 = 'hidden_layer(self.n_hidden, "tanh", name="encoder_2"),'


def test_a_third_layer_and_other_sizes(base, capsys, monkeypatch, program):
    """All in one place. Each layer's dropout has random numbers that nothing else has."""
    new_layers = """hidden_layer(24, "tanh", name="encoder_2"),
            hidden_layer(12, "tanh", name="encoder_3"),"""
    program.replace("vae.py", ENCODER_2, new_layers)
    program.start()
    program.run("--dim_z=3", "--PRR=False", "--PMLR=False", "--keep_prob=0.9")
    assert np.all(np.diff(log("train_elbo")) > 0)
    assert_goes_on(program)
    metrics = program.run("--load", RUN, "--n_importance=10")
    assert metrics["test_log_px"] > metrics["test_elbo"]
    network, digits = program.run_main.load(RUN)
    assert [layer.units for layer in network.encoder_hidden] == [16, 24, 12]
    assert_refused(program.run_main, base, capsys, "epoch-2.npz shapes")

    streams = []
    uniform = program.vae.uniform

    def recorder(shape, seed, stream):
        streams.append(int(stream))
        return uniform(shape, seed, stream)

    monkeypatch.setattr(program.vae, "uniform", recorder)
    network.negative_elbo(first(digits.test, 2), seed=(0, 0), keep_prob=0.5)
    first_dropout = int(program.vae.Stream.DROPOUT)
    assert sorted(streams) == [program.vae.Stream.LATENT, *range(first_dropout, first_dropout + 5)]


def test_normalization(base, capsys, program):
    """Moving statistics move, are in the checkpoint and the saved network, and are resumed to the bit."""
    new_layers = f"""{ENCODER_2}
            keras.layers.BatchNormalization(name="batch_norm"),
            keras.layers.LayerNormalization(name="layer_norm"),"""
    program.replace("vae.py", ENCODER_2, new_layers)
    program.start()
    program.run("--dim_z=3", "--PRR=False", "--PMLR=False", "--keep_prob=0.9")
    assert np.all(np.diff(log("train_elbo")) > 0)
    network, _ = program.run_main.load(RUN)
    batch_norm = network.encoder_hidden[2]
    assert np.abs(batch_norm.moving_mean).max() > 0.01
    assert np.abs(batch_norm.moving_variance - 1).max() > 0.1

    undisturbed = newest_checkpoint()
    (RUN / "checkpoint" / "epoch-2.npz").unlink()
    program.run("--resume")
    resumed = newest_checkpoint()
    assert undisturbed.keys() == resumed.keys()
    for name in undisturbed.keys() - {"history"}:
        np.testing.assert_array_equal(undisturbed[name], resumed[name])
    assert_saved(program)
    assert_refused(program.run_main, base, capsys, "epoch-2.npz shapes")


def newest_checkpoint():
    """Returns the arrays in the newest checkpoint, by name."""
    with np.load(max((RUN / "checkpoint").iterdir())) as arrays:
        return dict(arrays)


CONVOLUTIONS = '''    def encoder_layers(self):
        """Returns the encoder's hidden layers: any Keras layers, of images (batch, n_pixels)."""
        side = math.isqrt(self.n_pixels)
        return [
            keras.layers.Reshape((side, side, 1)),
            keras.layers.Conv2D(4, 4, strides=4, activation="elu"),
            keras.layers.Flatten(),
        ]

    def decoder_layers(self):
        """Returns the decoder's hidden layers: any Keras layers, of z (batch, dim_z)."""
        side = math.isqrt(self.n_pixels) // 4
        return [
            keras.layers.Dense(side * side * 4, "elu"),
            keras.layers.Reshape((side, side, 4)),
            keras.layers.Conv2DTranspose(4, 2, strides=2, activation="elu"),
            keras.layers.Flatten(),
        ]

'''


def test_convolutions(base, capsys, program):
    """They take the place of all hidden layers. The decoder still begins with the mean digit."""
    text = (program.folder / "vae.py").read_text()
    start = text.index("    def encoder_layers(self):")
    end = text.index("    @property\n    def dim_z_bottom")
    program.replace("vae.py", text[start:end], CONVOLUTIONS)
    program.start()
    program.run("--PRR=False", "--keep_prob=0.9")
    assert np.all(np.diff(log("train_elbo")) > 0)
    network, digits = program.run_main.load(RUN)
    shapes = [tuple(variable.shape) for variable in network.trainable_variables]
    encoder = [(4, 4, 1, 4), (4,), (196, 4), (4,)]
    decoder = [(2, 196), (196,), (2, 2, 4, 4), (4,), (784, 784), (784,)]
    assert shapes == encoder + decoder
    new_network = program.vae.VAE(2, 16, mean_image=0.2)
    np.testing.assert_allclose(tf.sigmoid(new_network.decoder_output.bias), 0.2, rtol=1e-5)
    assert_consistent(network, first(digits.test, 300))
    assert_refused(program.run_main, base, capsys, "epoch-2.npz shapes")


def test_two_runs_with_layers_without_a_seed(program):
    """The same flags give the same bits, and a program that calls this one keeps its own random state."""
    new_layer = 'keras.layers.Dense(16, "tanh", name="encoder_3"),'
    program.replace("vae.py", ENCODER_2, f"{ENCODER_2}\n            {new_layer}")
    program.start()
    environment = dict(os.environ)
    checkpoints = []
    for seed in (1, 2):
        random.seed(seed)
        state = random.getstate()
        program.run("--PRR=False", "--PMLR=False", "--num_epochs=1", "--overwrite")
        assert random.getstate() == state
        checkpoints.append(newest_checkpoint())
    one, other = checkpoints
    for name in one.keys() - {"history"}:
        np.testing.assert_array_equal(one[name], other[name])
    assert environment == os.environ
    # The guest's own training, whose dropout has no seed.
    model = keras.Sequential([keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.zeros((4, 2)), np.zeros(4), verbose=0)


# --- Noise and data -----------------------------------------------------------------------------------

# The body of `salt_and_pepper`.
SALT_AND_PEPPER = """    u = uniform(tf.shape(x), seed, Stream.NOISE)
    black_or_white = tf.where(u < noise_level / 2, 0.0, 1.0)
    return tf.where(u < noise_level, black_or_white, x)
"""


def test_another_noise(few_digits, monkeypatch, program):
    """Training and evaluation see the same numbers, which are neither rounded nor cut."""
    gaussian_noise = """    return x + noise_level * normal(tf.shape(x), seed, Stream.NOISE)
"""
    program.replace("vae.py", SALT_AND_PEPPER, gaussian_noise)
    program.start()
    images = few_digits.train_images
    labels = few_digits.train_labels
    same = dataclasses.replace(
        few_digits, valid_images=images, valid_labels=labels, test_images=images, test_labels=labels
    )

    def load_same_digits(data_dir):
        return same

    monkeypatch.setattr(program.mnist_data, "load_mnist", load_same_digits)
    # With weights that stand still, the KL divergence depends on the encoder's inputs only.
    metrics = program.run("--add_noise", "--learn_rate=1e-12", "--PMLR=False")
    # Its standard error is 2%; of inputs cut to [0, 1] it is a third smaller.
    assert log("train_kl") == pytest.approx(log("valid_kl"), rel=0.1)
    assert log("train_kl")[0] == pytest.approx(metrics["test_kl"], rel=0.1)
    assert metrics["psnr_noisy"] == pytest.approx(-20 * math.log10(0.5), abs=0.02)

    _, digits, _ = program.load()
    inputs = digits.valid.inputs
    assert inputs.dtype == np.float32
    assert inputs.min() < -1
    assert inputs.max() > 2
    np.testing.assert_array_equal(digits.valid.targets, images / np.float32(255))


def test_a_masked_square_and_another_schedule(program):
    masked_square = """    side = math.isqrt(x.shape[-1])
    size = int(noise_level * side)
    start = tf.floor(uniform((tf.shape(x)[0], 2, 1), seed, Stream.NOISE) * (side - size + 1))
    pixel = tf.range(side, dtype=tf.float32)
    inside = (start <= pixel) & (pixel < start + size)  # (batch, 2, side): its rows and its columns
    square = inside[:, 0, :, None] & inside[:, 1, None, :]
    return tf.where(tf.reshape(square, tf.shape(x)), 0.0, x)
"""
    program.replace("vae.py", SALT_AND_PEPPER, masked_square)
    schedule = "schedule = keras.optimizers.schedules.CosineDecay(flags.learn_rate, n_steps)"
    exponential = "ExponentialDecay(flags.learn_rate, n_steps // flags.num_epochs, decay_rate=0.5)"
    program.replace("run_main.py", schedule, f"schedule = keras.optimizers.schedules.{exponential}")
    program.start()
    program.run("--add_noise", "--learn_rate=0.008", "--PMLR=False")
    assert log("learn_rate") == pytest.approx([0.008, 0.004])
    assert np.all(np.diff(log("train_elbo")) > 0)
    assert {"input_noise.png", "denoising.png"} < {file.name for file in RUN.iterdir()}
    corrupted = program.vae.salt_and_pepper(tf.ones((200, 784)), 0.5, (0, 0))
    square = tf.reshape(corrupted, (-1, 28, 28)).numpy() == 0
    assert np.all(np.sum(square, axis=(1, 2)) == 14 * 14)
    assert np.all(np.sum(np.any(square, axis=1), axis=1) == 14)
    assert np.all(np.sum(np.any(square, axis=2), axis=1) == 14)
    assert np.all(np.any(square, axis=0))  # each pixel is in one of the squares


# In `load_mnist`: what is below this line uses the arrays.
AFTER_THE_CHECKS = "    n_train = len(arrays[TRAIN_IMAGES])"
DIGITS_0_TO_4 = """    for images, labels in ((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)):
        chosen = arrays[labels] < 5
        arrays[images] = arrays[images][chosen]
        arrays[labels] = arrays[labels][chosen]
"""
FEWER_DIGITS = """    for name in (TRAIN_IMAGES, TRAIN_LABELS):
        arrays[name] = arrays[name][:1_000]
"""


@pytest.mark.parametrize("code", [DIGITS_0_TO_4, FEWER_DIGITS], ids=["digits_0_to_4", "fewer_digits"])
def test_part_of_the_digits(code, base, capsys, program):
    """A run on all digits is neither resumed nor loaded."""
    program.replace("mnist_data.py", AFTER_THE_CHECKS, code + AFTER_THE_CHECKS)
    program.start()
    assert_refused(program.run_main, base, capsys, "load_mnist digits")
    if code == FEWER_DIGITS:
        assert len(program.mnist_data.load_mnist(program.data_dir).train_images) == 1_000 - 1_000 // 12
        return
    program.run("--num_epochs=1", "--PMLR=False")
    _, digits, _ = program.load()
    assert set(digits.train_labels) == set(digits.test.labels) == {0, 1, 2, 3, 4}


SMALLER_IMAGES = """    for name in (TRAIN_IMAGES, TEST_IMAGES):
        blocks = arrays[name].reshape(-1, 14, 2, 14, 2)
        arrays[name] = blocks.mean(axis=(2, 4)).astype(np.uint8).reshape(-1, 14 * 14)
"""


def test_smaller_images(base, capsys, mnist, program):
    """The network, the pictures and what is generated follow what load_mnist returns."""
    program.replace("mnist_data.py", AFTER_THE_CHECKS, SMALLER_IMAGES + AFTER_THE_CHECKS)
    program.start()
    program.run("--n_generate=10")
    assert np.all(np.diff(log("train_elbo")) > 0)
    network, _ = program.run_main.load(RUN)
    assert network.n_pixels == 14 * 14
    with np.load(RUN / "generated.npz") as generated:
        assert generated["images"].shape == (10, 14, 14)
    assert as_array(RUN / "reconstruction.png").shape == (140, 140)
    assert_refused(program.run_main, base, capsys, "load_mnist digits")
    np.save("mine.npy", mnist.test_images[:2])
    capsys.readouterr()
    assert program.main("--load", RUN, "--reconstruct", "mine.npy") == 2
    conftest.assert_mentions(conftest.one_line(capsys.readouterr().err), "784 pixels 196")


def test_files_with_smaller_images(capsys, few_digits, program, tmp_path):
    """Two constants of mnist_data.py; augmentation and the user's own digits follow them, too."""
    program.replace("mnist_data.py", "SIDE = 28  #", "SIDE = 14  #")
    program.replace("mnist_data.py", "BOX_SIDE = 20  #", "BOX_SIDE = 10  #")
    program.start()
    program.data_dir = tmp_path / "data"
    program.data_dir.mkdir()
    train_images = few_digits.train_images.reshape(-1, 28, 28)[:, ::2, ::2].reshape(-1, 196)
    test_images = few_digits.test_images.reshape(-1, 28, 28)[:, ::2, ::2].reshape(-1, 196)
    write_data(program.data_dir, train_images, few_digits.train_labels, test_images, few_digits.test_labels)
    program.run("--augment", "--num_epochs=1", "--PMLR=False")
    Image.fromarray(few_digits.test_images[0].reshape(28, 28)).save("mine.png")
    program.run("--load", RUN, "--reconstruct", "mine.png")
    with np.load(RUN / "reconstructed.npz") as reconstructed:
        assert reconstructed["images"].shape == (1, 14, 14)


def test_images_that_are_not_square(capsys, program):
    narrower = """    for name in (TRAIN_IMAGES, TEST_IMAGES):
        arrays[name] = arrays[name].reshape(-1, 28, 28)[:, :, 4:24].reshape(-1, 28 * 20)
"""
    program.replace("mnist_data.py", AFTER_THE_CHECKS, narrower + AFTER_THE_CHECKS)
    program.start()
    assert program.main() == 2
    conftest.assert_mentions(conftest.one_line(capsys.readouterr().err), "560 square")


# --- Training -----------------------------------------------------------------------------------------

SIGN_SGD = """
class SignSGD(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        variable.assign_sub(learning_rate * tf.sign(gradient))
"""
MAKE_SIGN_SGD = """
def make_sign_sgd(learning_rate):
    return vae.SignSGD(learning_rate)
"""
OPTIMIZERS = "OPTIMIZERS = {"
FIRST_PAPER = "# --- Other models: each overrides"


def test_another_optimizer(capsys, program):
    program.insert("vae.py", SIGN_SGD, before=FIRST_PAPER)
    program.replace("run_main.py", OPTIMIZERS, OPTIMIZERS + '"sign": Optimizer(make_sign_sgd, 0.25), ')
    program.insert("run_main.py", MAKE_SIGN_SGD, before=OPTIMIZERS)
    program.start()
    program.run("--optimizer=sign", "--batch_size=2200", "--num_epochs=1", "--PMLR=False")  # one step
    assert log("learn_rate") == [0.25]
    network, digits, flags = program.load()
    before = program.run_main.build_network(digits, flags).trainable_variables
    for old, new in zip(before, network.trainable_variables, strict=True):
        step = np.abs(new - old)
        assert np.all((step < 1e-6) | (np.abs(step - 0.25) < 1e-6))
        assert step.max() > 0.2
    for name in ("lion", "SIGN"):
        capsys.readouterr()
        assert program.run_main.main(["--optimizer", name]) == 2
        conftest.assert_mentions(conftest.one_line(capsys.readouterr().err), ["--optimizer", name, "sign"])


MAKE_RMSPROP = """
def make_rmsprop(learning_rate):
    return keras.optimizers.RMSprop(learning_rate)
"""
SCHEDULE = "schedule = keras.optimizers.schedules.CosineDecay(flags.learn_rate, n_steps)"


def test_a_constant_learning_rate(program):
    """It is followed when it changes on --resume, too."""
    program.insert("run_main.py", MAKE_RMSPROP, before=OPTIMIZERS)
    program.replace("run_main.py", OPTIMIZERS, OPTIMIZERS + '"rmsprop": Optimizer(make_rmsprop, 0.001), ')
    program.replace("run_main.py", SCHEDULE, "schedule = flags.learn_rate")
    program.start()
    program.run("--optimizer=rmsprop", "--PMLR=False", "--PRR=False")
    assert np.all(np.diff(log("train_elbo")) > 0)
    before = newest_checkpoint()
    program.run("--resume", "--num_epochs=3", "--learn_rate=1e-8")
    assert log("learn_rate") == pytest.approx([0.001, 0.001, 1e-8])
    after = newest_checkpoint()
    n_weights = len(program.load()[0].weights)
    for i in range(n_weights):
        np.testing.assert_allclose(after[f"variable_{i}"], before[f"variable_{i}"], atol=1e-5)


def test_a_column_of_the_log(base, program):
    """The norm of the gradient. In a resumed older run, earlier epochs have none."""
    for old, new in GRADIENT_NORM:
        program.replace("vae.py", old, new)
    program.start()
    shutil.copytree(base, RUN)
    before = rows()
    program.run("--resume", "--num_epochs=4", "--PMLR=False", "--PRR=False")
    after = rows()
    assert list(after[0]) == [*before[0], "train_gradient_norm"]
    for old, row in zip(before, after[:2], strict=True):
        assert row == old | {"train_gradient_norm": ""}
    network, digits, _ = program.load()
    batch = first(digits.test, 100)
    network.compile(optimizer="sgd")
    with tf.GradientTape() as tape:
        loss, _, _ = network.negative_elbo(batch, seed=(0, 0))
        loss = tf.reduce_mean(loss)
    norm = tf.linalg.global_norm(tape.gradient(loss, network.trainable_variables))
    means = network.train_step(batch, seed=(0, 0))
    assert float(means["gradient_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert min(float(row["train_gradient_norm"]) for row in after[2:]) > 0


# Lines of `VAE.__init__` and `VAE.train_step`, before and after the edit.
GRADIENT_NORM = [
    (
        """        names = ("negative_elbo", "reconstruction", "kl")
""",
        """        names = ("negative_elbo", "reconstruction", "kl", "gradient_norm")
""",
    ),
    (
        """        self.optimizer.apply(gradients, self.trainable_variables)
""",
        """        self.optimizer.apply(gradients, self.trainable_variables)
        self.track(gradient_norm=tf.linalg.global_norm(gradients)[None])
""",
    ),
]


CYCLICAL = """
    epochs = epochs % 2.0  # a new cycle every other epoch: Fu et al., arXiv:1903.10145
    return flags.kl_weight * tf.minimum(1.0, epochs / flags.warm_up)"""


def test_another_schedule_of_the_kl_weight(program):
    line = "\n    return flags.kl_weight * tf.minimum(1.0, epochs / flags.warm_up)"
    program.replace("run_main.py", line, CYCLICAL)
    program.start()
    flags = ["--num_epochs=4", "--kl_weight=10", "--warm_up=1", "--PMLR=False", "--PRR=False"]
    program.run("--dim_z=3", *flags)
    kl = log("train_kl")
    assert kl[1] < kl[2] > kl[3]
    weights = [program.run_main.kl_weight(epochs, program.load()[2]) for epochs in (0.5, 1.5, 2.25, 3.0)]
    assert np.array(weights) == pytest.approx([5, 10, 2.5, 10])


MMD_LOSS = """
        batch = as_batch(batch)
        q = self.encoder(batch.inputs, batch.labels, keep_prob=keep_prob, seed=seed)
        z = self.posterior.sample(q, seed)
        reconstruction, kl = self.elbo_terms(batch, q, z, keep_prob=keep_prob, seed=seed)
        z_prior = self.prior.sample(tf.shape(z)[0], self.dim_z, seed)
        return reconstruction + 100 * mmd(z, z_prior), reconstruction, kl
"""
MMD = '''
def mmd(z, other):
    """Maximum mean discrepancy between samples (n, dim_z), with the kernel exp(-r^2 / dim_z)."""
    return mean_kernel(z, z) + mean_kernel(other, other) - 2 * mean_kernel(z, other)


def mean_kernel(z, other):
    squared_distance = tf.reduce_sum((z[:, None] - other[None]) ** 2, axis=-1)
    return tf.reduce_mean(tf.exp(-squared_distance / z.shape[-1]))
'''


def test_another_loss(program):
    """The maximum mean discrepancy in place of the KL divergence (Zhao et al., arXiv:1706.02262)."""
    line = "        return self.negative_elbo(batch, seed=seed, keep_prob=keep_prob, kl_weight=kl_weight)\n"
    after = "\n    def train_step("  # in VAE
    program.replace("vae.py", line + after, MMD_LOSS + after)
    program.insert("vae.py", MMD, before="def active_units(mean):")
    program.start()
    program.run("--PMLR=False")
    assert np.all(np.diff(log("train_reconstruction")) < 0)
    network, _ = program.run_main.load(RUN)
    z_prior = network.prior.sample(8, 2, (0, 0))
    epsilon = program.vae.normal((8, 2), (0, 0), program.vae.Stream.LATENT)
    assert np.abs(z_prior - epsilon).min() > 1e-4


FREE_BITS = '''
@keras.saving.register_keras_serializable("vae")
class FreeBits(VAE):
    """A KL divergence below free_nats costs nothing (after Kingma et al., arXiv:1606.04934)."""

    def __init__(self, *arguments, free_nats=5.0, **options):
        self.free_nats = free_nats
        super().__init__(*arguments, **options)

    def get_config(self):
        return super().get_config() | {"free_nats": self.free_nats}

    def training_loss(self, batch, *, seed, keep_prob, kl_weight):
        _, reconstruction, kl = self.negative_elbo(batch, seed=seed, keep_prob=keep_prob)
        return reconstruction + kl_weight * tf.maximum(kl, self.free_nats), reconstruction, kl
'''


def test_a_model_with_a_flag(base, capsys, program):
    """Free bits. The flag is recorded, and refused where it has no effect."""
    program.insert("vae.py", FREE_BITS, before=FIRST_PAPER)
    model = '"free_bits": Model("FreeBits", options={"free_nats": 5.0}),'
    program.replace("run_main.py", "MODELS = {", f"MODELS = {{\n    {model}")
    flag = 'free_nats: float = flag(None, real(0, 100), "KL divergence that costs nothing (default: 5)")'
    program.replace("run_main.py", "    n_labels: int =", f"    {flag}\n    n_labels: int =")
    program.start()
    program.run("--model=free_bits", "--free_nats=30", "--PMLR=False")
    assert log("train_kl")[1] > 10
    config = program.run_main.read_json(RUN / "config.json")
    assert config["flags"]["free_nats"] == 30
    assert program.run_main.main(["--load", RUN, "--free_nats=1"]) == 2
    assert "--free_nats" in conftest.one_line(capsys.readouterr().err)
    assert program.run_main.main(["--free_nats=1"]) == 2
    conftest.assert_mentions(conftest.one_line(capsys.readouterr().err), "--free_nats --model")
    assert_refused(program.run_main, base, capsys, "--free_nats")
    assert_refused(run_main, RUN, capsys, "--free_nats")  # by the unedited program

    network, digits = program.run_main.load(RUN)
    loss, reconstruction, kl = network.training_loss(
        first(digits.test, 100), seed=(0, 0), keep_prob=None, kl_weight=2.0
    )
    np.testing.assert_allclose(loss, reconstruction + 2 * np.maximum(kl, 30), rtol=1e-5)


def test_looking_into_a_step(capsys, few_digits, program):
    """In a step that is not compiled, print shows numbers."""
    line = "        return reconstruction + kl_weight * kl, reconstruction, kl\n\n    def elbo_terms("
    program.replace("vae.py", line, '        print("KL divergence:", kl.numpy())\n' + line)
    program.start()
    network = program.vae.VAE(2, 8)
    network.compile(optimizer="sgd", run_eagerly=True)
    capsys.readouterr()
    network.fit(few_digits.train_images[:8] / 255, batch_size=4, verbose=0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("KL divergence: [")
        assert len(line.removeprefix("KL divergence: [").removesuffix("]").split()) == 4


def test_a_condition_on_the_label(base, capsys, program):
    """Training, evaluation, log p(x), pictures and new digits get labels; nothing is decoded without one."""
    for old, new in CONDITION:
        program.replace("vae.py", old, new)
    program.start()
    program.run("--dim_z=3", "--n_generate=20")
    assert {"classes.png", "analogies.png", "samples.png"} < {file.name for file in RUN.iterdir()}
    assert np.all(np.diff(log("train_elbo")) > 0)
    network, digits = program.run_main.load(RUN)
    test = first(digits.test, 300)
    assert_consistent(network, test)
    other_labels = test._replace(labels=(test.labels + 1) % 10)
    negative_elbo, _, _ = network.negative_elbo(test, seed=(0, 0))
    with_other_labels, _, _ = network.negative_elbo(other_labels, seed=(0, 0))
    assert np.mean(with_other_labels) > np.mean(negative_elbo) + 1
    with pytest.raises(ValueError, match="None"):
        network.reconstruct(test.inputs)
    with np.load(RUN / "generated.npz") as generated:
        np.testing.assert_array_equal(generated["label"], np.arange(20) % 10)
        mean = network.decode(generated["z"], generated["label"]).numpy().reshape(-1, 28, 28)
        np.testing.assert_allclose(generated["images"], 255 * mean, atol=0.501)


CONDITION = [
    (
        """        h = self.encoder_features(x, keep_prob, seed)
        return self.posterior.parameters(self.encoder_output(h))

    def encoder_features""",
        """        h = self.encoder_features(x, keep_prob, seed)
        h = tf.concat([h, tf.one_hot(labels, N_CLASSES)], axis=-1)
        return self.posterior.parameters(self.encoder_output(h))

    def encoder_features""",
    ),
    (
        "        h = self.hidden(self.decoder_hidden, as_float32(z), ",
        """        z = tf.concat([as_float32(z), tf.one_hot(labels, N_CLASSES)], axis=-1)
        h = self.hidden(self.decoder_hidden, z, """,
    ),
    ("    has_log_joint = True  #", "    has_log_joint = False  #"),
    ("    has_classes = False  #", "    has_classes = True  #"),
]


DRAW_BEST = '''
def draw_best(data):
    """The ten test digits of the highest ELBO, and below them their reconstructions."""
    if not data.flags.best:
        return None
    negative_elbo, _, _ = data.network.negative_elbo(data.test, seed=(data.flags.seed, 0))
    best = np.argsort(negative_elbo)[:10]
    restored = data.network.reconstruct(data.test.inputs[best], data.labels[best]).numpy()
    return stacked_rows([data.test.targets[best], restored], 10, 1)
'''


def test_a_new_picture_with_a_flag(base, program):
    """Drawn where asked for, of an older run, too, and removed when out of date."""
    program.insert("plot_utils.py", DRAW_BEST, before="\nPICTURES = {")
    program.replace("plot_utils.py", "\nPICTURES = {", '\nPICTURES = {\n    "best.png": draw_best,')
    flag = 'best: bool = flag(False, boolean, "plot the digits of the highest ELBO", Reuse.DEFAULT)'
    program.replace("run_main.py", "    PRR_n_img_x: int =", f"    {flag}\n    PRR_n_img_x: int =")
    program.start()
    program.run("--load", base, f"--results_path={RUN}", "--best")
    picture = as_array(RUN / "best.png")
    assert picture.shape == (2 * 28, 280)
    network, digits = program.run_main.load(base)
    negative_elbo, _, _ = network.negative_elbo(digits.test, seed=(0, 0))
    best = digits.test.targets[np.argsort(negative_elbo)[:10]]
    shown = np.hstack(program.plot_utils.grey_levels(best).reshape(10, 28, 28))
    np.testing.assert_array_equal(picture[:28], shown)
    program.run("--load", base, f"--results_path={RUN}", "--overwrite")
    assert not (RUN / "best.png").exists()
