"""The other models: what each changes, against an independent computation; the program runs each."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_mentions, one_line, read_log
from scipy import integrate, special, stats

import run_main
import vae

SEED = tf.constant([3, 4])
OPTIONS = {"iwae": {"n_samples": 5}, "ladder": {"dim_z_lower": 4}, "stein": {"n_samples": 6}}
WITHOUT_LOG_JOINT = ("ladder", "conditional")  # p(x|z) would be an integral over z_1, a sum over the classes
PAPERS = [name for name in run_main.MODELS if name != "vae"]


def model_class(name):
    return getattr(vae, run_main.MODELS[name].class_name)


def make_network(name, **options):
    """Returns a small network of a model whose q(z|x) differs from the prior."""
    mean_image = np.random.default_rng(0).random(784).astype(np.float32)
    defaults = {"dim_z": 2, "n_hidden": 20, "mean_image": mean_image, "seed": 7} | OPTIONS.get(name, {})
    network = model_class(name)(**defaults | options)
    network.encoder_output.kernel.assign(6 * network.encoder_output.kernel)
    return network


@pytest.fixture(scope="module")
def x():
    """Eight images of noise."""
    return tf.constant(np.random.default_rng(1).random((8, 784)), tf.float32)


@pytest.fixture(scope="module")
def digits(few_digits):
    """2,000 real digits of 7 x 7 black or white pixels: q(z|x) is wide enough for quadrature."""
    tiles = few_digits.train_images.reshape(-1, 7, 4, 7, 4) / 255
    return (tiles.mean(axis=(2, 4)) > 0.35).reshape(-1, 49).astype(np.float32)


@pytest.fixture(scope="module")
def train(digits, few_digits):
    """A function that returns a small network of a model, trained on the digits, and its history."""
    trained = {}

    def train(name, **options):
        key = (name, *options)
        if key not in trained:
            network = make_network(name, n_hidden=64, mean_image=digits.mean(axis=0), n_pixels=49, **options)
            adam = keras.optimizers.Adam(0.003)
            network.compile(optimizer=adam, jit_compile=False, steps_per_execution=20)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(vae.Labels, "HINGE_WEIGHT", 1.0)  # of fewer pixels; or q(z|x) would be narrow
                history = network.fit(
                    digits, few_digits.train_labels, batch_size=100, epochs=12, shuffle=False, verbose=0
                )
            trained[key] = (network, history.history)
        return trained[key]

    return train


def training_loss(network, x, labels=None, seed=SEED, kl_weight=1.0):
    """Returns the loss to train with and its two terms to log: (batch,) each. Without dropout."""
    return network.training_loss(
        vae.as_batch(vae.Batch(x, x, labels)), seed=seed, keep_prob=1.0, kl_weight=kl_weight
    )


def gradient(network, x, labels=None, seed=SEED):
    """Returns the gradient of the mean loss in one vector, with zeros where a weight does not matter."""
    with tf.GradientTape() as tape:
        loss, _, _ = training_loss(network, x, labels, seed)
        loss = tf.reduce_mean(loss)
    gradients = tape.gradient(loss, network.trainable_variables, unconnected_gradients="zero")
    return np.concatenate([tf.reshape(part, -1) for part in gradients])


def n_weights(layers):
    """Returns how many numbers the weights of some layers are."""
    return sum(layer.count_params() for layer in layers)


def log_px_by_importance_sampling(network, x, n_importance=2_000):
    @tf.function(autograph=False)
    def estimate():
        return network.log_marginal_likelihood(x, n_importance, seed=SEED)

    return estimate().numpy()


def squared_error(images, targets):
    return np.mean((images - targets) ** 2)


# --- All models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
def test_fit_lowers_the_negative_elbo(train, name):
    _, history = train(name)
    assert set(history) == {"negative_elbo", "reconstruction", "kl"}
    losses = history["negative_elbo"]
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(losses, np.add(history["reconstruction"], history["kl"]), rtol=1e-5)


@pytest.mark.parametrize("name", PAPERS)
def test_evaluate_reports_the_negative_elbo(train, digits, name):
    network, _ = train(name)
    labels = np.full(25, -1)
    found = network.evaluate(digits[:25], labels, batch_size=10, return_dict=True, verbose=0)
    parts = (digits[:10], digits[10:20], digits[20:25])
    terms = [network.negative_elbo(part, seed=(0, 0)) for part in parts]
    expected = np.concatenate(terms, axis=1).mean(axis=1)
    names = ("negative_elbo", "reconstruction", "kl")
    assert found == pytest.approx(dict(zip(names, expected, strict=True)), rel=1e-4)


@pytest.mark.parametrize("name", PAPERS)
def test_default_arguments_are_complete(x, name):
    network = model_class(name)()
    before = [variable.numpy() for variable in network.trainable_variables]
    network.compile(optimizer="adam", run_eagerly=True)
    network.fit(x, np.arange(8), verbose=0)
    for variable, old in zip(network.trainable_variables, before, strict=True):
        assert (variable.numpy() != old).any(), variable.path


@pytest.mark.parametrize("name", run_main.MODELS)
def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match="n_sampels"):
        model_class(name)(n_sampels=5)


def test_arguments_of_another_model_are_refused():
    with pytest.raises(TypeError, match="n_samples"):
        vae.Convolutional(n_samples=5)
    with pytest.raises(TypeError, match="dim_z_lower"):
        vae.IWAE(dim_z_lower=5)


@pytest.mark.parametrize("name", PAPERS)
def test_saved_network_is_the_same_when_loaded(train, digits, tmp_path, name):
    network, _ = train(name)
    network.save(tmp_path / "vae.keras")
    loaded = keras.models.load_model(tmp_path / "vae.keras")
    assert type(loaded) is type(network)
    assert loaded.get_config() == network.get_config()
    expected = network.negative_elbo(digits[:8], seed=SEED)
    np.testing.assert_array_equal(loaded.negative_elbo(digits[:8], seed=SEED), expected)
    for found, wanted in zip(
        training_loss(loaded, digits[:8], tf.range(8)),
        training_loss(network, digits[:8], tf.range(8)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", run_main.MODELS)
def test_logged_terms_do_not_depend_on_the_kl_weight(x, name):
    network = make_network(name)
    labels = tf.zeros(8, tf.int32)
    _, reconstruction, kl = training_loss(network, x, labels)
    _, other_reconstruction, other_kl = training_loss(network, x, labels, kl_weight=3.0)
    np.testing.assert_allclose(reconstruction + kl, other_reconstruction + other_kl, rtol=1e-5)


TOLERANCES = {
    "iwae": 0.03,
    "stick_breaking": 0.03,
    "least_squares": 0.1,
    "stein": 0.2,
    "labels": 0.2,
    "convolutional": 0.1,
}


@pytest.mark.architecture
@pytest.mark.parametrize("name", PAPERS)
def test_log_px_is_above_the_elbo_and_agrees_with_quadrature(train, digits, name):
    network, _ = train(name)
    x = digits[:20]
    log_px = log_px_by_importance_sampling(network, x)
    negative_elbo, _, _ = network.negative_elbo(np.tile(x, (500, 1)), seed=SEED)
    elbos = -negative_elbo.numpy().reshape(500, 20)
    standard_error = elbos.std(axis=0) / np.sqrt(500)
    assert (log_px > elbos.mean(axis=0) - 3 * standard_error).all()
    assert np.mean(log_px - elbos.mean(axis=0)) > 0.05
    if name not in WITHOUT_LOG_JOINT:
        mean, log_var = network.encoder(x)
        exact = network.log_marginal_likelihood_grid(x, mean, log_var)
        assert np.mean(log_px) == pytest.approx(np.mean(exact), abs=TOLERANCES[name])


# --- Importance-weighted ------------------------------------------------------------------------------


def test_iwae_with_one_sample_has_the_gradient_of_the_elbo_on_average(x):
    mean_image = np.mean(x[:, :100], axis=0)
    iwae = make_network("iwae", n_samples=1, n_pixels=100, mean_image=mean_image)
    elbo = make_network("vae", n_pixels=100, mean_image=mean_image)
    many = tf.repeat(x[:2, :100], 500, axis=0)
    first = np.array([gradient(iwae, many, seed=[i, 0]) for i in range(20)])
    second = np.array([gradient(elbo, many, seed=[i, 0]) for i in range(20)])
    error = np.sqrt((first.var(axis=0) + second.var(axis=0)) / 20)
    difference = np.abs(first.mean(axis=0) - second.mean(axis=0))
    assert np.mean(difference[error > 0] < 3 * error[error > 0]) > 0.97
    assert np.linalg.norm(difference) < 0.1 * np.linalg.norm(second.mean(axis=0))


def test_iwae_bound_rises_with_the_samples_towards_log_px(train, digits):
    many = np.repeat(digits[:8], 100, axis=0)
    network, _ = train("iwae")
    log_px = np.mean(network.log_marginal_likelihood_grid(digits[:8], *network.encoder(digits[:8])))
    bounds = []
    for n_samples in (1, 5, 50):
        network.n_samples = n_samples
        loss, _, _ = training_loss(network, many)
        bounds.append(-np.mean(loss))
    network.n_samples = 5
    assert bounds[0] + 0.1 < bounds[1]
    assert bounds[1] + 0.1 < bounds[2]
    assert bounds[2] < log_px + 0.01
    assert log_px - bounds[2] < 0.2


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_iwae_loss_and_its_gradient_are_those_of_the_bound(x, kl_weight):
    """With a weight on the KL divergence, of the bound with log p(z) and log q(z|x) weighted."""
    network = make_network("iwae", n_samples=5)
    with tf.GradientTape() as tape:
        log_px, log_ratio = network.importance_terms(x, 5, seed=SEED)
        log_weights = log_px + kl_weight * log_ratio
        minus_bound = np.log(5) - tf.reduce_logsumexp(log_weights, axis=0)
        mean = tf.reduce_mean(minus_bound)
    expected = tape.gradient(mean, network.trainable_variables)
    with tf.GradientTape() as tape:
        loss, reconstruction, kl = training_loss(network, x, kl_weight=kl_weight)
        mean = tf.reduce_mean(loss)
    np.testing.assert_allclose(loss, minus_bound, rtol=1e-5)
    for found, wanted in zip(tape.gradient(mean, network.trainable_variables), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    weights = special.softmax(log_weights, axis=0)
    bound = special.logsumexp(log_px + log_ratio, axis=0) - np.log(5)
    np.testing.assert_allclose(reconstruction, -np.sum(weights * log_px, axis=0), rtol=1e-5)
    np.testing.assert_allclose(reconstruction + kl, -bound, rtol=1e-5)


# --- Least squares ------------------------------------------------------------------------------------


def make_gaussian_pixels():
    """Returns the likelihood with a std of 0.3."""
    likelihood = vae.GaussianPixels()
    likelihood.raw_std.assign(np.log(255 * 0.3 - 1))
    return likelihood


def test_least_squares_density_integrates_to_one():
    likelihood = make_gaussian_pixels()
    logits = tf.constant([[0.4]])

    def density(x):
        log_prob = likelihood.log_prob(tf.constant([[x]], tf.float32), logits)
        return float(tf.exp(log_prob)[0])

    assert integrate.quad(density, -3, 4)[0] == pytest.approx(1, abs=1e-4)


def test_least_squares_density_against_scipy(x):
    logits = np.random.default_rng(0).normal(size=(8, 784)).astype(np.float32)
    expected = stats.norm(special.expit(logits), 0.3).logpdf(x).sum(axis=1)
    np.testing.assert_allclose(make_gaussian_pixels().log_prob(x, logits), expected, rtol=1e-5)


def test_least_squares_table_has_the_densities_of_all_pairs(x):
    likelihood = make_gaussian_pixels()
    logits = np.random.default_rng(0).normal(size=(5, 784)).astype(np.float32)
    expected = [likelihood.log_prob(image, logits) for image in x]
    np.testing.assert_allclose(likelihood.log_prob_table(x, logits), expected, rtol=1e-4)


def test_least_squares_learns_its_std(train, digits):
    """Namely that of the remaining errors, for which the likelihood is highest."""
    network, _ = train("least_squares")
    _, reconstruction, _ = network.negative_elbo(digits, seed=SEED)
    z = network.posterior.sample(network.encoder(digits), SEED)
    error = squared_error(network.decode(z), digits)
    std = np.exp(network.likelihood.log_std)
    assert std == pytest.approx(np.sqrt(error), rel=0.05)
    expected = 49 * (error / (2 * std**2) + 0.5 * np.log(2 * np.pi * std**2))
    assert np.mean(reconstruction) == pytest.approx(expected, rel=1e-4)


# --- Sticks -------------------------------------------------------------------------------------------


def test_sticks_have_the_prior_of_the_paper_and_sum_to_one():
    network = make_network("stick_breaking")
    z = np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float32)
    sticks = network.sticks(z).numpy().astype(float)
    assert sticks.shape == (20_000, 4)
    np.testing.assert_allclose(sticks.sum(axis=1), 1, atol=1e-5)
    left = 1 - np.cumsum(sticks, axis=1)[:, :-1]
    left_before = np.concatenate([np.ones((20_000, 1)), left[:, :-1]], axis=1)
    fractions = sticks[:, :-1] / left_before
    for column in fractions.T:
        assert stats.kstest(column, stats.beta(1, network.CONCENTRATION).cdf).pvalue > 0.001


def test_kl_divergence_of_sticks_is_that_of_the_fractions():
    """By Monte Carlo over v, with the density of a transformed Gaussian and that of the Beta distribution."""
    network = make_network("stick_breaking")
    mean = 0.7
    std = 0.4
    z = np.random.default_rng(0).normal(mean, std, 200_000)
    alpha = network.CONCENTRATION
    v = -np.expm1(stats.norm.logsf(z) / alpha)
    slope = stats.norm.pdf(z) / stats.norm.sf(z) * (1 - v) / alpha  # dv/dz
    draws = stats.norm.logpdf(z, mean, std) - np.log(slope) - stats.beta.logpdf(v, 1, alpha)
    q = (np.float32([[mean]]), np.float32([[2 * np.log(std)]]))
    kl = network.prior.kl_divergence(network.posterior, q, None)
    assert draws.mean() == pytest.approx(float(kl[0]), abs=5 * draws.std() / np.sqrt(len(draws)))
    sticks = network.sticks(tf.constant(z[:5, None], tf.float32))
    np.testing.assert_allclose(sticks[:, 0], v[:5], rtol=1e-3)


def test_sticks_and_their_gradients_are_finite_far_from_the_origin():
    network = make_network("stick_breaking")
    axis = np.linspace(-30, 30, 121, dtype=np.float32)
    z = tf.constant(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(z)
        sticks = network.sticks(z)
        log_px = network.likelihood.log_prob(tf.ones(784), network.decoder(z))
    assert np.isfinite(sticks).all()
    np.testing.assert_allclose(np.sum(sticks, axis=1), 1, atol=1e-5)
    for stick in (0, 1, 2):
        with tf.GradientTape() as tape_of_stick:
            tape_of_stick.watch(z)
            values = network.sticks(z)[:, stick]
        assert np.isfinite(tape_of_stick.gradient(values, z)).all()
    assert np.isfinite(tape.gradient(log_px, z)).all()


def test_decoder_sees_the_sticks(x):
    network = make_network("stick_breaking")
    z = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    assert network.decoder_hidden[0].kernel.shape == (3, 20)
    h = network.sticks(z)
    for layer in network.decoder_hidden:
        h = layer(h)
    np.testing.assert_array_equal(network.decoder(z), network.decoder_output(h))
    np.testing.assert_array_equal(network.decode(z), tf.sigmoid(network.decoder_output(h)))


# --- Ladder -------------------------------------------------------------------------------------------


def test_product_of_two_gaussians_is_narrower_than_either():
    network = make_network("ladder")
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 2, 5, 4)).astype(np.float32)
    mean, log_var = np.array(network.precision_weighted_product(one, other))
    assert (log_var < np.minimum(one[1], other[1])).all()

    def log_ratio(z):
        """The product of the densities over the density of the result: the same for every z."""
        product = vae.log_normal(z, *one) + vae.log_normal(z, *other)
        return product - vae.log_normal(z, mean, log_var)

    z = rng.normal(size=(5, 4)).astype(np.float32)
    np.testing.assert_allclose(log_ratio(z), log_ratio(2 * z), rtol=1e-4)
    uninformative = (one[0], one[1] + 50)
    np.testing.assert_allclose(network.precision_weighted_product(uninformative, other), other, atol=1e-5)


def test_kl_divergence_of_a_ladder_is_the_mean_of_the_sampled_one(x):
    network = make_network("ladder")
    n = 20_000
    many = tf.repeat(x[:1], n, axis=0)
    _, reconstruction, kl = np.asarray(network.negative_elbo(many, seed=SEED), float)
    log_px, log_ratio = np.asarray(network.importance_terms(x[:1], n, seed=SEED), float)
    for closed, sampled in ((kl, -log_ratio), (reconstruction, -log_px)):
        standard_error = np.sqrt((closed.var() + sampled.var()) / n)
        assert abs(closed.mean() - sampled.mean()) < 5 * standard_error


def test_log_px_of_a_ladder_agrees_with_quadrature_over_both_layers(train, digits):
    """p(x) is the integral of p(x|z_1) p(z_1|z_2) p(z_2), here with one number in each layer."""
    network, _ = train("ladder", dim_z=1, dim_z_lower=1)
    x = digits[:8]
    z_2, step_2 = np.linspace(-6, 6, 301, dtype=np.float32, retstep=True)
    mean, log_var = network.top_down(z_2[:, None])
    reach = np.max(np.abs(mean) + 6 * np.exp(log_var / 2))
    z_1, step_1 = np.linspace(-reach, reach, 2_001, dtype=np.float32, retstep=True)
    log_prior = stats.norm(mean, np.exp(log_var / 2)).logpdf(z_1) + stats.norm.logpdf(z_2)[:, None]
    log_prior = special.logsumexp(log_prior, axis=0) + np.log(step_2)  # log p(z_1)
    logits = vae.VAE.decoder(network, z_1[:, None])
    log_px_given_z = network.likelihood.log_prob_table(x, logits)
    expected = special.logsumexp(log_px_given_z + log_prior, axis=1) + np.log(step_1)
    log_px = log_px_by_importance_sampling(network, x, 5_000)
    np.testing.assert_allclose(log_px, expected, atol=0.1)
    assert not network.has_log_joint


@pytest.mark.architecture
def test_ladder_reports_what_each_layer_holds(train, digits):
    network, _ = train("ladder")
    batch = vae.Batch(digits[:200], digits[:200])
    measured = network.test_metrics(batch)
    mean, log_var = np.asarray(network.encoder(digits[:200]), float)
    kl = 0.5 * np.sum(mean**2 + np.exp(log_var) - log_var - 1, axis=1)
    assert measured["test_kl_upper"] == pytest.approx(kl.mean(), rel=1e-4)
    _, _, kl = network.negative_elbo(batch, seed=SEED)
    assert measured["test_kl_upper"] < np.mean(kl) - 0.5

    bottom_up_1, (mean_2, _) = network.bottom_up(digits[:200])
    (mean, log_var), (prior_mean, prior_log_var) = np.array([bottom_up_1, network.top_down(mean_2)], float)
    precision = np.exp(-log_var)
    prior_precision = np.exp(-prior_log_var)
    mean_1 = (precision * mean + prior_precision * prior_mean) / (precision + prior_precision)
    assert measured["active_units_lower"] == np.sum(mean_1.var(axis=0) > 0.01)
    assert measured["active_units_lower"] > 0


@pytest.mark.architecture
def test_all_of_the_kl_divergence_is_in_the_upper_layer_if_the_lower_encoder_is_uninformative(x):
    network = make_network("ladder")
    network.encoder_output.bias.assign([0.0] * 4 + [50.0] * 4)
    measured = network.test_metrics(vae.Batch(x, x))
    _, _, kl = network.negative_elbo(x, seed=SEED)
    assert measured["test_kl_upper"] == pytest.approx(np.mean(kl), rel=1e-4)


def test_ladder_trains_with_the_elbo_or_the_importance_weighted_bound(x):
    network = make_network("ladder")
    for found, expected in zip(training_loss(network, x), network.negative_elbo(x, seed=SEED), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    network.n_samples = 5
    loss, reconstruction, kl = training_loss(network, x, kl_weight=0.5)
    log_px, log_ratio = np.array(network.importance_terms(x, 5, seed=SEED), float)
    np.testing.assert_allclose(
        loss, np.log(5) - special.logsumexp(log_px + 0.5 * log_ratio, axis=0), rtol=1e-5
    )
    bound = special.logsumexp(log_px + log_ratio, axis=0) - np.log(5)
    np.testing.assert_allclose(reconstruction + kl, -bound, rtol=1e-5)


def test_ladder_reconstructs_through_both_layers(train, digits):
    network, _ = train("ladder")
    x = digits[:200]
    both = network.reconstruct(x)
    upper = network.decode(network.encode(x))
    assert both.shape == upper.shape == (200, 49)
    assert squared_error(both, x) < 0.95 * squared_error(upper, x)


def test_ladder_samples_both_layers(monkeypatch):
    """z_1 is a draw from p(z_1|z_2), not its mean. The decoder is replaced, so that z_1 is seen."""
    network = make_network("ladder")
    network.z_1_prior_output.kernel.assign(10 * network.z_1_prior_output.kernel)

    def show(z, *arguments, **options):
        return z

    monkeypatch.setattr(network, "decoder", show)
    z_2, z_1 = network.sample_with_latents(5_000, SEED)
    np.testing.assert_array_equal(z_2, network.prior.sample(5_000, 2, SEED))
    mean, log_var = network.top_down(z_2)
    noise = ((z_1 - mean) / tf.exp(log_var / 2)).numpy()
    for unit in noise.T:
        assert stats.kstest(unit, stats.norm.cdf).pvalue > 1e-3
    correlations = np.corrcoef(np.concatenate([noise, z_2], axis=1).T) - np.eye(6)
    assert np.abs(correlations).max() < 5 / np.sqrt(5_000)  # the noise is not that of z_2


# --- Stein --------------------------------------------------------------------------------------------


def test_svgd_direction_against_numpy():
    rng = np.random.default_rng(0)
    n = 7
    z = rng.normal(size=(n, 3, 2))
    score = rng.normal(size=(n, 3, 2))
    expected = np.zeros_like(z)
    for image in range(3):
        particles = z[:, image]
        squared = np.sum((particles[:, None] - particles) ** 2, axis=-1)
        h = squared.sum() / (n * (n - 1))  # the mean over all pairs of different particles
        for j in range(n):
            for i in range(n):
                kernel = np.exp(-squared[i, j] / h)
                repulsion = 2 / h * (particles[j] - particles[i]) * kernel
                expected[j, image] += (kernel * score[i, image] + 0.5 * repulsion) / n
    found = vae.svgd_direction(tf.constant(z, tf.float32), tf.constant(score, tf.float32), 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_svgd_directions_vanish_on_average_at_the_posterior():
    """Stein's identity: for n particles of N(0, I), E[phi(z) . z] is -d / n, from their own kernels alone."""
    n = 100
    z = tf.constant(np.random.default_rng(0).normal(size=(n, 200, 2)), tf.float32)
    along = tf.reduce_sum(vae.svgd_direction(z, -z) * z, axis=-1).numpy()
    means = along.mean(axis=0)  # of each set of particles
    standard_error = means.std() / np.sqrt(len(means))
    assert means.mean() == pytest.approx(-2 / n, abs=4 * standard_error)
    assert standard_error < 0.2 * 2 / n
    assert np.abs(along).mean() > 2 * 2 / n


