"""The mathematics: every formula against an independent computation; what a notebook does with a network."""

import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_mentions
from scipy import integrate, special, stats

import vae

pytestmark = pytest.mark.quick

SEED = tf.constant([3, 4])


class Laplace(vae.Prior):
    """Another prior, without a closed form of the KL divergence."""

    def log_prob(self, z):
        return -tf.reduce_sum(tf.abs(z) + np.log(2), axis=-1)


class LaplaceVAE(vae.VAE):
    def make_prior(self):
        return Laplace()


def make_network(kind=vae.VAE, n_pixels=784):
    """Returns a small network whose q(z|x) differs from the prior."""
    mean_image = np.random.default_rng(0).random(n_pixels).astype(np.float32)
    network = kind(dim_z=2, n_hidden=20, mean_image=mean_image, seed=7, n_pixels=n_pixels)
    # A wide q(z|x) keeps the importance weights similar.
    network.encoder_output.kernel.assign(6 * network.encoder_output.kernel)
    network.encoder_output.bias.assign([2.0, 0, 1, 1])
    return network


@pytest.fixture(scope="module")
def network():
    """A network that no test may change."""
    return make_network()


@pytest.fixture(scope="module")
def x():
    return tf.constant(np.random.default_rng(1).random((8, 784)), tf.float32)


def gaussians(n, dim_z):
    """Returns means and log variances, (n, dim_z) each."""
    rng = np.random.default_rng(2)
    return rng.normal(size=(n, dim_z)).astype(np.float32), rng.normal(size=(n, dim_z)).astype(np.float32)


def draws_around(q, n):
    """Returns n draws of z from each of the Gaussians q: (n, ..., dim_z)."""
    return vae.GaussianPosterior().sample(vae.tile_samples(q, n), SEED)


# --- The densities ------------------------------------------------------------------------------------


def test_kl_divergence_against_numerical_integration():
    mean, log_var = gaussians(4, 3)
    mean[0] = 0  # the prior itself
    log_var[0] = 0

    def one_dimension(mu, std):
        q = stats.norm(mu, std)

        def integrand(z):
            return q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z))

        return integrate.quad(integrand, mu - 12 * std, mu + 12 * std)[0]

    expected = np.vectorize(one_dimension)(mean, np.exp(log_var / 2)).sum(axis=1)
    kl = vae.StandardNormal().kl_divergence(vae.GaussianPosterior(), (mean, log_var), None)
    np.testing.assert_allclose(kl, expected, rtol=1e-5)


def test_sampled_kl_divergence_averages_to_the_closed_form():
    q = gaussians(4, 3)
    prior = vae.StandardNormal()
    posterior = vae.GaussianPosterior()
    z = draws_around(q, 200_000)
    draws = vae.Prior.kl_divergence(prior, posterior, q, z).numpy().astype(float)
    standard_error = draws.std(axis=0) / np.sqrt(len(draws))
    closed_form = prior.kl_divergence(posterior, q, None)
    assert (np.abs(draws.mean(axis=0) - closed_form) < 5 * standard_error).all()


def test_closed_form_is_not_used_for_another_posterior():
    class Other(vae.GaussianPosterior):
        def log_prob(self, z, q):
            return tf.reduce_sum(z, axis=-1)

    q = gaussians(4, 3)
    z = draws_around(q, 1)[0]
    kl = vae.StandardNormal().kl_divergence(Other(), q, z)
    expected = np.sum(z, axis=1) - stats.norm.logpdf(z).sum(axis=1)
    np.testing.assert_allclose(kl, expected, rtol=1e-5)


def test_log_normal_against_scipy():
    mean, log_var = gaussians(4, 3)
    z = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    expected = stats.norm(mean, np.exp(log_var / 2)).logpdf(z).sum(axis=-1)
    np.testing.assert_allclose(vae.log_normal(z, mean, log_var), expected, rtol=1e-5)
    np.testing.assert_allclose(vae.GaussianPosterior().log_prob(z, (mean, log_var)), expected, rtol=1e-5)


def test_distribution_function_of_the_prior_and_its_inverse():
    prior = vae.StandardNormal()
    z = np.linspace(-5, 5, 101)
    np.testing.assert_allclose(prior.cdf(z), stats.norm.cdf(z), rtol=1e-12)
    np.testing.assert_allclose(prior.quantile(prior.cdf(z)), z, atol=1e-8)


@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_bernoulli_against_float64(scale):
    rng = np.random.default_rng(0)
    x = rng.random((16, 784)).astype(np.float32)
    x[:4] = 0
    x[4:8] = 1
    logits = (scale * rng.normal(size=x.shape)).astype(np.float32)
    log_white = special.log_expit(logits.astype(float))
    log_black = special.log_expit(-logits.astype(float))
    expected = (x.astype(float) * log_white + (1 - x.astype(float)) * log_black).sum(axis=1)
    np.testing.assert_allclose(vae.Bernoulli().log_prob(x, logits), expected, rtol=2e-6)


@pytest.mark.parametrize("kind", [vae.Likelihood, vae.Bernoulli])
def test_table_has_the_likelihood_of_every_pair(x, kind):
    """The general table as well as the Bernoulli distribution's own, a matrix product."""
    likelihood = vae.Bernoulli()
    logits = np.random.default_rng(0).normal(size=(5, 784)).astype(np.float32)
    expected = [likelihood.log_prob(image, logits) for image in x]
    np.testing.assert_allclose(kind.log_prob_table(likelihood, x, logits), expected, rtol=1e-5)


