"""The papers' models: what each changes, against an independent computation; the program runs each."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import one_line
from scipy import integrate, stats

import run_main
import vae

SEED = tf.constant([3, 4])
OPTIONS = {"iwae": {"n_samples": 5}, "ladder": {"dim_z_lower": 4}, "stein": {"n_samples": 6}}


def make_network(name, **options):
    """Returns a small network of a model whose q(z|x) is not the prior."""
    mean_image = np.random.default_rng(0).random(784).astype(np.float32)
    options = OPTIONS.get(name, {}) | options
    network = getattr(vae, run_main.MODELS[name][0])(
        dim_z=2, n_hidden=20, mean_image=mean_image, seed=7, **options
    )
    network.encoder_output.kernel.assign(6 * network.encoder_output.kernel)
    return network


@pytest.fixture(scope="module")
def x():
    return tf.constant(np.random.default_rng(1).random((8, 784)), tf.float32)


def gradient(network, x, labels=None, **options):
    """Returns the gradient of the mean loss in one vector, with zeros where a weight does not matter."""
    options = {"seed": SEED, "keep_prob": 1, "kl_weight": 1.0} | options
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(sum(network.training_terms(x, x, labels, **options)))
    gradients = tape.gradient(loss, network.trainable_variables, unconnected_gradients="zero")
    return np.concatenate([tf.reshape(part, -1) for part in gradients])


# --- importance-weighted ------------------------------------------------------------------------------


def test_iwae_with_one_sample_has_the_gradient_of_the_elbo_in_the_mean(x):
    one, elbo = make_network("iwae", n_samples=1), make_network("vae")
    many = tf.repeat(x[:2], 500, axis=0)
    pairs = [[gradient(network, many, seed=[i, 0]) for network in (one, elbo)] for i in range(20)]
    first, second = np.array(pairs).swapaxes(0, 1)
    error = np.sqrt((first.var(axis=0) + second.var(axis=0)) / 20)
    apart = np.abs(first.mean(axis=0) - second.mean(axis=0))
    assert np.mean(apart[error > 0] < 3 * error[error > 0]) > 0.97
    assert np.linalg.norm(apart) < 0.1 * np.linalg.norm(second.mean(axis=0))


def test_the_bound_rises_with_the_samples_towards_log_px(x):
    many = tf.repeat(x, 200, axis=0)
    bounds = []
    for n in (1, 5, 50):
        network = make_network("iwae", n_samples=n)
        terms = network.training_terms(many, many, None, seed=SEED, keep_prob=1, kl_weight=1.0)
        bounds.append(-float(tf.reduce_mean(sum(terms))))
    assert bounds[0] < bounds[1] < bounds[2]
    assert bounds[-1] < np.mean(network.log_marginal_likelihood_grid(x, *network.encoder(x))) + 0.01


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_iwae_has_the_gradient_of_its_bound(x, kl_weight):
    """With a weight on the KL divergence, of the bound with log p(z) and log q(z|x) weighted."""
    network = make_network("iwae", n_samples=5)
    with tf.GradientTape() as tape:
        log_px, minus_kl = network.weight_terms(x, x, 5, seed=SEED)
        minus_bound = -tf.reduce_mean(tf.reduce_logsumexp(log_px + kl_weight * minus_kl, axis=0))
    expected = tape.gradient(minus_bound, network.trainable_variables)
    with tf.GradientTape() as tape:
        options = {"seed": SEED, "keep_prob": 1, "kl_weight": kl_weight}
        reconstruction, kl = network.training_terms(x, x, None, **options)
        loss = tf.reduce_mean(reconstruction + kl_weight * kl)
    for one, other in zip(tape.gradient(loss, network.trainable_variables), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_what_is_logged_has_no_weight_on_the_kl_divergence(x):
    for name in run_main.MODELS:
        network, labels = make_network(name), tf.zeros(8, tf.int32)
        one, two = (
            network.training_terms(x, x, labels, seed=SEED, keep_prob=1, kl_weight=weight)
            for weight in (1.0, 3.0)
        )
        np.testing.assert_allclose(sum(one), sum(two), rtol=1e-5)


# --- least squares ------------------------------------------------------------------------------------


def test_least_squares_density_integrates_to_one():
    likelihood = vae.GaussianPixels(tf.constant(np.log(255 * 0.3 - 1), tf.float32))

    def density(x):
        return float(tf.exp(likelihood.log_prob(tf.constant([[x]], tf.float32), tf.constant([[0.4]])))[0])

    assert integrate.quad(density, -3, 4)[0] == pytest.approx(1, abs=1e-4)


def test_least_squares_table_has_the_densities_of_all_pairs(x):
    likelihood = vae.GaussianPixels(tf.constant(np.log(255 * 0.3 - 1), tf.float32))
    logits = tf.random.stateless_normal((5, 784), SEED)
    expected = [[likelihood.log_prob(image[None], row[None])[0] for row in logits] for image in x]
    np.testing.assert_allclose(likelihood.log_prob_table(x, logits), expected, rtol=1e-4)


# --- sticks -------------------------------------------------------------------------------------------


def test_sticks_have_the_prior_of_the_paper_and_add_up():
    network = make_network("stick_breaking")
    sticks = network.sticks(tf.random.stateless_normal((20_000, 3), SEED)).numpy().astype(float)
    assert sticks.shape == (20_000, 4)
    np.testing.assert_allclose(sticks.sum(axis=1), 1, atol=1e-5)
    left = 1 - np.cumsum(sticks, axis=1)[:, :-1]
    fractions = sticks[:, :-1] / np.concatenate([np.ones((len(left), 1)), left[:, :-1]], axis=1)
    for column in fractions.T:
        assert stats.kstest(column, stats.beta(1, network.CONCENTRATION).cdf).pvalue > 0.001


def test_sticks_kl_divergence_is_that_of_the_fractions():
    """By Monte Carlo over v, with the density of a transformed Gaussian and that of the Beta distribution."""
    network, (mean, std) = make_network("stick_breaking"), (0.7, 0.4)
    z = np.random.default_rng(0).normal(mean, std, 200_000)
    alpha = network.CONCENTRATION
    v = -np.expm1(stats.norm.logsf(z) / alpha)
    slope = stats.norm.pdf(z) / stats.norm.sf(z) * (1 - v) / alpha  # dv/dz
    draws = stats.norm.logpdf(z, mean, std) - np.log(slope) - stats.beta.logpdf(v, 1, alpha)
    kl = network.prior.kl_divergence(np.float32([[mean]]), np.float32([[2 * np.log(std)]]), None)
    assert draws.mean() == pytest.approx(float(kl[0]), abs=5 * draws.std() / np.sqrt(len(draws)))
    np.testing.assert_allclose(network.sticks(tf.constant(z[:5, None], tf.float32))[:, 0], v[:5], rtol=1e-3)


# --- ladder -------------------------------------------------------------------------------------------


def test_ladder_merges_two_gaussians_into_a_narrower_one():
    network = make_network("ladder")
    rng = np.random.default_rng(0)
    one, other = ([tf.constant(rng.normal(size=(5, 4)), tf.float32) for _ in range(2)] for _ in range(2))
    mean, log_var = network.merge(one, other)
    assert (log_var < tf.minimum(one[1], other[1])).numpy().all()
    z = tf.constant(rng.normal(size=(5, 4)), tf.float32)  # the product of the densities, up to a factor
    product = [
        vae.log_normal(at, *one) + vae.log_normal(at, *other) - vae.log_normal(at, mean, log_var)
        for at in (z, 2 * z)
    ]
    np.testing.assert_allclose(*product, rtol=1e-4)
    silent = network.merge((one[0], one[1] + 50), other)  # an encoder that says nothing
    np.testing.assert_allclose(silent, other, atol=1e-5)


def test_ladder_kl_divergence_is_the_mean_of_the_sampled_one(x):
    network, many = make_network("ladder"), tf.repeat(x[:1], 20_000, axis=0)
    reconstruction, kl = (np.asarray(term, float) for term in network.elbo_terms(many, many, seed=SEED))
    log_px, minus_kl = (
        np.asarray(term, float) for term in network.weight_terms(x[:1], x[:1], 20_000, seed=SEED)
    )
    for closed, sampled in ((kl, -minus_kl), (reconstruction, -log_px)):
        error = np.sqrt((closed.var() + sampled.var()) / 20_000)
        assert abs(closed.mean() - sampled.mean()) < 5 * error


def test_ladder_says_what_each_layer_holds(x):
    network = make_network("ladder")
    measured = network.test_metrics(x, None)
    mean, log_var = (np.asarray(array, float) for array in network.encoder(x))
    kl = 0.5 * np.sum(mean**2 + np.exp(log_var) - log_var - 1, axis=1)
    assert measured["test_kl_upper"] == pytest.approx(kl.mean(), rel=1e-4)
    assert measured["test_kl_upper"] < np.mean(network.elbo_terms(x, x, seed=SEED)[1])
    assert measured["active_units_lower"] > 0
    network.encoder_output.bias.assign([0.0] * 4 + [50.0] * 4)  # z_1's encoder says nothing
    measured = network.test_metrics(x, None)
    assert measured["test_kl_upper"] == pytest.approx(
        np.mean(network.elbo_terms(x, x, seed=SEED)[1]), rel=1e-4
    )
    assert measured["active_units_lower"] == 0


def test_ladder_reconstructs_through_both_layers(x):
    network = make_network("ladder")
    both, top = network.reconstruct(x), network.decode(network.encode(x))
    assert both.shape == top.shape == (8, 784)
    assert np.abs(both - top).max() > 1e-4


# --- Stein --------------------------------------------------------------------------------------------


def test_svgd_directions_vanish_in_the_mean_at_the_posterior():
    """Stein's identity: for n particles of N(0, I), E[phi(z) . z] is -d / n, from their own kernels alone."""
    z = tf.random.stateless_normal((400, 20, 2), SEED)
    along = tf.reduce_sum(vae.svgd_direction(z, -z) * z, axis=-1).numpy()
    assert abs(along.mean()) < 0.01
    assert np.abs(along).mean() > 0.02


