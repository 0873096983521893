"""The mathematics: every formula against an independent computation; what a notebook does with a network."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import integrate, special, stats

import vae

SEED = tf.constant([3, 4])


class Laplace(vae.Prior):
    """Another prior, without a closed form of the KL divergence."""

    def log_prob(self, z):
        return -tf.reduce_sum(tf.abs(z) + np.log(2), axis=-1)


class LaplaceVAE(vae.VAE):
    prior = Laplace()


def make_network(kind=vae.VAE):
    mean_image = np.random.default_rng(0).random(784).astype(np.float32)
    network = kind(dim_z=2, n_hidden=20, mean_image=mean_image, seed=7)
    # Otherwise q(z|x) would nearly be the prior. Its being wide keeps the importance weights alike.
    network.encoder_output.kernel.assign(6 * network.encoder_output.kernel)
    network.encoder_output.bias.assign([2.0, 0, 1, 1])
    return network


@pytest.fixture(scope="module")
def network():
    return make_network()


@pytest.fixture(scope="module")
def x():
    return tf.constant(np.random.default_rng(1).random((8, 784)), tf.float32)


def gaussians(n, dim_z):
    rng = np.random.default_rng(2)
    return rng.normal(size=(n, dim_z)).astype(np.float32), rng.normal(size=(n, dim_z)).astype(np.float32)


# --- the densities ------------------------------------------------------------------------------------


def test_kl_divergence_against_numerical_integration():
    mean, log_var = gaussians(4, 3)
    mean[0] = log_var[0] = 0  # the prior itself

    def one_dimension(mu, std):
        q = stats.norm(mu, std)
        between = (mu - 12 * std, mu + 12 * std)
        return integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), *between)[0]

    expected = np.vectorize(one_dimension)(mean, np.exp(log_var / 2)).sum(axis=1)
    kl = vae.StandardNormal().kl_divergence(mean, log_var, None)
    np.testing.assert_allclose(kl, expected, rtol=1e-5)


def test_sampled_kl_divergence_has_the_closed_form_as_its_mean():
    mean, log_var = gaussians(4, 3)
    prior, shape = vae.StandardNormal(), (200_000, 4, 3)
    z = vae.reparameterize(tf.broadcast_to(mean, shape), tf.broadcast_to(log_var, shape), SEED)
    draws = vae.Prior.kl_divergence(prior, mean, log_var, z).numpy().astype(float)
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - prior.kl_divergence(mean, log_var, None)) < 5 * error).all()


def test_log_normal_against_scipy():
    mean, log_var = gaussians(4, 3)
    z = np.random.default_rng(0).normal(size=(5, 4, 3))
    expected = stats.norm(mean, np.exp(log_var / 2)).logpdf(z).sum(axis=-1)
    np.testing.assert_allclose(vae.log_normal(z.astype(np.float32), mean, log_var), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_bernoulli_against_float64(scale):
    rng = np.random.default_rng(0)
    x = rng.random((16, 784)).astype(np.float32)
    x[:4], x[4:8] = 0, 1
    logits = (scale * rng.normal(size=x.shape)).astype(np.float32)
    p, q = special.log_expit(logits.astype(float)), special.log_expit(-logits.astype(float))
    expected = (x.astype(float) * p + (1 - x.astype(float)) * q).sum(axis=1)
    np.testing.assert_allclose(vae.Bernoulli().log_prob(x, logits), expected, rtol=2e-6)


def test_reparameterize_draws_from_the_gaussian():
    n = 100_000
    z = vae.reparameterize(tf.fill((n, 1), 2.0), tf.fill((n, 1), np.float32(np.log(9))), SEED).numpy()
    assert stats.kstest(z[:, 0], stats.norm(2, 3).cdf).pvalue > 1e-3


# --- the ELBO and its gradients -----------------------------------------------------------------------


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


def test_gradient_of_the_negative_elbo_along_a_direction(x):
    network = make_network()

    def loss():
        return tf.reduce_mean(tf.add_n(network.elbo_terms(x, x, seed=SEED)))

    weights = network.trainable_variables
    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, weights)
    norm = tf.linalg.global_norm(gradients)
    before = [weight.numpy() for weight in weights]
    step, values = 1e-2, []
    for sign in (1, -1):
        for weight, start, gradient in zip(weights, before, gradients, strict=True):
            weight.assign(start + sign * step * gradient / norm)
        values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(norm), rel=1e-2)


def test_elbo_terms_compare_the_targets_with_what_comes_of_the_corrupted_inputs(network, x):
    x_corrupted = tf.zeros_like(x)
    reconstruction, kl = network.elbo_terms(x, x_corrupted, seed=SEED)
    mean, log_var = network.encoder(x_corrupted)
    logits = network.decoder(vae.reparameterize(mean, log_var, SEED))
    np.testing.assert_allclose(reconstruction, -vae.Bernoulli().log_prob(x, logits), rtol=1e-6)
    np.testing.assert_allclose(kl, vae.StandardNormal().kl_divergence(mean, log_var, None), rtol=1e-6)


# --- the network --------------------------------------------------------------------------------------


def test_encoder_and_decoder_against_numpy_in_float64(network, x):
    """Without a keep_prob there is no dropout."""

    def layer(dense, h):
        return h @ dense.kernel.numpy().astype(float) + dense.bias.numpy()

    def elu(h):
        return np.where(h > 0, h, np.expm1(np.minimum(h, 0)))

    first, second, third, fourth = *network.encoder_hidden, *network.decoder_hidden
    h = np.tanh(layer(second, elu(layer(first, x.numpy() - network.mean_image.numpy()))))
    expected = np.split(layer(network.encoder_output, h), 2, axis=1)
    np.testing.assert_allclose(network.encoder(x), expected, atol=1e-5)
    np.testing.assert_allclose(network.encode(x), expected[0], atol=1e-5)

    z = np.random.default_rng(0).normal(size=(8, 2))
    expected = layer(network.decoder_output, elu(layer(fourth, np.tanh(layer(third, z)))))
    np.testing.assert_allclose(network.decoder(tf.constant(z, tf.float32)), expected, atol=1e-4)
    np.testing.assert_allclose(network.decode(z), special.expit(expected), atol=1e-5)


def test_units_of_the_first_decoder_layer_change_sign_all_over_the_latent_plane():
    """On straight lines, half of which are farther from the origin than 1."""
    layer = vae.VAE(dim_z=2, n_hidden=500).decoder_hidden[0]
    distance = np.abs(layer.bias.numpy()) / np.linalg.norm(layer.kernel.numpy(), axis=0)
    assert 0.8 < np.median(distance) < 1.4


def test_untrained_decoder_answers_roughly_with_the_mean_image():
    mean_image = np.linspace(0, 1, 784)  # always black and always white pixels, too
    images = vae.VAE(dim_z=3, mean_image=mean_image).decode(np.random.default_rng(0).normal(size=(1_000, 3)))
    np.testing.assert_allclose(np.mean(images, axis=0), mean_image, atol=0.15)
    assert np.std(images, axis=0).max() < 0.05


def test_weights_are_a_function_of_the_seed():
    first, same, other = (vae.VAE(2, 20, seed=seed) for seed in (0, 0, 1))
    for layers in zip(first.layers, same.layers, other.layers, strict=True):
        kernels = [layer.kernel.numpy() for layer in layers]
        np.testing.assert_array_equal(kernels[0], kernels[1])
        assert not np.array_equal(kernels[0], kernels[2])


def test_layers_are_named_after_their_roles(network, capsys):
    names = ["encoder_1", "encoder_2", "z_mean_and_log_var", "decoder_1", "decoder_2", "decoder_output"]
    assert [layer.name for layer in network.layers] == names
    network.summary()
    summary = capsys.readouterr().out
    assert all(name in summary for name in names)
    assert f"{network.count_params():,}" in summary


def test_calling_the_network_reconstructs(network, x):
    images = network.reconstruct(x)
    np.testing.assert_array_equal(network(x), images)
    np.testing.assert_array_equal(network.decode(network.encode(x)), images)
    np.testing.assert_allclose(network.predict(x, batch_size=3, verbose=0), images, atol=1e-6)


@pytest.mark.parametrize("use", ["encode", "reconstruct", "__call__", "predict"])
def test_integer_pixels_are_refused(network, use):
    """Taken as they are, they would be 255 times as bright as those of training."""
    with pytest.raises(TypeError, match="uint8"):
        getattr(network, use)(np.full((2, 784), 255, np.uint8))


def test_samples_are_decoded_draws_from_the_prior(network):
    images = network.sample(50, (5, 6)).numpy()
    np.testing.assert_array_equal(images, network.decode(network.prior.sample(50, 2, (5, 6))))
    assert (images != network.sample(50, (5, 7)).numpy()).any(axis=1).all()
    z = network.prior.sample(10_000, 2, SEED).numpy()
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(z.T)[0, 1]) < 0.05


COMPUTATIONS = {
    "encode": lambda network, x: network.encode(x),
    "decode": lambda network, x: network.decode(x[:, :2]),
    "reconstruct": lambda network, x: network.reconstruct(x),
    "call": lambda network, x: network(x),
    "sample": lambda network, x: network.sample(8),
    "dropout": lambda network, x: vae.dropout(x, 0.7, SEED, 1),
    "elbo_terms": lambda network, x: network.elbo_terms(x, x, seed=SEED, keep_prob=0.7),
    "log p(x)": lambda network, x: network.log_marginal_likelihood(x, x, 130, seed=SEED),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_results_are_the_same_eagerly_and_compiled(network, x, name, monkeypatch):
    # XLA draws other normal numbers from a seed than TensorFlow does, so that here each is a constant.
    monkeypatch.setattr(tf.random, "stateless_normal", lambda shape, seed: tf.fill(shape, 0.3))
    eager = COMPUTATIONS[name](network, x)
    for jit_compile in (False, True):
        compiled = tf.function(COMPUTATIONS[name], jit_compile=jit_compile)(network, x)
        np.testing.assert_allclose(compiled, eager, rtol=1e-5, atol=1e-6)


def test_saved_network_is_the_same_when_loaded(network, x, tmp_path):
    original = network
    for name in ("vae.keras", "again.keras"):
        network.save(tmp_path / name)
        network = keras.models.load_model(tmp_path / name)
        assert type(network) is vae.VAE
        assert [layer.name for layer in network.layers] == [layer.name for layer in original.layers]
        for compute in COMPUTATIONS.values():
            np.testing.assert_array_equal(compute(network, x), compute(original, x))


# --- the marginal likelihood --------------------------------------------------------------------------


@pytest.mark.parametrize("n_importance", [1, 49, 50, 51, 130])
def test_log_marginal_likelihood_is_exact_where_z_says_nothing(x, n_importance):
    """With q(z|x) = p(z) and a decoder that ignores z, every sample's weight is p(x)."""
    network = vae.VAE(dim_z=3, n_hidden=20, mean_image=np.full(784, 0.3), seed=0)
    network.encoder_output.kernel.assign(tf.zeros((20, 6)))
    network.decoder_output.kernel.assign(tf.zeros((20, 784)))
    expected = (x.numpy() * np.log(0.3) + (1 - x.numpy()) * np.log(0.7)).sum(axis=1)
    log_px = network.log_marginal_likelihood(x, x, n_importance, seed=SEED)
    np.testing.assert_allclose(log_px, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [vae.VAE, LaplaceVAE])