def test_reparameterize_draws_from_the_gaussian():
    mean = tf.fill((100_000, 1), 2.0)
    log_var = tf.fill((100_000, 1), np.float32(np.log(9)))
    z = vae.reparameterize(mean, log_var, SEED).numpy()
    assert stats.kstest(z[:, 0], stats.norm(2, 3).cdf).pvalue > 1e-3


# --- The ELBO and its gradients -----------------------------------------------------------------------


def test_gradients_through_the_sampling_step():
    def loss(q):
        mean, log_var = tf.unstack(q)
        return tf.reduce_sum(tf.sin(vae.reparameterize(mean, log_var, SEED)))

    q = tf.constant(gaussians(4, 3))
    with tf.GradientTape() as tape:
        tape.watch(q)
        value = loss(q)
    gradient = tape.gradient(value, q).numpy()
    step = 1e-2
    for i in np.ndindex(gradient.shape):
        change = np.zeros_like(gradient)
        change[i] = step
        slope = (loss(q + change) - loss(q - change)) / (2 * step)
        assert gradient[i] == pytest.approx(float(slope), abs=2e-3)


def test_gradient_of_the_negative_elbo_along_a_direction(x):
    network = make_network()

    def loss():
        negative_elbo, _, _ = network.negative_elbo(x, seed=SEED)
        return tf.reduce_mean(negative_elbo)

    weights = network.trainable_variables
    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, weights)
    norm = tf.linalg.global_norm(gradients)
    before = [weight.numpy() for weight in weights]

    def loss_at(distance):
        for weight, start, gradient in zip(weights, before, gradients, strict=True):
            weight.assign(start + distance * gradient / norm)
        return float(loss())

    step = 1e-2
    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert slope == pytest.approx(float(norm), rel=1e-2)


@pytest.mark.architecture
def test_elbo_compares_the_targets_with_reconstructions_of_the_corrupted_inputs(network, x):
    inputs = tf.zeros_like(x)
    loss, reconstruction, kl = network.negative_elbo(vae.Batch(x, inputs), seed=SEED, kl_weight=0.3)
    mean, log_var = network.encoder(inputs)
    logits = network.decoder(vae.reparameterize(mean, log_var, SEED))
    expected_kl = vae.StandardNormal().kl_divergence(network.posterior, (mean, log_var), None)
    np.testing.assert_allclose(reconstruction, -vae.Bernoulli().log_prob(x, logits), rtol=1e-6)
    np.testing.assert_allclose(kl, expected_kl, rtol=1e-6)
    np.testing.assert_allclose(loss, reconstruction + 0.3 * kl, rtol=1e-6)


def test_training_minimizes_the_negative_elbo(network, x):
    options = {"seed": SEED, "keep_prob": 0.7, "kl_weight": 0.3}
    loss = network.training_loss(vae.Batch(x, x), **options)
    np.testing.assert_array_equal(loss, network.negative_elbo(x, **options))


# --- The network --------------------------------------------------------------------------------------


@pytest.mark.architecture
def test_encoder_and_decoder_against_numpy_in_float64(network, x):
    """Without a keep_prob there is no dropout."""

    def apply(layer, h):
        return h @ layer.kernel.numpy().astype(float) + layer.bias.numpy()

    def elu(h):
        return np.where(h > 0, h, np.expm1(np.minimum(h, 0)))

    encoder_1, encoder_2 = network.encoder_hidden
    h = elu(apply(encoder_1, x.numpy() - network.mean_image.numpy()))
    h = np.tanh(apply(encoder_2, h))
    mean, log_var = np.split(apply(network.encoder_output, h), 2, axis=1)
    np.testing.assert_allclose(network.encoder(x), (mean, log_var), atol=1e-5)
    np.testing.assert_allclose(network.encode(x), mean, atol=1e-5)

    decoder_1, decoder_2 = network.decoder_hidden
    z = np.random.default_rng(0).normal(size=(8, 2))
    h = np.tanh(apply(decoder_1, z))
    h = elu(apply(decoder_2, h))
    logits = apply(network.decoder_output, h)
    np.testing.assert_allclose(network.decoder(z), logits, atol=1e-4)
    np.testing.assert_allclose(network.decode(z), special.expit(logits), atol=1e-5)


@pytest.mark.architecture
def test_units_of_the_first_decoder_layer_change_sign_all_over_the_latent_plane():
    """On straight lines, half of which are farther from the origin than 1."""
    layer = vae.VAE(dim_z=2, n_hidden=500).decoder_hidden[0]
    distance = np.abs(layer.bias.numpy()) / np.linalg.norm(layer.kernel.numpy(), axis=0)
    assert 0.8 < np.median(distance) < 1.4


def test_untrained_decoder_outputs_roughly_the_mean_image():
    mean_image = np.linspace(0, 1, 784)  # always black and always white pixels, too
    z = np.random.default_rng(0).normal(size=(1_000, 3))
    images = vae.VAE(dim_z=3, mean_image=mean_image).decode(z)
    np.testing.assert_allclose(np.mean(images, axis=0), mean_image, atol=0.15)
    assert np.std(images, axis=0).max() < 0.05


def test_weights_are_a_function_of_the_seed():
    first = vae.VAE(2, 20, seed=0)
    same = vae.VAE(2, 20, seed=0)
    other = vae.VAE(2, 20, seed=1)
    for weights in zip(first.weights, same.weights, other.weights, strict=True):
        one, two, three = weights
        np.testing.assert_array_equal(one, two)
        if one.name == "kernel":
            assert (one.numpy() != three.numpy()).all()