@pytest.mark.parametrize(("n", "low", "high"), [(20, 0.8, 1.1), (60, 0.85, 1.1)])
def test_svgd_particles_have_the_variance_of_a_known_gaussian(n, low, high):
    z = tf.random.stateless_normal((n, 10, 2), SEED) * 0.3 + 2
    for _ in range(500):
        z += 0.5 * vae.svgd_direction(z, -z)
    assert abs(np.mean(z)) < 0.05
    assert low < np.mean(np.var(z, axis=0)) < high


def test_stein_trains_the_encoder_by_the_direction_alone(x, monkeypatch):
    """Where particles are at rest, the encoder gets no gradient, and the decoder that of the error."""
    network = make_network("stein")
    encoder = sum(int(np.prod(v.shape)) for layer in network.encoder_hidden for v in layer.weights)
    assert np.linalg.norm(gradient(network, x)[:encoder]) > 0
    monkeypatch.setattr(vae, "svgd_direction", lambda z, score, repulsion: tf.zeros_like(z))
    z = network.particles(x, 6, seed=SEED)
    with tf.GradientTape() as tape:
        error = -tf.reduce_mean([network.likelihood.log_prob(x, network.decoder(part)) for part in z])
    decoder = [*network.decoder_hidden[0].trainable_variables, *network.decoder_output.trainable_variables]
    expected = tape.gradient(error, decoder)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(sum(network.training_terms(x, x, None, seed=SEED, keep_prob=1, kl_weight=1.0)))
    for found, wanted in zip(tape.gradient(loss, decoder), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)
    assert (gradient(network, x)[:encoder] == 0).all()