@pytest.mark.parametrize(("n", "low", "high"), [(20, 0.8, 1.1), (60, 0.85, 1.1)])
def test_svgd_particles_have_the_variance_of_a_known_gaussian(n, low, high):
    z = tf.constant(np.random.default_rng(0).normal(2, 0.3, size=(n, 10, 2)), tf.float32)

    @tf.function
    def step(z):
        return z + 0.5 * vae.svgd_direction(z, -z)

    for _ in range(500):
        z = step(z)
    assert abs(np.mean(z)) < 0.05
    assert low < np.mean(np.var(z, axis=0)) < high


def test_stein_particles_share_the_noise_of_all_images(x):
    """As in the paper. Between particles, it differs."""
    network = make_network("stein")
    same = tf.repeat(x[:1], 5, axis=0)
    particles = network.particles(same, 6, seed=SEED).numpy()
    assert particles.shape == (6, 5, 2)
    np.testing.assert_allclose(particles, particles[:, :1].repeat(5, axis=1), rtol=1e-5)
    distances = np.linalg.norm(particles[:, None, 0] - particles[None, :, 0], axis=-1)
    assert (distances[~np.eye(6, dtype=bool)] > 0.01).all()


def test_stein_encoder_is_the_gaussian_fitted_to_particles(train, digits):
    network, _ = train("stein")
    x = digits[:8]
    particles = network.particles(x, network.FITTED, seed=network.FITTED_SEED).numpy()
    mean, log_var = network.encoder(x, keep_prob=0.5, seed=SEED)
    np.testing.assert_allclose(mean, particles.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_var), particles.var(axis=0) + 1e-6, rtol=1e-3)