@pytest.mark.architecture
def test_layers_are_named_after_their_roles(network, capsys):
    names = ["encoder_1", "encoder_2", "encoder_output", "decoder_1", "decoder_2", "decoder_output"]
    assert [layer.name for layer in network.layers if layer.weights] == names
    network.summary()
    summary = capsys.readouterr().out
    assert_mentions(summary, names)
    n_weights = (784 + 1) * 20 + 21 * 20 + 21 * 4 + 3 * 20 + 21 * 20 + 21 * 784
    assert network.count_params() == n_weights + 784  # the mean image
    assert f"{network.count_params():,}" in summary


def test_calling_the_network_reconstructs(network, x):
    images = network.reconstruct(x)
    np.testing.assert_array_equal(network(x), images)
    np.testing.assert_array_equal(network.decode(network.encode(x)), images)
    np.testing.assert_allclose(network.predict(x, batch_size=3, verbose=0), images, atol=1e-6)


@pytest.mark.architecture
def test_samples_are_decoded_draws_from_the_prior(network):
    images = network.sample(50, (5, 6)).numpy()
    np.testing.assert_array_equal(images, network.decode(network.prior.sample(50, 2, (5, 6))))
    assert (images != network.sample(50, (5, 7)).numpy()).any(axis=1).all()
    z, logits = network.sample_with_latents(50, (5, 6))
    np.testing.assert_array_equal(z, network.prior.sample(50, 2, (5, 6)))
    np.testing.assert_array_equal(logits, network.decoder(z))
    z = network.prior.sample(10_000, 2, SEED).numpy()
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(z.T)[0, 1]) < 0.05


def test_samples_are_new_ones_unless_a_seed_is_given(network):
    first = network.sample(3).numpy()
    second = network.sample(3).numpy()
    assert (first != second).any(axis=1).all()
    np.testing.assert_array_equal(network.sample(3, seed=(1, 2)), network.sample(3, seed=(1, 2)))


def test_unknown_constructor_arguments_are_refused():
    with pytest.raises(TypeError, match="n_sampels"):
        vae.VAE(n_sampels=7)


def encoder(network, x):
    return network.encoder(x)


def decoder(network, x):
    return network.decoder(x[:, :2])


def encode(network, x):
    return network.encode(x)


def decode(network, x):
    return network.decode(x[:, :2])


def reconstruct(network, x):
    return network.reconstruct(x)


def call(network, x):
    return network(x)


def negative_elbo(network, x):
    return network.negative_elbo(x, seed=SEED, keep_prob=0.7)


def log_marginal_likelihood(network, x):
    return network.log_marginal_likelihood(x, 130, seed=SEED)


def log_joint_of_images(network, x):
    return network.log_joint(x, tf.zeros((3, 2)))


def log_joint_of_latent_vectors(network, x):
    return network.log_joint(tf.zeros((1, 784)), x[:, :2])


def predict(network, x):
    return network.predict(x, verbose=0)


def sample(network, x):
    return network.sample(8, SEED)


def dropout(network, x):
    return vae.dropout(x, 0.7, SEED, 1)


USES_OF_IMAGES_OR_LATENT_VECTORS = [
    encoder,
    decoder,
    encode,
    decode,
    reconstruct,
    call,
    negative_elbo,
    log_marginal_likelihood,
    log_joint_of_images,
    log_joint_of_latent_vectors,
]
COMPUTATIONS = [*USES_OF_IMAGES_OR_LATENT_VECTORS, sample, dropout]


@pytest.mark.parametrize("use", [*USES_OF_IMAGES_OR_LATENT_VECTORS, predict])
def test_integers_are_refused(network, use):
    """Pixels up to 255 would otherwise be 255 times as bright as those of training."""
    with pytest.raises(TypeError, match="uint8"):
        use(network, np.full((2, 784), 255, np.uint8))


@pytest.mark.parametrize("use", [*USES_OF_IMAGES_OR_LATENT_VECTORS, predict])
def test_float64_gives_the_same_result_as_float32(network, x, use):
    expected = use(network, x)
    np.testing.assert_array_equal(use(network, x.numpy().astype(np.float64)), expected)


# tf.random.fold_in gives another seed when XLA compiles it, if the given seed is negative, as every second of
# its own results.
COMPILED = [encode, decode, reconstruct, call, negative_elbo, sample, dropout, log_marginal_likelihood]


@pytest.mark.parametrize("compute", COMPILED)
def test_results_are_the_same_eagerly_and_compiled(network, x, compute):
    """Random numbers, too."""
    eager = compute(network, x)
    for jit_compile in (False, True):
        compiled = tf.function(compute, jit_compile=jit_compile)(network, x)
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)


def test_saved_network_is_the_same_when_loaded(network, x, tmp_path):
    original = network
    for name in ("vae.keras", "again.keras"):
        network.save(tmp_path / name)
        network = keras.models.load_model(tmp_path / name)
        assert type(network) is vae.VAE
        assert network.get_config() == original.get_config()
        for loaded, saved in zip(network.weights, original.weights, strict=True):
            assert loaded.path == saved.path
        for compute in COMPUTATIONS:
            np.testing.assert_array_equal(compute(network, x), compute(original, x))


# --- What Keras offers: compile, fit, evaluate, export ------------------------------------------------