def test_stein_moves_particles_along_the_direction(x, monkeypatch):
    directions = []

    def recorder(*arguments):
        directions.append(svgd_direction(*arguments))
        return directions[-1]

    svgd_direction = vae.svgd_direction
    monkeypatch.setattr(vae, "svgd_direction", recorder)
    network = make_network("stein")
    before = network.particles(x, 6, seed=SEED)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(sum(network.training_terms(x, x, None, seed=SEED, keep_prob=1, kl_weight=2.0)))
    output = network.bend_output
    output.kernel.assign_sub(1e-4 * tape.gradient(loss, output.kernel))
    moved = network.particles(x, 6, seed=SEED) - before
    assert tf.reduce_sum(moved * directions[0]) > 0
    # The direction is that of the weighted log p(x, z).
    with tf.GradientTape() as tape:
        tape.watch(before)
        log_px = tf.stack(
            [network.likelihood.log_prob(x, network.decoder(part)) for part in tf.unstack(before)]
        )
        log_joint = log_px + 2.0 * network.prior.log_prob(before)
    expected = svgd_direction(before, tape.gradient(log_joint, before), 2.0)
    np.testing.assert_allclose(directions[0], expected, rtol=1e-3, atol=1e-4)


# --- labels -------------------------------------------------------------------------------------------