def test_log_marginal_likelihood_against_quadrature(x, kind):
    """p(x) is the integral of p(x|z) p(z) over the latent plane."""
    network = make_network(kind)
    axis, step = np.linspace(-10, 10, 201, dtype=np.float32, retstep=True)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    logits = network.decoder(z).numpy().astype(float)
    log_px_z = logits @ x.numpy().T.astype(float) - np.logaddexp(0, logits).sum(axis=1, keepdims=True)
    log_pz = {vae.VAE: stats.norm, LaplaceVAE: stats.laplace}[kind].logpdf(z).sum(axis=1)
    expected = special.logsumexp(log_px_z + log_pz[:, None], axis=0) + 2 * np.log(step)
    log_px = network.log_marginal_likelihood(x, x, 2_000, seed=SEED)
    assert abs(np.mean(log_px - expected)) < 0.15  # 0.05 is usual
    # The network's own quadrature, whose grid follows from q(z|x); one twice as fine changes nothing.
    mean, log_var = tf.fill((8, 2), 6.7), tf.fill((8, 2), np.float32(2 * np.log(0.05)))
    for log_var_ in (log_var, log_var - 2 * np.log(2)):
        log_px = network.log_marginal_likelihood_grid(x, mean, log_var_)
        np.testing.assert_allclose(log_px, expected, atol=0.01)


