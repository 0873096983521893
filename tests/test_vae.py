"""The mathematics: every formula against an independent computation."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate, special, stats

import vae

SEED = tf.constant([3, 4])


@pytest.fixture(scope="module")
def network():
    mean_image = np.random.default_rng(0).random(784).astype(np.float32)
    return vae.VAE(dim_z=3, n_hidden=20, mean_image=mean_image, seed=0)


@pytest.fixture(scope="module")
def x():
    return tf.constant(np.random.default_rng(1).random((8, 784)), tf.float32)


def gaussians(n, dim_z):
    rng = np.random.default_rng(2)
    return rng.normal(size=(n, dim_z)).astype(np.float32), rng.normal(size=(n, dim_z)).astype(np.float32)


def test_kl_divergence_against_numerical_integration():
    mean, log_var = gaussians(4, 3)

    def one_dimension(mu, std):
        q = stats.norm(mu, std)
        between = (mu - 12 * std, mu + 12 * std)
        return integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), *between)[0]

    expected = np.vectorize(one_dimension)(mean, np.exp(log_var / 2)).sum(axis=1)
    np.testing.assert_allclose(vae.kl_divergence(mean, log_var), expected, rtol=1e-5)


def test_kl_divergence_against_monte_carlo():
    mean, log_var = gaussians(4, 3)
    n = 200_000
    many = np.repeat(mean, n, axis=0), np.repeat(log_var, n, axis=0)
    z = vae.reparameterize(*map(tf.constant, many), SEED).numpy().astype(float)
    log_ratio = stats.norm(many[0], np.exp(many[1] / 2)).logpdf(z) - stats.norm.logpdf(z)
    draws = log_ratio.sum(axis=1).reshape(4, n)
    error = draws.std(axis=1) / np.sqrt(n)
    assert (np.abs(draws.mean(axis=1) - vae.kl_divergence(mean, log_var).numpy()) < 5 * error).all()


def test_kl_divergence_of_the_prior_from_itself_is_zero():
    assert vae.kl_divergence(tf.zeros((2, 5)), tf.zeros((2, 5))).numpy().tolist() == [0, 0]


@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_reconstruction_error_against_float64(scale):
    rng = np.random.default_rng(0)
    x = rng.random((16, 784)).astype(np.float32)
    x[:4], x[4:8] = 0, 1
    logits = (scale * rng.normal(size=x.shape)).astype(np.float32)
    p, q = special.log_expit(logits.astype(float)), special.log_expit(-logits.astype(float))
    expected = -(x.astype(float) * p + (1 - x.astype(float)) * q).sum(axis=1)
    np.testing.assert_allclose(vae.reconstruction_error(x, logits), expected, rtol=2e-6)


def test_reparameterize_draws_from_the_gaussian():
    n = 100_000
    z = vae.reparameterize(tf.fill((n, 1), 2.0), tf.fill((n, 1), np.float32(np.log(9))), SEED).numpy()
    assert stats.kstest(z[:, 0], stats.norm(2, 3).cdf).pvalue > 1e-3


def test_gradients_through_the_sampling_step():
    mean, log_var = (tf.constant(array) for array in gaussians(4, 3))

    def loss(mean, log_var):
        return tf.reduce_sum(tf.sin(vae.reparameterize(mean, log_var, SEED)))

    with tf.GradientTape() as tape:
        tape.watch([mean, log_var])
        value = loss(mean, log_var)
    gradients = tape.gradient(value, [mean, log_var])
    step = 1e-2
    for argument, gradient in enumerate(gradients):
        for i in np.ndindex(tuple(gradient.shape)):
            moved = np.zeros_like(gradient)
            moved[i] = step
            up, down = ([mean, log_var] for _ in range(2))
            up[argument], down[argument] = up[argument] + moved, down[argument] - moved
            assert float(gradient[i]) == pytest.approx(float(loss(*up) - loss(*down)) / (2 * step), abs=2e-3)


def test_gradient_of_the_negative_elbo_along_a_direction(network, x):
    def loss():
        return tf.reduce_mean(tf.add_n(network.negative_elbo(x, x, SEED)))

    weights = network.trainable_variables
    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, weights)
    norm = tf.linalg.global_norm(gradients)
    before = [weight.numpy() for weight in weights]
    step = 1e-2
    values = []
    for sign in (1, -1):
        for weight, start, gradient in zip(weights, before, gradients, strict=True):
            weight.assign(start + sign * step * gradient / norm)
        values.append(float(loss()))
    for weight, start in zip(weights, before, strict=True):
        weight.assign(start)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(norm), rel=1e-2)


def test_dropout_keeps_the_mean_and_a_share_of_the_units():
    h = tf.random.stateless_uniform((1_000, 500), SEED, 0.5, 1.5)
    dropped = tf.function(lambda: vae.dropout(h, 0.9, SEED, layer=1), jit_compile=True)().numpy()
    kept = dropped != 0
    n = kept.size
    assert abs(kept.mean() - 0.9) < 5 * np.sqrt(0.9 * 0.1 / n)
    assert abs(dropped.mean() - h.numpy().mean()) < 5 * dropped.std() / np.sqrt(n)
    np.testing.assert_allclose(dropped[kept], h.numpy()[kept] / 0.9, rtol=1e-6)


def test_dropout_differs_between_layers_and_seeds():
    h = tf.ones((10, 500))

    @tf.function(jit_compile=True)
    def masks():
        return [vae.dropout(h, 0.5, seed, layer) for seed, layer in ((SEED, 1), (SEED, 2), (SEED + 1, 1))]

    first, other_layer, other_seed = (mask.numpy() for mask in masks())
    for other in (other_layer, other_seed):
        assert 0.4 < (first == other).mean() < 0.6


def test_dropout_follows_all_four_hidden_layers(network, x, monkeypatch):
    layers = []
    monkeypatch.setattr(
        vae, "dropout", lambda h, keep_prob, seed, layer: layers.append((keep_prob, layer)) or h
    )
    network.autoencoder(x, SEED, keep_prob=0.7)
    assert layers == [(0.7, 1), (0.7, 2), (0.7, 3), (0.7, 4)]


def test_no_dropout_in_evaluation(network, x):
    """Without a keep_prob the network is the plain one, computed here with NumPy in float64."""

    def layer(dense, h):
        return h @ dense.kernel.numpy().astype(float) + dense.bias.numpy()

    def elu(h):
        return np.where(h > 0, h, np.expm1(np.minimum(h, 0)))

    h = elu(layer(network.encoder_1, x.numpy() - network.mean_image.numpy()))
    expected = np.split(layer(network.z_mean_log_var, np.tanh(layer(network.encoder_2, h))), 2, axis=1)
    mean, log_var = network.gaussian_encoder(x)
    np.testing.assert_allclose(mean, expected[0], atol=1e-5)
    np.testing.assert_allclose(log_var, expected[1], atol=1e-5)

    z = np.random.default_rng(0).normal(size=(8, 3))
    h = elu(layer(network.decoder_2, np.tanh(layer(network.decoder_1, z))))
    logits = network.bernoulli_decoder(tf.constant(z, tf.float32))
    np.testing.assert_allclose(logits, layer(network.x_logits, h), atol=1e-4)


def test_training_differs_from_evaluation(network, x):
    trained = tf.function(lambda: network.negative_elbo(x, x, SEED, keep_prob=0.5), jit_compile=True)()
    plain = network.negative_elbo(x, x, SEED)
    assert not np.allclose(trained[0], plain[0], rtol=1e-4)
    np.testing.assert_array_equal(plain[0], network.negative_elbo(x, x, SEED)[0])


def test_negative_elbo_reconstructs_the_clean_image_from_what_is_seen(network, x):
    seen = tf.zeros_like(x)
    reconstruction, kl = network.negative_elbo(x, seen, SEED)
    mean, log_var, logits = network.autoencoder(seen, SEED)
    np.testing.assert_allclose(reconstruction, vae.reconstruction_error(x, logits), rtol=1e-6)
    np.testing.assert_allclose(kl, vae.kl_divergence(mean, log_var), rtol=1e-6)


def test_untrained_decoder_answers_with_the_mean_image(network):
    logits = network.bernoulli_decoder(tf.zeros((1, 3)))
    bounded = np.clip(network.mean_image.numpy(), 0.001, 0.999)
    np.testing.assert_allclose(tf.sigmoid(logits)[0], bounded, atol=0.02)


def test_weights_are_a_function_of_the_seed(network):
    mean_image = network.mean_image.numpy()
    again, other = (vae.VAE(3, 20, mean_image, seed) for seed in (0, 1))
    for mine, same, different in zip(network.layers, again.layers, other.layers, strict=True):
        np.testing.assert_array_equal(mine.kernel, same.kernel)
        assert not np.array_equal(mine.kernel, different.kernel)


@pytest.mark.parametrize("n_importance", [1, 49, 50, 51, 130])
def test_log_marginal_likelihood_is_exact_where_z_says_nothing(x, n_importance):
    """With q(z|x) = p(z) and a decoder that ignores z, every draw's weight is p(x)."""
    network = vae.VAE(dim_z=3, n_hidden=20, mean_image=np.full(784, 0.3), seed=0)
    network.z_mean_log_var.kernel.assign(tf.zeros((20, 6)))
    network.x_logits.kernel.assign(tf.zeros((20, 784)))
    expected = (x.numpy() * np.log(0.3) + (1 - x.numpy()) * np.log(0.7)).sum(axis=1)
    log_px = network.log_marginal_likelihood(x, x, n_importance, SEED)
    np.testing.assert_allclose(log_px, expected, rtol=1e-5)