def mean_terms(network, batches, seed, keep_prob=None):
    """Returns what fit and evaluate have to report of some mini-batches: means over all of their images."""
    terms = [network.negative_elbo(batch, seed=seed, keep_prob=keep_prob) for batch in batches]
    means = np.concatenate(terms, axis=1).mean(axis=1)
    return dict(zip(("negative_elbo", "reconstruction", "kl"), means, strict=True))


def test_evaluate_reports_the_negative_elbo_and_its_terms(x):
    network = make_network()
    network.compile()
    found = network.evaluate(x, batch_size=3, return_dict=True, verbose=0)
    expected = mean_terms(network, [x[:3], x[3:6], x[6:]], (0, 0))  # the last mini-batch has two images
    assert found == pytest.approx(expected, rel=1e-5)


def test_fit_reports_the_negative_elbo_and_lowers_it(x):
    network = make_network()
    network.compile(optimizer="adam")
    before = mean_terms(network, [x], (7, 0), keep_prob=1.0)
    validation = {"validation_data": (x,), "validation_batch_size": 3}
    history = network.fit(x, epochs=4, shuffle=False, **validation, verbose=0).history
    terms = ["negative_elbo", "reconstruction", "kl"]
    assert set(history) == {*terms, "val_negative_elbo", "val_reconstruction", "val_kl"}
    after = mean_terms(network, [x[:3], x[3:6], x[6:]], (0, 0))
    for name in terms:
        assert history[name][0] == pytest.approx(before[name], rel=1e-5)
        assert history[f"val_{name}"][-1] == pytest.approx(after[name], rel=1e-5)
    assert np.all(np.diff(history["negative_elbo"]) < 0)
    assert np.all(np.diff(history["val_negative_elbo"]) < 0)


@pytest.mark.architecture
def test_fit_draws_other_latent_vectors_in_every_step(x):
    """With a learning rate of 0, nothing else changes the loss."""
    network = make_network()
    network.compile(optimizer=keras.optimizers.SGD(0.0), run_eagerly=True)
    history = network.fit(x, epochs=5, verbose=0).history
    assert len(set(history["negative_elbo"])) == 5
    assert len(set(history["kl"])) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_second_array_is_labels_or_targets(x, compiled):
    """Integers are labels, floats the clean images."""
    batches = []

    class Recorder(vae.VAE):
        def negative_elbo(self, batch, **options):
            batches.append(batch)
            return super().negative_elbo(batch, **options)

    network = make_network(Recorder)
    network.compile(run_eagerly=not compiled)
    noisy = tf.zeros_like(x)
    found = network.evaluate(noisy, x, return_dict=True, verbose=0)
    batches.clear()
    assert found == pytest.approx(mean_terms(network, [vae.Batch(x, noisy)], (0, 0)), rel=1e-5)

    batches.clear()
    labels = np.array([0, 1, 2, 3, 4, 5, 6, -1], np.int64)
    found = network.evaluate(x, labels, return_dict=True, verbose=0)
    assert batches[0].labels.dtype == tf.int32
    if not compiled:
        np.testing.assert_array_equal(batches[0].labels, labels)
        np.testing.assert_array_equal(batches[0].inputs, x)
    assert found == pytest.approx(mean_terms(network, [x], (0, 0)), rel=1e-5)


def test_fit_with_labels_or_targets(x):
    network = make_network()
    network.compile(optimizer="adam", run_eagerly=True)
    noisy = tf.zeros_like(x)
    expected = mean_terms(network, [x], (7, 0), keep_prob=1.0)
    history = network.fit(x, np.arange(8), shuffle=False, verbose=0).history
    for name, value in expected.items():
        assert history[name] == [pytest.approx(value, rel=1e-5)]
    expected = mean_terms(network, [vae.Batch(x, noisy)], (7, 1), keep_prob=1.0)  # after one step
    history = network.fit(noisy, x, shuffle=False, verbose=0).history
    for name, value in expected.items():
        assert history[name] == [pytest.approx(value, rel=1e-5)]


def test_sample_weights_are_refused(x):
    network = make_network()
    network.compile(optimizer="adam")
    with pytest.raises(TypeError, match="sample weights"):
        network.fit(x, np.arange(8), sample_weight=np.ones(8), verbose=0)
    with pytest.raises(TypeError, match="sample weights"):
        network.negative_elbo((x, np.arange(8), np.ones(8)), seed=SEED)


@pytest.mark.parametrize("patched", [False, True])
def test_methods_see_numbers_if_keras_runs_them_eagerly(x, patched, monkeypatch):
    """So that one can print, or look around with a debugger, in the middle of a step."""
    seen = []

    class Printing(vae.VAE):
        def decoder(self, z, labels=None, **options):
            seen.append(z.numpy())
            return super().decoder(z, labels, **options)

    network = make_network() if patched else make_network(Printing)
    original_decoder = vae.VAE.decoder

    def printing_decoder(z, labels=None, **options):
        seen.append(z.numpy())
        return original_decoder(network, z, labels, **options)

    if patched:
        monkeypatch.setattr(network, "decoder", printing_decoder)
    network.compile(optimizer="adam", run_eagerly=True)
    seen.clear()
    network.fit(x, batch_size=4, verbose=0)
    assert [z.shape for z in seen] == [(4, 2), (4, 2)]
    assert (seen[0] != seen[1]).all()


def test_exported_network_reconstructs(network, x, tmp_path):
    network.export(tmp_path, verbose=False)
    exported = tf.saved_model.load(tmp_path)
    np.testing.assert_allclose(exported.serve(x), network.reconstruct(x), rtol=1e-5, atol=1e-6)