def test_importance_weights_have_the_elbo_as_their_mean(network, x):
    """The ELBO's KL divergence has a closed form, that of the weights is sampled."""
    n, x = 2_000, x[:4]
    log_weights = network.log_weights(x, x, n, seed=SEED).numpy().astype(float)
    repeated = tf.repeat(x[None], n, axis=0)
    terms = network.elbo_terms(*2 * [tf.reshape(repeated, (-1, 784))], seed=SEED + 1)
    elbos = -np.sum(terms, axis=0, dtype=float).reshape(n, 4)
    error = np.sqrt((log_weights.var(axis=0) + elbos.var(axis=0)) / n)
    assert (np.abs(log_weights.mean(axis=0) - elbos.mean(axis=0)) < 5 * error).all()
    log_px = network.log_marginal_likelihood(x, x, n, seed=SEED).numpy()
    assert (log_px > elbos.mean(axis=0) + 5 * error).all()


@pytest.mark.parametrize("n_importance", [1, 130])
def test_log_marginal_likelihood_uses_as_many_samples_as_asked_for(network, x, n_importance, monkeypatch):
    chunks = []

    def log_weights(*arguments, **options):
        chunks.append(vae.VAE.log_weights(network, *arguments, **options).numpy())
        return tf.constant(chunks[-1])

    monkeypatch.setattr(network, "log_weights", log_weights)
    log_px = network.log_marginal_likelihood(x, x, n_importance, seed=SEED)
    drawn = np.concatenate(chunks)
    assert len(drawn) < n_importance + len(chunks)  # those of the last chunk that are too many do not count
    expected = special.logsumexp(drawn[:n_importance], axis=0) - np.log(n_importance)
    np.testing.assert_allclose(log_px, expected, rtol=1e-6)