def test_log_marginal_likelihood_against_its_formula(network, x):
    """The estimate from draws and densities of its own: both are averages over many draws of one thing."""
    n = 20_000
    mean, log_var = (array.numpy().astype(float) for array in network.gaussian_encoder(x))
    q = stats.norm(mean, np.exp(log_var / 2))
    z = q.rvs((n, 8, 3), random_state=0)
    logits = network.bernoulli_decoder(tf.constant(z.reshape(-1, 3), tf.float32)).numpy().reshape(n, 8, 784)
    log_px_z = np.einsum("nbp,bp->nb", logits, x) - np.logaddexp(0, logits).sum(axis=2)
    log_weights = log_px_z + (stats.norm.logpdf(z) - q.logpdf(z)).sum(axis=2)
    expected = special.logsumexp(log_weights, axis=0) - np.log(n)
    log_px = network.log_marginal_likelihood(x, x, 5_000, SEED)
    np.testing.assert_allclose(log_px, expected, atol=0.1)


def test_log_marginal_likelihood_draws_z_from_what_is_seen(network, x):
    seen = network.log_marginal_likelihood(x, x[::-1], 1, SEED)
    assert (np.abs(seen - network.log_marginal_likelihood(x, x, 1, SEED)) > 1e-3).any()


def test_active_units_are_those_that_vary():
    mean = np.random.default_rng(0).normal(size=(10_000, 4)) * [1, 0.11, 0.09, 0] + [0, 0, 0, 5]
    assert int(vae.active_units(tf.constant(mean))) == 2