def test_stein_encoder_is_the_same_when_compiled(x):
    network = make_network("stein")
    compiled = tf.function(network.encoder, jit_compile=True)
    np.testing.assert_allclose(compiled(x), network.encoder(x), rtol=1e-4, atol=1e-5)


def record_directions(monkeypatch):
    """Returns a list, to which svgd_direction adds what it returns."""
    directions = []
    svgd_direction = vae.svgd_direction

    def recorder(*arguments):
        directions.append(svgd_direction(*arguments))
        return directions[-1]

    monkeypatch.setattr(vae, "svgd_direction", recorder)
    return directions


def log_likelihood_of_particles(network, x, z):
    """Returns log p(x|z), (n, batch), a particle of each image at a time."""
    return tf.stack([network.likelihood.log_prob(x, network.decoder(part)) for part in tf.unstack(z)])


def test_stein_trains_the_decoder_on_the_error_of_all_particles(x, monkeypatch):
    """Where particles are at rest, the encoder gets no gradient, and the decoder that of the error."""

    def no_direction(z, score, repulsion):
        return tf.zeros_like(z)

    network = make_network("stein")
    n_encoder = n_weights(network.encoder_hidden)
    monkeypatch.setattr(vae, "svgd_direction", no_direction)
    z = network.particles(x, 6, seed=SEED)
    decoder = [*network.decoder_hidden[0].trainable_variables, *network.decoder_output.trainable_variables]
    with tf.GradientTape() as tape:
        error = -tf.reduce_mean(log_likelihood_of_particles(network, x, z))
    expected = tape.gradient(error, decoder)
    with tf.GradientTape() as tape:
        loss, reconstruction, _ = training_loss(network, x)
        loss = tf.reduce_mean(loss)
    assert np.mean(reconstruction) == pytest.approx(float(error), rel=1e-5)
    for found, wanted in zip(tape.gradient(loss, decoder), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    assert (gradient(network, x)[:n_encoder] == 0).all()


def test_stein_moves_particles_along_the_direction(x, monkeypatch):
    network = make_network("stein")
    directions = record_directions(monkeypatch)
    z = network.particles(x, 6, seed=SEED)
    output = network.noise_mlp_output
    with tf.GradientTape() as tape:
        loss, _, _ = training_loss(network, x, kl_weight=2.0)
        loss = tf.reduce_mean(loss)
    kernel_gradient, bias_gradient = tape.gradient(loss, [output.kernel, output.bias])
    direction = directions[0].numpy()
    # The bias moves all particles alike, by the mean of their directions.
    np.testing.assert_allclose(bias_gradient, -direction.mean(axis=(0, 1)), rtol=1e-3)
    output.kernel.assign_sub(1e-4 * kernel_gradient)
    moved = network.particles(x, 6, seed=SEED) - z
    assert np.sum(moved * direction) > 0

    # The direction is that of the weighted log p(x, z).
    output.kernel.assign_add(1e-4 * kernel_gradient)
    with tf.GradientTape() as tape:
        tape.watch(z)
        log_joint = log_likelihood_of_particles(network, x, z) + 2.0 * network.prior.log_prob(z)
    expected = vae.svgd_direction(z, tape.gradient(log_joint, z), 2.0)
    np.testing.assert_allclose(direction, expected, rtol=1e-3, atol=1e-4)


# --- Labels -------------------------------------------------------------------------------------------


def test_loss_of_labels_against_numpy(x):
    """-ELBO plus xi = 80 times the hinge loss, summed over the classes, of the labelled digits."""
    network = make_network("labels")
    network.classifier.bias.assign(np.linspace(-2, 2, 10))
    labels = np.array([3, -1, 9, 0, -1, -1, 3, -1])
    loss, reconstruction, kl = training_loss(network, x, labels, kl_weight=0.5)
    negative_elbo, expected_reconstruction, expected_kl = network.negative_elbo(x, seed=SEED, kl_weight=0.5)
    np.testing.assert_allclose(reconstruction, expected_reconstruction, rtol=1e-6)
    np.testing.assert_allclose(kl, expected_kl, rtol=1e-6)

    z = network.posterior.sample(network.encoder(x), SEED).numpy()
    scores = z @ network.classifier.kernel.numpy() + network.classifier.bias.numpy()
    targets = np.full((8, 10), -1)
    for image in np.flatnonzero(labels >= 0):
        targets[image, labels[image]] = 1
    hinge = np.maximum(0, 1 - targets * scores).sum(axis=1)
    hinge[labels < 0] = 0
    assert len(set(np.sign(1 - targets * scores).ravel())) == 2  # some are on the right side of the margin
    np.testing.assert_allclose(loss - negative_elbo, 80 * hinge * 8 / 4, rtol=1e-4, atol=1e-3)
    # On average over the mini-batch: xi times the mean hinge loss of the four labelled digits.
    assert np.mean(loss - negative_elbo) == pytest.approx(80 * hinge[labels >= 0].mean(), rel=1e-4)


def test_labels_reach_the_encoder_only_through_labelled_digits(x):
    network = make_network("labels")
    unknown = tf.fill([8], -1)
    n_classifier = network.classifier.count_params()
    without = gradient(network, x, unknown)
    np.testing.assert_allclose(without[:-n_classifier], gradient(make_network("vae"), x), atol=1e-5)
    assert (without[-n_classifier:] == 0).all()
    one = tf.tensor_scatter_nd_update(unknown, [[3]], [7])
    change = gradient(network, x, one) - without
    assert np.linalg.norm(change[:-n_classifier]) > 0.01 * np.linalg.norm(without[:-n_classifier])
    # Of one labelled digit in the mini-batch, the loss is 80 times the hinge loss.
    scores = network.classifier(network.posterior.sample(network.encoder(x), SEED))[3].numpy()
    targets = np.where(np.arange(10) == 7, 1, -1)
    np.testing.assert_allclose(change[-10:], -80 * targets * (targets * scores < 1), rtol=1e-4)
    # A step against it increases the score of the label.
    score = network.classifier(network.encode(x))[3, 7]
    network.classifier.bias.assign_sub(0.01 * tf.cast(change[-10:], tf.float32))
    assert network.classifier(network.encode(x))[3, 7] > score


def test_predicted_labels_are_those_of_scores_averaged_over_50_draws(train, digits):
    """Not of the scores at the mean, which differ where q(z|x) is wide."""
    network, _ = train("labels")
    x = digits[:500]
    bias = network.encoder_output.bias
    trained_bias = bias.numpy()
    bias.assign([0, 0, 4, 4])
    q = network.encoder(x)
    z = network.posterior.sample(vae.tile_samples(q, 50), (0, 0)).numpy()
    kernel = network.classifier.kernel.numpy()
    scores = z @ kernel + network.classifier.bias.numpy()
    found = network.classify(x).numpy()
    bias.assign(trained_bias)
    np.testing.assert_array_equal(found, scores.mean(axis=0).argmax(axis=1))
    of_the_mean = np.argmax(q[0] @ kernel + network.classifier.bias.numpy(), axis=1)
    assert np.mean(found != of_the_mean) > 0.05


@pytest.mark.architecture
def test_labels_are_learned(train, digits, few_digits):
    network, _ = train("labels")
    batch = vae.Batch(digits[:500], digits[:500], few_digits.train_labels[:500].astype(np.int32))
    assert network.test_metrics(batch)["test_error"] < 0.75


def test_error_of_labels_is_the_share_of_wrong_ones(x):
    network = make_network("labels")
    labels = network.classify(x).numpy()
    labels[:2] += 1
    assert network.test_metrics(vae.Batch(x, x, labels)) == {"test_error": 0.25}


# --- Convolutions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_pixels", "sides"), [(784, (14, 7, 14, 28)), (49, (4, 2, 4, 8))])
def test_convolutions_halve_the_image_twice_and_double_it_twice(n_pixels, sides):
    network = vae.Convolutional(2, n_pixels=n_pixels)
    found = []
    h = tf.zeros((3, n_pixels))
    for layer in network.encoder_hidden:
        h = layer(h)
        found.append(h.shape[1:])
    h = tf.zeros((3, 2))
    for layer in network.decoder_hidden:
        h = layer(h)
        found.append(h.shape[1:])
    channels = (16, 32, 16, 2)
    expected = [(side, side, n) for side, n in zip(sides, channels, strict=True)]
    assert [shape for shape in found if len(shape) == 3 and shape[2] != 1][:2] == expected[:2]
    assert found[-3:-1] == expected[2:]
    assert network(tf.zeros((3, n_pixels))).shape == (3, n_pixels)


# --- Classes ------------------------------------------------------------------------------------------


@pytest.fixture
def conditional():
    """A small network with classes whose q(z|x, y) has no width, so that a draw is the mean."""
    network = make_network("conditional", dim_z=3, n_labels=4)
    network.classifier_output.kernel.assign(20 * network.classifier_output.kernel)
    network.encoder_output.bias.assign([0.0] * 3 + [-40.0] * 3)
    return network


def terms_of_class(network, x, label):
    """Returns -log p(x|y, z) and KL[q(z|x, y) || p(z)] of each image, computed by NumPy, for one class."""

    def dense(layer, h, activation):
        return activation(h @ np.asarray(layer.kernel, float) + np.asarray(layer.bias, float))

    def elu(h):
        return np.where(h > 0, h, np.expm1(h))

    def identity(h):
        return h

    x = np.asarray(x, float)
    y = np.tile(np.eye(10)[label], (len(x), 1))
    h = np.concatenate([x - np.asarray(network.mean_image, float), y], axis=1)
    h = dense(network.encoder_hidden[1], dense(network.encoder_hidden[0], h, elu), np.tanh)
    mean, log_var = np.split(dense(network.encoder_output, h, identity), 2, axis=1)
    h = np.concatenate([mean, y], axis=1)
    h = dense(network.decoder_hidden[1], dense(network.decoder_hidden[0], h, np.tanh), elu)
    logits = dense(network.decoder_output, h, identity)
    reconstruction = -np.sum(x * logits - np.logaddexp(0, logits), axis=1)
    return reconstruction, 0.5 * np.sum(mean**2 + np.exp(log_var) - log_var - 1, axis=1)


def test_elbo_without_a_label_against_numpy(conditional, x):
    """The sum over the classes, weighted by q(y|x), and the KL divergence of q(y|x) from p(y)."""
    q_y = special.softmax(np.asarray(conditional.classifier(x), float), axis=1)
    assert 0.02 < np.mean(np.max(q_y, axis=1)) < 0.98  # or the weights would not matter
    terms = np.array([terms_of_class(conditional, x, label) for label in range(10)])  # (10, 2, 8)
    reconstruction, kl = np.einsum("nk,ktn->tn", q_y, terms)
    kl += np.sum(q_y * np.log(10 * q_y), axis=1)
    labels = np.arange(8)  # they do not matter
    for batch in (x, vae.Batch(x, x, labels)):
        found = conditional.negative_elbo(batch, seed=SEED, kl_weight=0.5)
        np.testing.assert_allclose(found[1], reconstruction, rtol=1e-5)
        np.testing.assert_allclose(found[2], kl, rtol=1e-5)
        np.testing.assert_allclose(found[0], reconstruction + 0.5 * kl, rtol=1e-5)


@pytest.mark.parametrize("labels", [[3, -1, 9, 0, -1, -1, 3, -1], [3, 1, 9, 0, 2, 2, 3, 7], [-1] * 8, None])
def test_training_loss_with_labels_against_numpy(conditional, x, labels):
    """A labelled digit has the terms of its class, and trains the classifier with alpha = 80."""
    loss, reconstruction, kl = training_loss(conditional, x, labels, kl_weight=0.5)
    labels = np.full(8, -1) if labels is None else np.array(labels)
    logits = np.asarray(conditional.classifier(x), float)
    _, expected_reconstruction, expected_kl = np.array(conditional.negative_elbo(x, seed=SEED), float)
    cross_entropy = np.zeros(8)
    for i in np.flatnonzero(labels >= 0):
        terms = terms_of_class(conditional, x[i : i + 1], labels[i])
        expected_reconstruction[i], expected_kl[i] = np.ravel(terms)
        expected_kl[i] += np.log(10)
        cross_entropy[i] = special.logsumexp(logits[i]) - logits[i, labels[i]]
    np.testing.assert_allclose(reconstruction, expected_reconstruction, rtol=1e-5)
    np.testing.assert_allclose(kl, expected_kl, rtol=1e-5)
    excess = np.mean(loss - reconstruction - 0.5 * kl)
    expected = 80 * cross_entropy[labels >= 0].mean() if (labels >= 0).any() else 0
    assert excess == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_training_loss_is_the_same_but_faster_if_all_labels_are_known(conditional, x):
    labels = np.arange(8)
    among_hidden = training_loss(conditional, x, labels, kl_weight=0.5)
    conditional.n_labels = None
    for found, expected in zip(
        training_loss(conditional, x, labels, kl_weight=0.5), among_hidden, strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="n_labels"):
        training_loss(conditional, x, None)


def test_log_px_sums_over_the_classes(conditional, x):
    """By quadrature over z for each class, in one dimension."""
    network = make_network("conditional", dim_z=1)
    z = np.linspace(-8, 8, 4_001, dtype=np.float32)[:, None]
    log_joint = []
    for label in range(10):
        logits = network.decoder(z, np.full(len(z), label))
        log_prior = stats.norm.logpdf(z[:, 0]) - np.log(10)
        log_joint.append(network.likelihood.log_prob_table(x, logits) + log_prior)
    expected = special.logsumexp(log_joint, axis=(0, 2)) + np.log(16 / 4_000)
    found = log_px_by_importance_sampling(network, x, 1_000)
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert not network.has_log_joint


def test_classes_that_are_given_or_found(conditional, x):
    found = conditional.classify(x).numpy()
    assert len(set(found)) > 1
    np.testing.assert_array_equal(conditional.encode(x), conditional.encode(x, found))
    np.testing.assert_array_equal(conditional.reconstruct(x), conditional.reconstruct(x, found))
    np.testing.assert_array_equal(conditional.encode(x, np.full(8, -1)), conditional.encode(x, found))
    some_hidden = [-1, *found[1:]]
    np.testing.assert_array_equal(conditional.reconstruct(x, some_hidden), conditional.reconstruct(x, found))
    others = (found + 1) % 10
    assert np.abs(conditional.encode(x, others) - conditional.encode(x)).max() > 1e-3
    with pytest.raises(ValueError, match="pass labels"):
        conditional.decode(tf.zeros((2, 3)))


def test_own_digits_need_a_classifier_if_the_network_has_classes(conditional):
    run_main.check_classifier(conditional, "reconstruct")
    network = make_network("vae")
    run_main.check_classifier(network, "reconstruct")
    network.has_classes = True
    with pytest.raises(run_main.UserError, match="classify"):
        run_main.check_classifier(network, "explore")


def test_samples_take_the_classes_in_turn_or_those_that_are_given(conditional):
    z, _ = conditional.sample_with_latents(12, (0, 1), tf.zeros(12, tf.int32))
    in_turn = conditional.decode(z, np.arange(12) % 10)
    np.testing.assert_allclose(conditional.sample(12, (0, 1)), in_turn, rtol=1e-5)
    sevens = conditional.decode(z, np.full(12, 7))
    np.testing.assert_allclose(conditional.sample(12, (0, 1), np.full(12, 7)), sevens, rtol=1e-5)


@pytest.mark.architecture
def test_classes_are_learned(train, digits, few_digits):
    network, _ = train("conditional")
    batch = vae.Batch(digits[:500], digits[:500], few_digits.train_labels[:500].astype(np.int32))
    assert network.test_metrics(batch)["test_error"] < 0.3


# --- The program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPERS)
def test_each_model_trains_writes_its_files_and_resumes_bitwise(run, tmp_path, name):
    flags = [f"--model={name}", "--num_epochs=2", "--warm_up=2", "--kl_weight=0.9", "--n_generate=5"]
    flags += [f"--{option}={value}" for option, value in OPTIONS.get(name, {}).items()]
    if name in ("labels", "conditional"):
        flags.append("--n_labels=20")
    assert run(*flags, f"--results_path={tmp_path}") == 0
    pictures = {
        "ladder": {"layers.png"},
        "stick_breaking": {"simplex.png", "posterior.png"},
        "conditional": {"classes.png", "analogies.png"},
    }
    own_pictures = set().union(*pictures.values())
    assert {path.name for path in tmp_path.iterdir()} & own_pictures == pictures.get(name, {"posterior.png"})
    network = keras.models.load_model(tmp_path / "vae.keras")
    assert type(network) is model_class(name)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    own = {
        "labels": {"test_error"},
        "conditional": {"test_error"},
        "ladder": {"test_kl_upper", "active_units_lower"},
    }
    found = metrics.keys() & {"test_error", "test_kl_upper", "active_units_lower"}
    assert found == own.get(name, set())

    if name in ("iwae", "least_squares", "stick_breaking"):  # whose random numbers are drawn as those of vae
        return
    newest = run_main.checkpoint_files(tmp_path)[2]
    with np.load(newest) as arrays:
        expected = dict(arrays)
    newest.unlink()  # as if killed in the second epoch
    assert run("--resume", f"--results_path={tmp_path}", "--PMLR=False", "--PRR=False") == 0
    with np.load(newest) as arrays:
        assert set(arrays) == set(expected)
        for part in set(expected) - {"history"}:  # the log, with seconds
            np.testing.assert_array_equal(arrays[part], expected[part])


def test_a_run_goes_on_with_another_number_of_samples(run, tmp_path):
    assert (
        run("--model=iwae", "--num_epochs=1", "--PRR=False", "--PMLR=False", f"--results_path={tmp_path}")
        == 0
    )
    assert run("--resume", "--num_epochs=2", "--n_samples=2", f"--results_path={tmp_path}") == 0
    assert keras.models.load_model(tmp_path / "vae.keras").n_samples == 2
    assert len(read_log(tmp_path)) == 2
    assert run_main.parse_flags([f"--load={tmp_path}"]).n_samples == 2
    with pytest.raises(run_main.UserError, match="--n_samples cannot change"):
        run_main.parse_flags(["--resume", f"--results_path={tmp_path}", "--n_samples=3"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--n_samples 5", "--n_samples vae"),
        ("--model stick_breaking --n_samples 5", "--n_samples stick_breaking"),
        ("--model labels --n_generate 3 --digit 3", "--digit labels"),
        ("--model conditional --digit 3", "--digit --n_generate"),
        ("--model conditional --n_generate 3 --digit 10", "--digit '10'"),
        ("--dim_z_lower 5", "--dim_z_lower vae"),
        ("--model iwae --n_labels 5", "--n_labels iwae"),
        ("--model least_squares --binarize", "--binarize least_squares"),
        ("--model gan", "--model 'gan'"),
    ],
)
def test_conflicting_flags_are_refused_in_one_line(capsys, line, words):
    assert run_main.main(line.split()) == 2
    assert_mentions(one_line(capsys.readouterr().err), words)


def test_new_digits_have_the_chosen_class_or_all_in_turn(run, tmp_path):
    flags = ("--model=conditional", "--num_epochs=1", "--PRR=False", "--PMLR=False", "--n_generate=12")
    assert run(*flags, f"--results_path={tmp_path / 'run'}") == 0
    load = (f"--load={tmp_path / 'run'}", "--n_generate=12", "--digit=7")
    assert run(*load, f"--results_path={tmp_path / 'sevens'}") == 0
    network = keras.models.load_model(tmp_path / "run" / "vae.keras")
    for folder, expected in (("run", np.arange(12) % 10), ("sevens", np.full(12, 7))):
        with np.load(tmp_path / folder / "generated.npz") as generated:
            np.testing.assert_array_equal(generated["label"], expected)
            images = 255 * network.decode(generated["z"], expected).numpy().reshape(-1, 28, 28)
            np.testing.assert_allclose(generated["images"], images, atol=0.501)


def test_own_digits_are_reconstructed_as_the_class_that_is_found(run, few_digits, tmp_path):
    flags = ("--model=conditional", "--num_epochs=1", "--PRR=False", "--PMLR=False")
    assert run(*flags, f"--results_path={tmp_path / 'run'}") == 0
    np.save(tmp_path / "own.npy", few_digits.test_images[:20].reshape(-1, 28, 28))
    load = (f"--load={tmp_path / 'run'}", f"--reconstruct={tmp_path / 'own.npy'}")
    assert run(*load, f"--results_path={tmp_path / 'own'}") == 0
    network = keras.models.load_model(tmp_path / "run" / "vae.keras")
    x = few_digits.test_images[:20] / np.float32(255)
    with np.load(tmp_path / "own" / "reconstructed.npz") as own:
        assert len(set(own["label"])) > 1
        np.testing.assert_array_equal(own["label"], network.classify(x))
        np.testing.assert_allclose(own["z"], network.encode(x, own["label"]), atol=1e-5)
        images = 255 * network.reconstruct(x, own["label"]).numpy().reshape(-1, 28, 28)
        np.testing.assert_allclose(own["images"], images, atol=0.501)


def test_each_mini_batch_has_a_share_of_labelled_digits(few_digits):
    """On top of an epoch that goes through every digit once."""
    run_main.import_tensorflow()
    flags = run_main.parse_flags(["--model=conditional", "--n_labels=7", "--batch_size=100"])
    digits = run_main.prepare_digits(few_digits, flags)
    assert sorted(digits.labelled_labels) == sorted(7 * list(range(10)))
    first = run_main.mini_batches(2_000, 70, 1, flags).numpy()
    assert first.shape == (20, 125)
    np.testing.assert_array_equal(np.sort(first[:, :100], axis=None), np.arange(2_000))
    drawn = first[:, 100:]
    assert drawn.min() >= 2_000 and drawn.max() < 2_070
    assert stats.chisquare(np.bincount(drawn.ravel() - 2_000, minlength=70)).pvalue > 1e-3
    second = run_main.mini_batches(2_000, 70, 2, flags).numpy()
    assert (first != second).mean() > 0.9
    np.testing.assert_array_equal(run_main.mini_batches(2_000, 0, 1, flags), first[:, :100])


def test_no_digits_are_added_if_all_labels_are_known(few_digits):
    run_main.import_tensorflow()
    for flags in (["--model=conditional"], ["--model=vae"]):
        digits = run_main.prepare_digits(few_digits, run_main.parse_flags(flags))
        assert digits.labelled_images.shape == (0, 784)
        assert digits.labelled_labels.shape == (0,)
    with pytest.raises(run_main.UserError, match="--n_labels 9999 hides no label"):
        run_main.prepare_digits(few_digits, run_main.parse_flags(["--model=labels", "--n_labels=9999"]))


@pytest.mark.parametrize(("augment", "n_copies"), [(False, 1), (True, 5)])
def test_as_many_digits_of_each_class_as_requested_keep_their_labels(few_digits, augment, n_copies):
    run_main.import_tensorflow()
    flags = run_main.parse_flags(["--model=labels", "--n_labels=7", f"--augment={augment}"])
    labels = run_main.prepare_digits(few_digits, flags).train_labels
    assert len(labels) == 2_000 * n_copies
    labelled = np.flatnonzero(labels >= 0)
    assert (np.bincount(labels[labelled]) == 7 * n_copies).all()
    np.testing.assert_array_equal(labels[labelled], few_digits.train_labels[labelled % 2_000])


@pytest.mark.parametrize(("n_wanted", "n_copies"), [(8_000, 8_000 // 70), (100, 4)])
def test_labelled_digits_have_more_copies_if_they_are_few(few_digits, monkeypatch, n_wanted, n_copies):
    run_main.import_tensorflow()
    monkeypatch.setattr(run_main, "N_LABELLED_COPIES", n_wanted)
    flags = run_main.parse_flags(["--model=labels", "--n_labels=7", "--augment"])
    digits = run_main.prepare_digits(few_digits, flags)
    labelled = np.flatnonzero(digits.train_labels[:2_000] >= 0)
    assert len(digits.labelled_images) == len(digits.labelled_labels) == 70 * (1 + n_copies)
    np.testing.assert_array_equal(digits.labelled_images[:70], few_digits.train_images[labelled])
    np.testing.assert_array_equal(digits.labelled_labels[-70:], few_digits.train_labels[labelled])