def test_compiled_network_is_saved_with_its_optimizer(x, tmp_path):
    """Its momentum, clip_norm and learning rate schedule: another epoch is the same bit for bit."""
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 100)
    network = make_network()
    optimizer = vae.ClippedSGD(schedule, clip_norm=0.3, momentum=0.9, nesterov=True)
    network.compile(optimizer=optimizer, run_eagerly=True)
    network.fit(x, batch_size=4, verbose=0)
    network.save(tmp_path / "vae.keras")
    loaded = keras.models.load_model(tmp_path / "vae.keras")
    assert type(loaded.optimizer) is vae.ClippedSGD
    assert loaded.optimizer.clip_norm == 0.3
    assert loaded.optimizer.get_config() == network.optimizer.get_config()
    assert loaded.optimizer.iterations == 2
    assert float(loaded.optimizer.learning_rate) == pytest.approx(float(schedule(2)))
    for one in (network, loaded):
        one.fit(x, batch_size=4, shuffle=False, verbose=0)
    for weight, expected in zip(loaded.weights, network.weights, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_clipped_sgd_clips_the_norm_of_each_variable():
    shapes = [(30, 40), (7,), ()]
    rng = np.random.default_rng(0)
    gradients = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    gradients[1] *= np.float32(0.01)  # too short to be clipped
    variables = [keras.Variable(np.ones(shape, np.float32)) for shape in shapes]
    vae.ClippedSGD(0.5, clip_norm=0.1).apply(gradients, variables)
    for variable, gradient in zip(variables, gradients, strict=True):
        factor = min(1, 0.1 / np.linalg.norm(gradient))
        np.testing.assert_allclose(variable, 1 - 0.5 * factor * gradient, rtol=1e-5)


# --- Edits: layers of one's own -----------------------------------------------------------------------


class PlainLayers(vae.VAE):
    """An encoder of Keras' layers, whose initializers have no seed."""

    def encoder_layers(self):
        return [keras.layers.Dense(30, "relu"), keras.layers.Dense(20)]


def assert_same_weights(network, other):
    for weight, expected in zip(network.weights, other.weights, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_layers_without_a_seed_are_reproducible():
    network = PlainLayers(seed=3)
    random.random()
    np.random.random()
    assert_same_weights(PlainLayers(seed=3), network)
    for layer, other in zip(network.encoder_hidden, PlainLayers(seed=4).encoder_hidden, strict=True):
        assert (layer.kernel.numpy() != other.kernel.numpy()).all()


@pytest.mark.parametrize("fails", [False, True])
def test_construction_leaves_the_global_state_as_it_was(fails):
    class Failing(PlainLayers):
        def decoder_layers(self):
            if fails:
                raise RuntimeError("this edit is wrong")
            return super().decoder_layers()

    keras.config.set_dtype_policy("mixed_float16")
    policy = keras.config.dtype_policy()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="this edit is wrong"):
                Failing()
        else:
            network = Failing()
            assert {weight.dtype for weight in network.weights} == {"float32"}
            assert network.decode(np.zeros((1, 2))).dtype == tf.float32
        assert keras.config.dtype_policy() is policy
    finally:
        keras.config.set_dtype_policy("float32")
    assert random.getstate() == python_state
    for now, before in zip(np.random.get_state(), numpy_state, strict=True):
        np.testing.assert_array_equal(now, before)


@keras.saving.register_keras_serializable("test_vae")
class Convolutions(vae.VAE):
    """Of images of 8 x 8 pixels."""

    def encoder_layers(self):
        return [
            keras.layers.Reshape((8, 8, 1)),
            keras.layers.Conv2D(4, 3, strides=2, padding="same", activation="elu"),
            keras.layers.Flatten(),
        ]

    def decoder_layers(self):
        return [
            keras.layers.Dense(4 * 4 * 2, "elu"),
            keras.layers.Reshape((4, 4, 2)),
            keras.layers.Conv2DTranspose(3, 3, strides=2, padding="same", activation="elu"),
            keras.layers.Flatten(),
        ]


def test_convolutions_are_trained_and_saved(x, tmp_path):
    images = np.round(x[:, :64])
    network = Convolutions(n_pixels=64)
    before = [weight.numpy() for weight in network.trainable_variables]
    network.compile(optimizer=keras.optimizers.Adam(0.01))
    history = network.fit(images, epochs=20, verbose=0).history
    assert history["negative_elbo"][-1] < history["negative_elbo"][0] - 2
    assert len(before) == 10  # kernels and biases of five layers
    for weight, old in zip(network.trainable_variables, before, strict=True):
        assert (weight.numpy() != old).any(), weight.path
    network.save(tmp_path / "vae.keras")
    loaded = keras.models.load_model(tmp_path / "vae.keras")
    assert type(loaded) is Convolutions
    assert_same_weights(loaded, network)
    np.testing.assert_array_equal(loaded.reconstruct(images), network.reconstruct(images))
    assert loaded.sample(3).shape == (3, 64)


class Normalized(vae.VAE):
    def encoder_layers(self):
        return [
            keras.layers.Dense(20),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Activation("relu"),
            keras.layers.Dense(20, "relu"),
            keras.layers.LayerNormalization(),
        ]


def test_moving_statistics_move_in_training_only(x):
    network = Normalized(n_hidden=20)
    dense, normalization, *_ = network.encoder_hidden
    activations = dense(x - network.mean_image).numpy()
    network.compile(optimizer="adam", run_eagerly=True)
    network.evaluate(x, verbose=0)
    network.negative_elbo(x, seed=SEED)
    network.log_marginal_likelihood(x, 10, seed=SEED)
    network.reconstruct(x)
    np.testing.assert_array_equal(normalization.moving_mean, np.zeros(20))
    np.testing.assert_array_equal(normalization.moving_variance, np.ones(20))
    network.fit(x, verbose=0)
    expected = 0.9 + 0.1 * activations.var(axis=0)
    np.testing.assert_allclose(normalization.moving_mean, 0.1 * activations.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(normalization.moving_variance, expected, rtol=1e-4)


def test_dropout_follows_only_layers_with_a_kernel(x, monkeypatch):
    layers = []
    dropout = vae.dropout

    def spy(h, keep_prob, seed, layer):
        layers.append(layer)
        return dropout(h, keep_prob, seed, layer)

    monkeypatch.setattr(vae, "dropout", spy)
    network = Normalized(n_hidden=20)
    layers.clear()
    network.negative_elbo(x, seed=SEED, keep_prob=0.7)
    assert layers == [0, 3, 5, 6]  # of the encoder's five layers and the decoder's two


def test_labels_of_each_image_reach_all_of_its_samples(x):
    class Conditional(vae.VAE):
        """The decoder's logits are the label, if it is known."""

        def decoder(self, z, labels=None, **options):
            logits = super().decoder(z, labels, **options)
            if labels is None:
                return logits
            return tf.zeros_like(logits) + tf.cast(labels, tf.float32)[:, None]

    network = make_network(Conditional)
    labels = tf.constant([3, 1, 4, 1, 5, 9, 2, 6])
    logits = network.decode_samples(tf.zeros((3, 8, 2)), labels)
    expected = np.tile(labels.numpy()[:, None], (3, 1, 784))
    np.testing.assert_array_equal(logits, expected)
    log_px, _ = network.importance_terms(vae.Batch(x, x, labels), 3, seed=SEED)
    np.testing.assert_allclose(log_px, network.likelihood.log_prob(x, expected.astype(np.float32)), rtol=1e-5)


# --- The marginal likelihood --------------------------------------------------------------------------


@pytest.mark.architecture
@pytest.mark.parametrize("n_importance", [1, 49, 50, 51, 130])
def test_log_marginal_likelihood_is_exact_if_images_do_not_depend_on_z(x, n_importance):
    """With q(z|x) = p(z) and a decoder that ignores z, every sample's weight is p(x)."""
    network = vae.VAE(dim_z=3, n_hidden=20, mean_image=np.full(784, 0.3), seed=0)
    network.encoder_output.kernel.assign(tf.zeros((20, 6)))
    network.decoder_output.kernel.assign(tf.zeros((20, 784)))
    expected = (x.numpy() * np.log(0.3) + (1 - x.numpy()) * np.log(0.7)).sum(axis=1)
    log_px = network.log_marginal_likelihood(x, n_importance, seed=SEED)
    np.testing.assert_allclose(log_px, expected, rtol=1e-5)


@pytest.mark.architecture
@pytest.mark.parametrize(
    ("kind", "prior", "reach"), [(vae.VAE, stats.norm, 5), (LaplaceVAE, stats.laplace, 10)]
)
def test_log_marginal_likelihood_against_quadrature(x, kind, prior, reach):
    """p(x) is the integral of p(x|z) p(z) over the latent plane."""
    x = x[:, :100]
    network = make_network(kind, n_pixels=100)
    axis, step = np.linspace(-10, 10, 201, dtype=np.float32, retstep=True)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    logits = network.decoder(z).numpy().astype(float)
    log_px_given_z = logits @ x.numpy().T.astype(float) - np.logaddexp(0, logits).sum(axis=1, keepdims=True)
    log_pz = prior.logpdf(z).sum(axis=1, keepdims=True)
    expected = special.logsumexp(log_px_given_z + log_pz, axis=0) + 2 * np.log(step)
    log_px = network.log_marginal_likelihood(x, 2_000, seed=SEED)
    assert abs(np.mean(log_px - expected)) < 0.15  # 0.1 is usual
    # The network's own quadrature, whose grid follows from q(z|x).
    mean = tf.fill((8, 2), reach - 6 * 0.1)
    log_var = tf.fill((8, 2), np.float32(2 * np.log(0.1)))
    log_px = network.log_marginal_likelihood_grid(x, mean, log_var)
    np.testing.assert_allclose(log_px, expected, atol=0.005)


@pytest.mark.parametrize(
    ("mean", "std", "reach", "n_points"),
    [(0, 0.5, 5, 201), (-6.71, 0.05, 7.01, 282), (1, 0.0201, 5, 499), (1, 0.001, 5, 1_001), (0, 2, 12, 481)],
)
def test_grid_of_the_quadrature_covers_the_posteriors(network, x, mean, std, reach, n_points, monkeypatch):
    """Of all points, p(x, z) is 1 here, so that log p(x) is the logarithm of the area."""
    columns = []

    def log_joint(x, z):
        columns.append(z.numpy())
        return tf.zeros((len(x), len(z)))

    monkeypatch.setattr(network, "log_joint", log_joint)
    means = np.array([[0, 0], [0, mean]], np.float32)
    log_vars = np.array([[-1, -1], [-1, 2 * np.log(std)]], np.float32)
    log_px = network.log_marginal_likelihood_grid(x[:2], means, log_vars)
    axis = np.linspace(-reach, reach, n_points)
    plane = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    np.testing.assert_allclose(columns, plane, atol=1e-5)
    np.testing.assert_allclose(log_px, 2 * np.log(2 * reach * n_points / (n_points - 1)), rtol=1e-5)


def test_log_importance_weights_average_to_the_elbo(network, x):
    """The ELBO's KL divergence has a closed form, that of the weights is sampled."""
    n = 2_000
    x = x[:4]
    log_weights = network.log_importance_weights(x, n, seed=SEED).numpy().astype(float)
    many = tf.tile(x, (n, 1))
    negative_elbos, _, _ = network.negative_elbo(many, seed=SEED + 1)
    elbos = -negative_elbos.numpy().astype(float).reshape(n, 4)
    standard_error = np.sqrt((log_weights.var(axis=0) + elbos.var(axis=0)) / n)
    assert (np.abs(log_weights.mean(axis=0) - elbos.mean(axis=0)) < 5 * standard_error).all()
    log_px = network.log_marginal_likelihood(x, n, seed=SEED).numpy()
    assert (log_px > elbos.mean(axis=0) + 5 * standard_error).all()


@pytest.mark.architecture
@pytest.mark.parametrize("n_importance", [1, 130])
def test_log_marginal_likelihood_uses_as_many_samples_as_requested(network, x, n_importance, monkeypatch):
    chunks = []

    def log_importance_weights(*arguments, **options):
        log_weights = vae.VAE.log_importance_weights(network, *arguments, **options)
        chunks.append(log_weights.numpy())
        return log_weights

    monkeypatch.setattr(network, "log_importance_weights", log_importance_weights)
    log_px = network.log_marginal_likelihood(x, n_importance, seed=SEED)
    drawn = np.concatenate(chunks)
    assert len(drawn) < n_importance + len(chunks)  # excess samples of the last chunk do not count
    assert len(np.unique(drawn[:, 0])) == len(drawn)  # no chunk has the samples of another
    expected = special.logsumexp(drawn[:n_importance], axis=0) - np.log(n_importance)
    np.testing.assert_allclose(log_px, expected, rtol=1e-6)


@pytest.mark.architecture
def test_log_marginal_likelihood_draws_z_given_the_corrupted_inputs(network, x):
    batch = vae.Batch(x, x[::-1])
    log_weights = network.log_importance_weights(batch, 3, seed=SEED)
    q = vae.tile_samples(network.encoder(x[::-1]), 3)
    z = network.posterior.sample(q, SEED).numpy()
    logits = network.decoder(z.reshape(-1, 2)).numpy().reshape(3, 8, 784)
    log_ratio = stats.norm.logpdf(z).sum(axis=-1) - network.posterior.log_prob(z, q)
    np.testing.assert_allclose(log_weights, vae.Bernoulli().log_prob(x, logits) + log_ratio, rtol=1e-5)
    reversed_ = network.log_marginal_likelihood(batch, 1, seed=SEED)
    assert (np.abs(reversed_ - network.log_marginal_likelihood(x, 1, seed=SEED)) > 1e-3).any()


@pytest.mark.architecture
def test_log_joint_is_of_every_image_with_every_latent_vector(network, x):
    z = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    expected = [vae.Bernoulli().log_prob(image, network.decoder(z)) for image in x]
    expected += stats.norm.logpdf(z).sum(axis=1)
    np.testing.assert_allclose(network.log_joint(x, z), expected, rtol=1e-5)


def test_active_units_are_those_that_vary():
    mean = np.random.default_rng(0).normal(size=(10_000, 4)) * [1, 0.11, 0.09, 0] + [0, 0, 0, 5]
    assert int(vae.active_units(tf.constant(mean))) == 2


# --- Random numbers -----------------------------------------------------------------------------------


@pytest.mark.architecture
@pytest.mark.parametrize("n_more", [0, 1, 6])
def test_random_numbers_for_different_purposes_have_different_streams(x, n_more, monkeypatch):
    """However many hidden layers there are, each of which has dropout."""
    streams = []
    keep_probs = []
    uniform = vae.uniform
    dropout = vae.dropout

    def record_stream(shape, seed, stream):
        streams.append((*np.array(seed), int(stream)))
        return uniform(shape, seed, stream)

    def record_keep_prob(h, keep_prob, seed, layer):
        keep_probs.append(keep_prob)
        return dropout(h, keep_prob, seed, layer)

    class Deeper(vae.VAE):
        def encoder_layers(self):
            more = [vae.hidden_layer(20, "tanh") for _ in range(n_more)]
            return [*super().encoder_layers(), *more]

        def decoder_layers(self):
            more = [vae.hidden_layer(20, "tanh") for _ in range(n_more)]
            return [*super().decoder_layers(), *more]

    network = make_network(Deeper)
    n_hidden_layers = 4 + 2 * n_more
    monkeypatch.setattr(vae, "uniform", record_stream)
    monkeypatch.setattr(vae, "dropout", record_keep_prob)
    vae.binarize(x, SEED)
    vae.salt_and_pepper(x, 0.5, SEED)
    network.prior.sample(8, 2, SEED)
    network.negative_elbo(x, seed=SEED, keep_prob=0.7)
    assert keep_probs == n_hidden_layers * [0.7]
    network.log_marginal_likelihood(x, 130, seed=SEED)  # in three chunks
    assert len(streams) == 3 + n_hidden_layers + 1 + 3
    assert len(set(streams)) == len(streams)


@pytest.mark.architecture
def test_draws_for_different_purposes_are_independent():
    """Each function, with the same seed, shows whether its uniform draws are below one half."""
    shape = (200, 100)
    grey = tf.fill(shape, 0.5)
    zeros = tf.zeros(shape)
    below_half = {
        "z": vae.reparameterize(zeros, zeros, SEED) < 0,
        "upper z": vae.reparameterize(zeros, zeros, SEED, vae.Stream.UPPER_LATENT) < 0,
        "prior": vae.StandardNormal().sample(*shape, SEED) < 0,
        "noise": vae.salt_and_pepper(grey, 1.0, SEED) == 0,
        "binarization": vae.binarize(grey, SEED) == 1,
    }
    for layer in range(10):
        below_half[f"dropout {layer}"] = vae.dropout(tf.ones(shape), 0.5, SEED, layer) > 0
    draws = np.array(list(below_half.values())).reshape(len(below_half), -1)
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 5 / np.sqrt(draws.shape[1]), list(below_half)
    # A sampled image takes the stream of binarization: no image is both.
    sampled = vae.Bernoulli().sample(zeros, SEED)
    np.testing.assert_array_equal(sampled == 1, below_half["binarization"])


def test_uniform_draws_are_uniform_and_independent():
    u = vae.uniform((1_001, 501), SEED, vae.Stream.NOISE).numpy()  # an odd number of them
    assert u.shape == (1_001, 501)
    assert u.min() == 0.5 / 2**16  # centred: 0 would be below any probability above 0
    assert u.max() == 1 - 0.5 / 2**16
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    n = u.size // 2
    for lag in (1, n, n + 1):  # two draws come from one random integer
        assert abs(np.corrcoef(u.ravel()[:-lag], u.ravel()[lag:])[0, 1]) < 4 / np.sqrt(n)


def test_normal_draws_are_normal():
    draws = vae.normal((1_001, 501), SEED, vae.Stream.PRIOR).numpy()
    assert draws.shape == (1_001, 501)
    assert stats.kstest(draws.ravel(), stats.norm.cdf).pvalue > 0.01
    assert len(np.unique(draws)) > 0.9 * draws.size  # a uniform of 16 bits would give 65,536 values
    assert np.abs(draws).max() < -stats.norm.ppf(0.5**24) + 0.1


def test_dropout_keeps_the_mean_and_a_share_of_the_units():
    h = tf.random.stateless_uniform((1_000, 500), SEED, 0.5, 1.5)
    dropped = vae.dropout(h, 0.9, SEED, 1).numpy()
    kept = dropped != 0
    assert abs(kept.mean() - 0.9) < 5 * np.sqrt(0.9 * 0.1 / kept.size)
    assert abs(dropped.mean() - h.numpy().mean()) < 5 * dropped.std() / np.sqrt(kept.size)
    np.testing.assert_allclose(dropped[kept], h.numpy()[kept] / 0.9, rtol=1e-6)
    np.testing.assert_array_equal(vae.dropout(h, tf.constant(0.9), SEED, 1), dropped)


@pytest.mark.parametrize("keep_prob", [None, 1, 1.0])
def test_without_dropout_nothing_is_drawn(keep_prob):
    h = tf.ones((10, 500))
    assert vae.dropout(h, keep_prob, None, 1) is h


def test_dropout_differs_between_layers_and_seeds():
    h = tf.ones((10, 500))
    first = vae.dropout(h, 0.5, SEED, 1).numpy()
    other_layer = vae.dropout(h, 0.5, SEED, 2).numpy()
    other_seed = vae.dropout(h, 0.5, SEED + 1, 1).numpy()
    for other in (other_layer, other_seed):
        assert 0.4 < (first == other).mean() < 0.6


@pytest.mark.architecture
def test_binarize_draws_pixels_with_their_grey_level_as_probability():
    grey = np.repeat([0.0, 0.2, 0.7, 1.0], 196).astype(np.float32)
    x = tf.constant(np.tile(grey, (2_000, 1)))
    drawn = vae.binarize(x, SEED).numpy()
    assert set(np.unique(drawn)) == {0, 1}
    for level in (0, 0.2, 0.7, 1):
        pixels = drawn[:, grey == np.float32(level)]
        standard_error = np.sqrt(level * (1 - level) / pixels.size)
        assert abs(pixels.mean() - level) <= 5 * standard_error
    assert (drawn != vae.binarize(x, SEED + 1).numpy()).mean() > 0.1
    sampled = vae.Bernoulli().sample(special.logit(x), SEED).numpy()
    assert (sampled != drawn).mean() < 1e-5  # except for rounding
    noisy = vae.salt_and_pepper(tf.fill((2_000, 784), 0.5), 0.5, SEED).numpy()
    dark = grey == np.float32(0.2)
    white_and_peppered = (drawn[:, dark] == 1) & (noisy[:, dark] == 0)
    assert white_and_peppered.mean() == pytest.approx(0.2 * 0.25, abs=0.003)  # independent of the noise


@pytest.mark.architecture
def test_salt_and_pepper_makes_a_share_of_the_pixels_black_or_white():
    x = tf.fill((1_000, 784), 0.5)
    noisy = vae.salt_and_pepper(x, 0.3, SEED).numpy()
    tolerance = 5 * np.sqrt(0.15 * 0.85 / noisy.size)
    assert abs((noisy == 0).mean() - 0.15) < tolerance
    assert abs((noisy == 1).mean() - 0.15) < tolerance
    assert set(np.unique(noisy)) == {0, 0.5, 1}
    assert (vae.salt_and_pepper(x, 1.0, SEED).numpy() != 0.5).all()