def test_binarize_draws_pixels_with_their_grey_for_chance():
    grey = np.repeat([0.0, 0.2, 0.7, 1.0], 196).astype(np.float32)
    x = tf.constant(np.tile(grey, (2_000, 1)))
    drawn = vae.binarize(x, SEED).numpy()
    assert set(np.unique(drawn)) == {0, 1}
    for level in (0, 0.2, 0.7, 1):
        pixels = drawn[:, grey == np.float32(level)]
        error = np.sqrt(level * (1 - level) / pixels.size)
        assert abs(pixels.mean() - level) <= 5 * error
    assert (drawn != vae.binarize(x, SEED + 1).numpy()).mean() > 0.1
    noisy = vae.salt_and_pepper(tf.fill((2_000, 784), 0.5), 0.5, SEED).numpy()
    agree = (drawn == 1)[:, grey == np.float32(0.2)] & (noisy == 0)[:, grey == np.float32(0.2)]
    assert agree.mean() == pytest.approx(0.2 * 0.25, abs=0.003)  # independent of the noise of the same seed


def test_salt_and_pepper_replaces_a_share_by_black_or_white():
    x = tf.fill((1_000, 784), 0.5)
    noisy = vae.salt_and_pepper(x, 0.3, SEED).numpy()
    share = 5 * np.sqrt(0.15 * 0.85 / noisy.size)
    assert abs((noisy == 0).mean() - 0.15) < share
    assert abs((noisy == 1).mean() - 0.15) < share
    assert ((noisy == 0) | (noisy == 1) | (noisy == 0.5)).all()
    assert (vae.salt_and_pepper(x, 1.0, SEED).numpy() != 0.5).all()