def test_log_marginal_likelihood_draws_z_from_the_corrupted_inputs(network, x):
    reversed_ = network.log_marginal_likelihood(x, x[::-1], 1, seed=SEED)
    assert (np.abs(reversed_ - network.log_marginal_likelihood(x, x, 1, seed=SEED)) > 1e-3).any()


def test_active_units_are_those_that_vary():
    mean = np.random.default_rng(0).normal(size=(10_000, 4)) * [1, 0.11, 0.09, 0] + [0, 0, 0, 5]
    assert int(vae.active_units(tf.constant(mean))) == 2


# --- random numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_more", [0, 1, 6])
def test_random_numbers_for_different_purposes_have_different_streams(x, n_more, monkeypatch):
    """However many hidden layers there are, each of which has dropout."""
    network, seeds, keep_probs = make_network(), [], []
    network.encoder_hidden = [*network.encoder_hidden, *n_more * [network.encoder_hidden[-1]]]
    network.decoder_hidden = [*network.decoder_hidden, *n_more * [network.decoder_hidden[-1]]]

    def spy_on(name, position):
        function = getattr(vae, name)

        def spy(*arguments):
            seeds.append(tuple(np.array(arguments[position])))
            return function(*arguments)

        monkeypatch.setattr(vae, name, spy)

    spy_on("uniform", 1)
    spy_on("reparameterize", 2)
    dropout = vae.dropout
    monkeypatch.setattr(
        vae,
        "dropout",
        lambda h, keep_prob, *more: keep_probs.append(keep_prob) or dropout(h, keep_prob, *more),
    )
    vae.binarize(x, SEED)
    vae.salt_and_pepper(x, 0.5, SEED)
    network.elbo_terms(x, x, seed=SEED, keep_prob=0.7)
    assert keep_probs == (4 + 2 * n_more) * [0.7]
    network.log_marginal_likelihood(x, x, 130, seed=SEED)
    assert len(seeds) == len(set(seeds)) == 2 + (4 + 2 * n_more) + 1 + 3  # 130 samples of z are 3 chunks


def test_uniform_draws_are_uniform_and_independent():
    u = vae.uniform((1_001, 501), SEED).numpy()  # an odd number of them
    assert u.shape == (1_001, 501)
    assert u.min() == 0.5 / 2**16  # centred: 0 would be below any probability above 0
    assert u.max() == 1 - 0.5 / 2**16
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    n = u.size // 2
    for lag in (1, n, n + 1):  # two draws come from one random integer
        assert abs(np.corrcoef(u.ravel()[:-lag], u.ravel()[lag:])[0, 1]) < 4 / np.sqrt(n)


def test_dropout_keeps_the_mean_and_a_share_of_the_units():
    h = tf.random.stateless_uniform((1_000, 500), SEED, 0.5, 1.5)
    dropped = vae.dropout(h, 0.9, SEED, 1).numpy()
    kept = dropped != 0
    assert abs(kept.mean() - 0.9) < 5 * np.sqrt(0.9 * 0.1 / kept.size)
    assert abs(dropped.mean() - h.numpy().mean()) < 5 * dropped.std() / np.sqrt(kept.size)
    np.testing.assert_allclose(dropped[kept], h.numpy()[kept] / 0.9, rtol=1e-6)


def test_dropout_differs_between_layers_and_seeds():
    first, *others = (
        vae.dropout(tf.ones((10, 500)), 0.5, seed, stream).numpy()
        for seed, stream in ((SEED, 1), (SEED, 2), (SEED + 1, 1))
    )
    for other in others:
        assert 0.4 < (first == other).mean() < 0.6


def test_binarize_draws_pixels_with_their_grey_level_as_probability():
    grey = np.repeat([0.0, 0.2, 0.7, 1.0], 196).astype(np.float32)
    x = tf.constant(np.tile(grey, (2_000, 1)))
    drawn = vae.binarize(x, SEED).numpy()
    assert set(np.unique(drawn)) == {0, 1}
    for level in (0, 0.2, 0.7, 1):
        pixels = drawn[:, grey == np.float32(level)]
        error = np.sqrt(level * (1 - level) / pixels.size)
        assert abs(pixels.mean() - level) <= 5 * error
    assert (drawn != vae.binarize(x, SEED + 1).numpy()).mean() > 0.1
    sampled = vae.Bernoulli().sample(special.logit(x), SEED).numpy()
    assert (sampled != drawn).mean() < 1e-5  # but for rounding
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