def test_labels_reach_the_encoder_only_through_digits_that_have_one(x):
    network, plain = make_network("labels"), make_network("vae")
    unknown = tf.fill([8], -1)
    classifier = sum(int(np.prod(variable.shape)) for variable in network.classifier.weights)
    without = gradient(network, x, unknown)
    np.testing.assert_allclose(without[:-classifier], gradient(plain, x), atol=1e-5)
    assert (without[-classifier:] == 0).all()
    one = tf.tensor_scatter_nd_update(unknown, [[3]], [7])
    told = gradient(network, x, one) - without
    assert np.linalg.norm(told[:-classifier]) > 0
    assert np.linalg.norm(told[-classifier:]) > 0
    # A step against it brings the score of the label nearer to its side.
    score = network.classifier(network.encode(x))[3, 7]
    network.classifier.bias.assign_sub(0.01 * tf.cast(told[-10:], tf.float32))
    assert network.classifier(network.encode(x))[3, 7] > score


def test_the_error_of_labels_is_the_share_of_wrong_ones(x):
    network = make_network("labels")
    labels = network.classify(x).numpy()
    labels[:2] += 1
    assert network.test_metrics(x, labels) == {"test_error": 0.25}


# --- the program --------------------------------------------------------------------------------------


PAPERS = [name for name in run_main.MODELS if name != "vae"]


@pytest.mark.parametrize("name", PAPERS)
def test_log_px_lies_above_the_elbo_and_agrees_with_quadrature(x, name):
    network = make_network(name)
    log_px = network.log_marginal_likelihood(x, x, 2_000, seed=SEED).numpy()
    many = tf.repeat(x, 200, axis=0)
    elbos = -np.sum(network.elbo_terms(many, many, seed=SEED), axis=0).reshape(len(x), 200)
    assert (log_px > elbos.mean(axis=1) - 0.3).all()
    assert np.mean(log_px) > elbos.mean()
    if name != "ladder":  # whose plane is not all of z
        exact = network.log_marginal_likelihood_grid(x, *network.encoder(x))
        assert np.mean(log_px) == pytest.approx(np.mean(exact), abs=0.4)


@pytest.mark.parametrize("name", PAPERS)
def test_each_model_trains_leaves_what_it_should_and_is_resumed_to_the_same_bits(run, tmp_path, name):
    flags = [f"--model={name}", "--num_epochs=2", "--warm_up=2", "--kl_weight=0.9", "--n_generate=5"]
    flags += [f"--{option}={value}" for option, value in OPTIONS.get(name, {}).items()]
    assert run(*flags, f"--results_path={tmp_path}") == 0
    pictures = {"ladder": {"layers.png"}, "stick_breaking": {"simplex.png", "posterior.png"}}
    found = {path.name for path in tmp_path.iterdir()} & {"layers.png", "simplex.png", "posterior.png"}
    assert found == pictures.get(name, {"posterior.png"})
    network = keras.models.load_model(tmp_path / "vae.keras")
    assert type(network) is getattr(vae, run_main.MODELS[name][0])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    own = {"labels": {"test_error"}, "ladder": {"test_kl_upper", "active_units_lower"}}
    found = metrics.keys() & {"test_error", "test_kl_upper", "active_units_lower"}
    assert found == own.get(name, set())

    newest = run_main.checkpoints(tmp_path)[2]
    with np.load(newest) as arrays:
        expected = dict(arrays)
    newest.unlink()  # as if killed in the second epoch
    assert run("--resume", f"--results_path={tmp_path}", "--PMLR=False", "--PRR=False") == 0
    with np.load(newest) as arrays:
        assert set(arrays) == set(expected)
        for part in set(expected) - {"history"}:  # the log, with seconds
            np.testing.assert_array_equal(arrays[part], expected[part])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--n_samples 5", "--n_samples vae"),
        ("--model ladder --n_samples 5", "--n_samples ladder"),
        ("--dim_z_lower 5", "--dim_z_lower vae"),
        ("--model iwae --n_labels 5", "--n_labels iwae"),
        ("--model least_squares --binarize", "--binarize least_squares"),
        ("--model gan", "--model 'gan'"),
    ],
)
def test_what_makes_no_sense_together_is_one_line(capsys, line, words):
    assert run_main.main(line.split()) == 2
    err = one_line(capsys.readouterr().err)
    assert [word for word in words.split() if word not in err] == []


def test_labels_are_told_for_as_many_digits_of_each_class_as_asked_for(few_digits):
    for augment, n in ((False, 1), (True, 5)):
        flags = run_main.parse_flags(["--model=labels", "--n_labels=7", f"--augment={augment}"])
        labels = run_main.make_digits(few_digits, flags).train_labels
        assert len(labels) == 2_000 * n
        told = np.flatnonzero(labels >= 0)
        assert (np.bincount(labels[told]) == 7 * n).all()
        np.testing.assert_array_equal(labels[told], few_digits.train_labels[told % 2_000])
