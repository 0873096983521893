"""The variational autoencoder: encoder, decoder, the overall network and its loss.

After Kingma and Welling, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), with two hidden layers
where the networks of their appendix C have one:

    encoder   q(z|x) = N(z; mean(x), diag exp(log_var(x)))
    decoder   p(x|z) = Bernoulli(x; sigmoid(logits(z)))
    prior     p(z)   = N(0, I)
    loss      -ELBO  = -E_q[log p(x|z)] + KL[q(z|x) || p(z)]

An image x is a row of n_pixels numbers in [0, 1], a latent vector z a row of dim_z numbers. Losses are in
nats per image: sums over pixels or latent dimensions, never means over them.

In this order: random numbers; the three densities; the network with its loss and training step; other
models, each a subclass that overrides only what it changes.
"""

import contextlib
import enum
import math
import random
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from scipy import special

IMPORTANCE_CHUNK = 50  # importance samples per image processed at once; bounds the memory they take
N_CLASSES = 10


# --- Random numbers -----------------------------------------------------------------------------------


class Stream(enum.IntEnum):
    """The purpose of a random draw: draws with the same seed are independent if their streams differ."""

    LATENT = 0
    UPPER_LATENT = 1
    PRIOR = 2
    NOISE = 3
    BINARIZATION = 4
    IMPORTANCE = 5
    DROPOUT = 100  # the first layer's; the others' follow


def uniform(shape, seed, stream):
    """Returns uniform draws from (0, 1). seed: two integers; the same seed and stream give the same draws."""
    draws = random_uniform(tf.reduce_prod(shape), fold_in(seed, int(stream)))
    return tf.reshape(draws, shape)


def fold_in(seed, number):
    """Returns a new seed that depends on both.

    tf.random.fold_in, after clearing the sign bits of the seed: XLA and eager execution fold a negative seed
    differently.
    """
    return tf.random.fold_in(tf.bitwise.bitwise_and(seed, 2**31 - 1), number)


@tf.function(jit_compile=True, autograph=False, reduce_retracing=True)
def random_uniform(n, seed):
    """Returns n uniform draws from (0, 1), two from each random 32-bit integer, which saves 4% of an epoch.

    TensorFlow has Threefry in XLA-compiled code only. Its other generator, Philox, would make an epoch with
    noise twice as long.
    """
    bits = tf.random.stateless_uniform(
        [(n + 1) // 2], seed, minval=None, maxval=None, dtype=tf.uint32, alg="threefry"
    )
    draws = tf.concat([bits % 2**16, bits // 2**16], axis=0)[:n]
    return (tf.cast(draws, tf.float32) + 0.5) / 2**16


def normal(shape, seed, stream):
    """Returns draws from N(0, 1), by inverting its distribution function; arguments as for `uniform`.

    tf.random.stateless_normal would take ten times as long, and its draws depend on whether XLA compiles it.
    """
    coarse, fine = tf.unstack(uniform(tf.concat([[2], shape], axis=0), seed, stream))  # 16 bits each
    u = coarse + (fine - 0.5) / 2**16
    return tf.math.ndtri(tf.clip_by_value(u, 2**-24, 1 - 2**-24))


def reparameterize(mean, log_var, seed, stream=Stream.LATENT):
    """Draws z ~ N(mean, exp(log_var)) as a differentiable function of both: z = mean + std * epsilon.

    The reparameterization trick, section 2.4 of the paper. mean, log_var and z: (..., dim_z).
    """
    return mean + tf.exp(log_var / 2) * normal(tf.shape(mean), seed, stream)


def dropout(h, keep_prob, seed, layer):
    """Zeros each unit of h, (batch, ...), with probability 1 - keep_prob; divides the others by keep_prob.

    This preserves the mean (Srivastava et al. 2014). keep_prob may be a tensor that changes during training.
    If keep_prob is None (in evaluation) or the number 1, h is returned unchanged. layer: the layer's number,
    from 0.
    """
    if keep_prob is None or (not tf.is_tensor(keep_prob) and keep_prob == 1):
        return h
    # Keras' Dropout layer would cost a fifth of the training time.
    kept = uniform(tf.shape(h), seed, Stream.DROPOUT + layer) < keep_prob
    return h * (tf.cast(kept, tf.float32) / keep_prob)


def salt_and_pepper(x, noise_level, seed):
    """Returns x: (batch, n_pixels) with each pixel replaced, with probability noise_level, by 0 or 1.

    Both are equally likely.
    """
    u = uniform(tf.shape(x), seed, Stream.NOISE)
    black_or_white = tf.where(u < noise_level / 2, 0.0, 1.0)
    return tf.where(u < noise_level, black_or_white, x)


def binarize(x, seed):
    """Returns x: (batch, n_pixels), each pixel drawn from Bernoulli(x): Salakhutdinov and Murray 2008."""
    return tf.cast(uniform(tf.shape(x), seed, Stream.BINARIZATION) < x, tf.float32)


@contextlib.contextmanager
def reproducible_initialization(seed):
    """Inside this context, new Keras layers are float32, and their initial weights are a function of `seed`.

    An initializer without a seed takes one from Python's `random`; its state is restored afterwards.
    """
    state = random.getstate()
    policy = keras.config.dtype_policy()
    random.seed(seed)
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        random.setstate(state)
        keras.config.set_dtype_policy(policy)


# --- Densities ----------------------------------------------------------------------------------------


def log_normal(z, mean, log_var):
    """log N(z; mean, diag exp(log_var)) in nats, summed over the last axis; all three are (..., dim_z)."""
    squares = (z - mean) ** 2 * tf.exp(-log_var)
    return -0.5 * tf.reduce_sum(math.log(2 * math.pi) + log_var + squares, axis=-1)


class Density(keras.layers.Layer):
    """A density as a Keras layer: weights that it creates by `add_weight` are trained and saved, too."""

    def __init__(self):
        # Without a name, Keras would number it, and runs in one process would differ.
        super().__init__(name=type(self).__name__)
        self.built = True  # weights are created in the constructor, not at the first call


class Prior(Density):
    """p(z). Subclasses implement log_prob and sample with StandardNormal's signatures."""

    # The distribution function of one dimension of z and its inverse, on NumPy arrays. They set the axes of
    # the manifold; if a prior has none, the distribution of the encoded digits does.
    cdf = None
    quantile = None

    def kl_divergence(self, posterior, q, z):
        """KL[q(z|x) || p(z)] in nats, (batch,), estimated as log q(z|x) - log p(z) at a draw z ~ q(z|x).

        q: the parameters that the encoder returns. z: (batch, dim_z).
        """
        return posterior.log_prob(z, q) - self.log_prob(z)


class StandardNormal(Prior):
    """p(z) = N(0, I)."""

    def log_prob(self, z):
        """log p(z) in nats, (...,), of latent vectors z: (..., dim_z)."""
        return log_normal(z, tf.zeros_like(z), tf.zeros_like(z))

    def sample(self, n, dim_z, seed):
        """Returns n draws from p(z): (n, dim_z)."""
        return normal((n, dim_z), seed, Stream.PRIOR)

    def cdf(self, z):
        return special.ndtr(z)

    def quantile(self, p):
        return special.ndtri(p)

    def kl_divergence(self, posterior, q, z):
        """In closed form for a Gaussian q, so independent of the draw: appendix B of the paper."""
        if type(posterior) is not GaussianPosterior:
            return super().kl_divergence(posterior, q, z)
        return tf.reduce_sum(self.kl_per_unit(*q), axis=-1)

    def kl_per_unit(self, mean, log_var):
        """KL[N(mean, exp(log_var)) || N(0, 1)] of each latent dimension: (..., dim_z)."""
        return -0.5 * (1 + log_var - mean**2 - tf.exp(log_var))


class GaussianPosterior(Density):
    """q(z|x) = N(z; mean, diag exp(log_var)). Another posterior implements the same five methods.

    q, its parameters, is the tuple (mean, log_var) of arrays (..., dim_z).
    """

    def n_outputs(self, dim_z):
        """Returns how many numbers the encoder has to compute per image."""
        return 2 * dim_z

    def parameters(self, outputs):
        """Returns q from the encoder's outputs: (..., n_outputs)."""
        n = outputs.shape[-1] // 2  # the gradient of tf.split would not compile within tf.distribute
        return outputs[..., :n], outputs[..., n:]

    def sample(self, q, seed):
        """Returns a draw z, (..., dim_z), as a differentiable function of the parameters."""
        mean, log_var = q
        return reparameterize(mean, log_var, seed)

    def log_prob(self, z, q):
        """log q(z|x) in nats, (...,), of latent vectors z: (..., dim_z)."""
        mean, log_var = q
        return log_normal(z, mean, log_var)

    def moments(self, q):
        """Returns mean and log variance of each latent dimension: (..., dim_z) each."""
        return q


class Likelihood(Density):
    """p(x|z). Subclasses implement log_prob and mean with Bernoulli's signatures.

    logits: (..., n_pixels), what the decoder returns for latent vectors z.
    """

    is_binary = False  # whether pixels are black or white, as --binarize needs; then `sample` draws them

    def log_prob_table(self, x, logits):
        """log p(x|z) in nats, (n, m), of every image in x, (n, n_pixels), given every row of logits.

        logits: (m, n_pixels).
        """

        def log_probs_of(image):
            return self.log_prob(tf.broadcast_to(image, tf.shape(logits)), logits)

        return tf.map_fn(log_probs_of, x)

    def initial_output_bias(self, mean_image):
        """Returns the decoder's output biases before training, (n_pixels,) or one number."""
        return 0.0


class Bernoulli(Likelihood):
    """p(x|z) = Bernoulli(x; sigmoid(logits)), also used for grey levels in [0, 1]."""

    is_binary = True

    def log_prob(self, x, logits):
        """log p(x|z) in nats, (...,): minus the binary cross-entropy, summed over the pixels.

        Equation 11 of the paper, from logits, so that no probability needs clipping. x: (..., n_pixels).
        """
        x = tf.broadcast_to(x, tf.shape(logits))
        return -tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels=x, logits=logits), axis=-1)

    def log_prob_table(self, x, logits):
        # log p(x|z) is the sum of x * logits - softplus(logits) over the pixels: a matrix product.
        return tf.matmul(x, logits, transpose_b=True) - tf.reduce_sum(tf.nn.softplus(logits), axis=-1)

    def mean(self, logits):
        """E[x|z], (..., n_pixels), which pictures show as grey levels."""
        return tf.sigmoid(logits)

    def sample(self, logits, seed):
        """Returns a draw from p(x|z): black and white pixels, (..., n_pixels)."""
        return binarize(tf.sigmoid(logits), seed)

    def initial_output_bias(self, mean_image):
        """Returns the logits of mean_image, clipped so that those of always-black pixels are finite."""
        pixels = np.clip(mean_image, 0.001, 0.999)
        return np.log(pixels / (1 - pixels))


# --- The network --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A mini-batch. The inputs differ from the targets where noise corrupts them."""

    targets: tf.Tensor  # (batch, n_pixels) in [0, 1]: the images to reconstruct
    inputs: tf.Tensor  # (batch, n_pixels): what the encoder sees
    labels: tf.Tensor | None = None  # (batch,) integers, -1 for an unknown label


def as_float32(array):
    """Returns floats as a float32 tensor; TypeError for integers, such as pixels from 0 to 255."""
    tensor = tf.convert_to_tensor(array)
    if not tensor.dtype.is_floating:
        raise TypeError(f"expected floats, found {tensor.dtype.name}: for images, pass pixels / 255")
    return tf.cast(tensor, tf.float32)


def as_batch(data):
    """Returns a Batch from a Batch, from images, or from what Keras' `fit` passes on: (x,) or (x, y).

    In (x, y), a y of shape (batch,) holds labels, and one of shape (batch, n_pixels) the targets of inputs x.
    """
    if isinstance(data, Batch):
        targets, inputs, labels = data
    elif not isinstance(data, tuple):
        targets, inputs, labels = data, data, None
    elif len(data) == 1:
        targets, inputs, labels = data[0], data[0], None
    elif len(data) == 2 and tf.convert_to_tensor(data[1]).shape.rank == 1:
        targets, inputs, labels = data[0], data[0], data[1]
    elif len(data) == 2:
        targets, inputs, labels = data[1], data[0], None
    else:
        raise TypeError("expected images, (images, labels), (inputs, targets) or a Batch; no sample weights")
    if labels is not None:
        labels = tf.cast(labels, tf.int32)
    batch = Batch(as_float32(targets), as_float32(inputs), labels)
    if batch.targets.shape[-1] != batch.inputs.shape[-1]:
        raise TypeError(f"targets of {batch.targets.shape[-1]} pixels, inputs of {batch.inputs.shape[-1]}")
    return batch


def labels_of(batch):
    """Returns the labels of a batch: (batch,), -1 for an unknown one."""
    if batch.labels is None:
        return tf.fill(tf.shape(batch.targets)[:1], -1)
    return batch.labels


def hidden_layer(units, activation, **options):
    """Returns a dense layer with the initialization of He et al. (arXiv:1502.01852)."""
    return keras.layers.Dense(units, activation, kernel_initializer="he_normal", **options)


def output_layer(units, **options):
    """Returns a linear layer whose weights start at a tenth of He's.

    The loss sums hundreds of pixels, so outputs of full size make the first gradients huge. Clipped SGD
    tolerates them, but ends 0.4 nats worse (dim_z 2, 20 epochs).
    """
    initializer = keras.initializers.VarianceScaling(2 * 0.1**2, "fan_in", "truncated_normal")
    return keras.layers.Dense(units, kernel_initializer=initializer, **options)


def tile_samples(q, n):
    """Returns each array of q, (batch, ...), repeated n times: (n, batch, ...)."""
    return tuple(tf.broadcast_to(array, tf.concat([[n], tf.shape(array)], axis=0)) for array in q)


def active_units(mean):
    """Returns how many units of mean: (n, dim_z) are active: Var_x[E[z|x]] > 0.01 (Burda et al. 2016)."""
    return tf.math.count_nonzero(tf.math.reduce_variance(mean, axis=0) > 0.01)


@keras.saving.register_keras_serializable("vae")
class VAE(keras.Model):
    """The overall network: encoder, decoder, their loss and its training step.

    dim_z: length of a latent vector. n_hidden: units per hidden layer.
    mean_image: mean of the training images, (n_pixels,) in [0, 1] or one number; saved with the weights.
    seed: a non-negative integer that determines the initial weights, and the random numbers of Keras' `fit`
    and of `sample` without a seed.

    Encoder and decoder get the labels, (batch,) integers or None, for the sake of conditional models; here
    they ignore them. keep_prob is the keep probability of dropout, None in evaluation.
    """

    # Standard deviation of the initial biases of the decoder's first layer, relative to that of its weights.
    # With 0, all of its units would change sign at the origin of the latent plane: 1.5 nats worse after 6
    # epochs.
    decoder_bias_scale = 2.0
    has_log_joint = True  # whether the decoder depends on z alone, so that log p(x, z) can be computed
    has_classes = False  # whether the decoder needs a class beside z

    def __init__(self, dim_z=2, n_hidden=500, mean_image=0.5, seed=0, n_pixels=784):
        super().__init__(name="vae", dtype="float32")
        self.dim_z = dim_z
        self.n_hidden = n_hidden
        self.seed = seed
        self.n_pixels = n_pixels
        names = ("negative_elbo", "reconstruction", "kl")
        self.running_means = {name: keras.metrics.Mean(name, dtype="float32") for name in names}
        with reproducible_initialization(seed):
            self.sampling_seeds = keras.random.SeedGenerator(seed)
            self.prior = self.make_prior()
            self.posterior = self.make_posterior()
            self.likelihood = self.make_likelihood()
            constant = keras.initializers.Constant(mean_image)
            self.mean_image = self.add_weight((n_pixels,), constant, trainable=False, name="mean_image")
            self.make_layers(mean_image)
            self(tf.zeros((1, n_pixels)), tf.zeros(1, tf.int32))  # builds all layers

    def make_prior(self):
        """Returns p(z); override it, or the two below, for another density."""
        return StandardNormal()

    def make_posterior(self):
        """Returns q(z|x)."""
        return GaussianPosterior()

    def make_likelihood(self):
        """Returns p(x|z)."""
        return Bernoulli()

    def encoder_layers(self):
        """Returns the encoder's hidden layers: any Keras layers that take images (batch, n_pixels).

        Dropout follows those that have a kernel, such as dense and convolutional ones.
        """
        return [
            hidden_layer(self.n_hidden, "elu", name="encoder_1"),
            hidden_layer(self.n_hidden, "tanh", name="encoder_2"),
        ]

    def decoder_layers(self):
        """Returns the decoder's hidden layers: any Keras layers that take z (batch, dim_z)."""
        return [
            self.first_decoder_layer(self.n_hidden, "tanh"),
            hidden_layer(self.n_hidden, "elu", name="decoder_2"),
        ]

    def first_decoder_layer(self, units, activation):
        """Returns the decoder's first layer, which is dense and has random initial biases."""
        bias_std = self.decoder_bias_scale * math.sqrt(2 / self.dim_z_bottom)
        biases = keras.initializers.RandomNormal(stddev=bias_std)
        return hidden_layer(units, activation, bias_initializer=biases, name="decoder_1")

    @property
    def dim_z_bottom(self):
        """Length of the decoder's input: that of z, unless a model has several layers of latent variables."""
        return self.dim_z

    def make_layers(self, mean_image):
        """Makes the layers of encoder and decoder."""
        n_outputs = self.posterior.n_outputs(self.dim_z_bottom)
        self.encoder_hidden = self.encoder_layers()
        self.encoder_output = output_layer(n_outputs, name="encoder_output")
        self.decoder_hidden = self.decoder_layers()
        # Before training, the decoder outputs roughly the mean image.
        bias = keras.initializers.Constant(self.likelihood.initial_output_bias(mean_image))
        self.decoder_output = output_layer(self.n_pixels, bias_initializer=bias, name="decoder_output")

    def build(self, input_shape=None):
        """Builds all layers by computing a loss; Keras calls it at the first call."""
        images = tf.zeros((1, self.n_pixels))
        batch = Batch(images, images, tf.zeros(1, tf.int32))
        self.training_loss(batch, seed=(0, 0), keep_prob=None, kl_weight=1.0)

    def get_config(self):
        """Constructor arguments for keras.models.load_model; the mean image is one of the saved weights."""
        names = ("dim_z", "n_hidden", "seed", "n_pixels")
        return {name: getattr(self, name) for name in names}

    def encoder(self, x, labels=None, *, keep_prob=None, seed=None):
        """The Gaussian encoder q(z|x): returns mean and log_var, (batch, dim_z), for x: (batch, n_pixels)."""
        h = self.encoder_features(x, keep_prob, seed)
        return self.posterior.parameters(self.encoder_output(h))

    def encoder_features(self, x, keep_prob=None, seed=None):
        """The encoder's last hidden layer: (batch, n_hidden) for images x: (batch, n_pixels)."""
        centred = as_float32(x) - self.mean_image
        return self.hidden(self.encoder_hidden, centred, keep_prob, seed, 0)

    def decoder(self, z, labels=None, *, keep_prob=None, seed=None):
        """The Bernoulli decoder p(x|z): returns the logits, (batch, n_pixels), for z: (batch, dim_z)."""
        h = self.hidden(self.decoder_hidden, as_float32(z), keep_prob, seed, len(self.encoder_hidden))
        return self.decoder_output(h)

    def hidden(self, layers, h, keep_prob, seed, first_layer):
        """Applies hidden layers, each followed by dropout. first_layer: the number of the first."""
        for number, layer in enumerate(layers, first_layer):
            h = layer(h, training=keep_prob is not None)
            if hasattr(layer, "kernel"):  # not after normalization or reshaping
                h = dropout(h, keep_prob, seed, number)
        return h

    def negative_elbo(self, batch, *, seed, keep_prob=None, kl_weight=1.0):
        """-ELBO = -E_q[log p(x|z)] + KL[q(z|x) || p(z)], estimated with one sample of z: equation 10.

        Returns it and its two terms, the reconstruction error and the KL divergence: (batch,) each, in nats.
        kl_weight multiplies the KL divergence in the sum.
        """
        batch = as_batch(batch)
        q = self.encoder(batch.inputs, batch.labels, keep_prob=keep_prob, seed=seed)
        z = self.posterior.sample(q, seed)  # the reparameterization trick
        reconstruction, kl = self.elbo_terms(batch, q, z, keep_prob=keep_prob, seed=seed)
        return reconstruction + kl_weight * kl, reconstruction, kl

    def elbo_terms(self, batch, q, z, *, keep_prob, seed):
        """The two terms of -ELBO for a draw z ~ q(z|x): -log p(x|z) and KL[q(z|x) || p(z)], (batch,) each."""
        logits = self.decoder(z, batch.labels, keep_prob=keep_prob, seed=seed)
        reconstruction = -self.likelihood.log_prob(batch.targets, logits)
        return reconstruction, self.prior.kl_divergence(self.posterior, q, z)

    def training_loss(self, batch, *, seed, keep_prob, kl_weight):
        """Returns what training minimizes, (batch,), and the two terms to log; overridden by other models."""
        return self.negative_elbo(batch, seed=seed, keep_prob=keep_prob, kl_weight=kl_weight)

    def train_step(self, data, seed=None, keep_prob=1.0, kl_weight=1.0):
        """One step of gradient descent on the negative ELBO of a mini-batch; Keras' `fit` calls it, too.

        data: see `as_batch`. Without keep_prob, as in `fit`, there is no dropout. Returns the means of -ELBO
        and of its two terms since the last reset_metrics().
        """
        batch = as_batch(data)
        if seed is None:
            seed = tf.stack([self.seed, tf.cast(self.optimizer.iterations, tf.int32)])
        with tf.GradientTape() as tape:
            loss, reconstruction, kl = self.training_loss(
                batch, seed=seed, keep_prob=keep_prob, kl_weight=kl_weight
            )
            loss = tf.reduce_mean(loss)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return self.track(negative_elbo=reconstruction + kl, reconstruction=reconstruction, kl=kl)

    def test_step(self, data):
        """Updates the means of -ELBO and of its terms without training; called by Keras' `evaluate`."""
        negative_elbo, reconstruction, kl = self.negative_elbo(as_batch(data), seed=(0, 0))
        return self.track(negative_elbo=negative_elbo, reconstruction=reconstruction, kl=kl)

    def track(self, **values):
        """Adds the values of a mini-batch, (batch,) each, to the running means, and returns these by name."""
        for name, numbers in values.items():
            self.running_means[name].update_state(numbers)
        return self.get_metrics_result()

    @property
    def metrics(self):
        """The running means, which Keras resets at the beginning of each epoch."""
        return list(self.running_means.values())

    def importance_terms(self, batch, n, *, seed, keep_prob=None):
        """log p(x|z) and log [p(z) / q(z|x)] for n samples z ~ q(z|x) per image: (n, batch) each, in nats."""
        batch = as_batch(batch)
        q = tile_samples(self.encoder(batch.inputs, batch.labels, keep_prob=keep_prob, seed=seed), n)
        z = self.posterior.sample(q, seed)
        logits = self.decode_samples(z, batch.labels, keep_prob=keep_prob, seed=seed)
        log_ratio = self.prior.log_prob(z) - self.posterior.log_prob(z, q)
        return self.likelihood.log_prob(batch.targets, logits), log_ratio

    def decode_samples(self, z, labels, *, keep_prob=None, seed=None):
        """The decoder for n samples per image: logits (n, batch, n_pixels) for z: (n, batch, dim_z)."""
        shape = tf.shape(z)
        labels = None if labels is None else tf.tile(labels, [shape[0]])
        logits = self.decoder(tf.reshape(z, (-1, z.shape[-1])), labels, keep_prob=keep_prob, seed=seed)
        return tf.reshape(logits, (shape[0], shape[1], self.n_pixels))

    def log_importance_weights(self, batch, n, *, seed):
        """log [p(x|z) p(z) / q(z|x)] for n importance samples z ~ q(z|x) per image: (n, batch), in nats."""
        log_px_given_z, log_ratio = self.importance_terms(batch, n, seed=seed)
        return log_px_given_z + log_ratio

    def log_marginal_likelihood(self, batch, n_importance, *, seed):
        """log p(x) in nats, (batch,), estimated with n_importance samples of z per image."""
        log_px, _ = self.importance_sampling(batch, n_importance, seed=seed)
        return log_px

    def importance_sampling(self, batch, n_importance, *, seed):
        """Returns log p(x) in nats and the effective sample size, (batch,) each.

        log p(x) ~ logsumexp_k log_weights_k - log n_importance. With one sample, its expectation is the ELBO;
        it rises towards log p(x) as n_importance grows (Burda et al. 2016, section 3). The effective sample
        size, (sum_k w_k)^2 / sum_k w_k^2, is n_importance if all weights are equal and 1 if one dominates.
        """
        batch = as_batch(batch)
        seed = fold_in(seed, int(Stream.IMPORTANCE))
        n_chunks = math.ceil(n_importance / IMPORTANCE_CHUNK)
        size = math.ceil(n_importance / n_chunks)

        def log_sum(chunk):
            log_weights = self.log_importance_weights(batch, size, seed=fold_in(seed, chunk))
            wanted = chunk * size + tf.range(size) < n_importance  # the last chunk may have too many
            log_weights = tf.where(wanted[:, None], log_weights, -np.inf)
            return tf.reduce_logsumexp([log_weights, 2 * log_weights], axis=1)

        log_sums = tf.map_fn(log_sum, tf.range(n_chunks), fn_output_signature=tf.float32)
        log_sum_of_weights, log_sum_of_squares = tf.unstack(tf.reduce_logsumexp(log_sums, axis=0))
        effective_sample_size = tf.exp(2 * log_sum_of_weights - log_sum_of_squares)
        return log_sum_of_weights - math.log(n_importance), effective_sample_size

    def log_joint(self, x, z):
        """log p(x, z) in nats, (n, m), of every image in x, (n, n_pixels), with every z: (m, dim_z)."""
        z = as_float32(z)
        return self.likelihood.log_prob_table(as_float32(x), self.decoder(z)) + self.prior.log_prob(z)

    def kl_per_unit(self, q):
        """KL[q(z|x) || p(z)] of each latent dimension, (batch, dim_z).

        None unless q is the diagonal Gaussian and p is N(0, I).
        """
        if type(self.prior) is StandardNormal and type(self.posterior) is GaussianPosterior:
            return self.prior.kl_per_unit(*q)
        return None

    def log_marginal_likelihood_grid(self, x, mean, log_var, progress=iter):
        """log p(x) in nats, (n,), by quadrature over the latent plane, for dim_z 2.

        mean, log_var: (n, 2), the moments of q(z|x). The grid covers at least [-5, 5] and six standard
        deviations around every mean. Its spacing is the smallest standard deviation or 0.05, whichever is
        smaller, but large enough for at most about 1,000 points on an axis. The sum is accurate if p(z|x) is
        no narrower than the spacing.
        progress(columns) iterates over the grid's columns, and may show how many are done.
        """
        std = np.exp(np.asarray(log_var) / 2)
        reach = max(5.0, np.max(np.abs(mean) + 6 * std))
        spacing = max(min(0.05, std.min()), reach / 500)
        n_points = math.ceil(2 * reach / spacing) + 1
        axis, spacing = np.linspace(-reach, reach, n_points, dtype=np.float32, retstep=True)
        x = as_float32(x)
        log_sum = np.full(len(x), -np.inf)
        for z_1 in progress(axis):  # a column of the grid at a time
            z = tf.stack([tf.fill(axis.shape, z_1), axis], axis=1)
            log_sum = np.logaddexp(log_sum, tf.reduce_logsumexp(self.log_joint(x, z), axis=1))
        return log_sum + 2 * np.log(spacing)

    def encode(self, x, labels=None):
        """Returns the latent means, (n, dim_z), of images x: (n, n_pixels) in [0, 1]."""
        mean, _ = self.posterior.moments(self.encoder(x, labels))
        return mean

    def decode(self, z, labels=None):
        """Returns the mean images E[x|z], (n, n_pixels), for latent vectors z: (n, dim_z)."""
        return self.likelihood.mean(self.decoder(z, labels))

    def reconstruct(self, x, labels=None):
        """Returns images x: (n, n_pixels), encoded and decoded. So does the network itself: network(x)."""
        return self.decode(self.encode(x, labels), labels)

    def call(self, x, labels=None):
        return self.reconstruct(x, labels)

    def sample_with_latents(self, n, seed, labels=None):
        """Returns n draws z from the prior, (n, dim_z), and the logits, (n, n_pixels), of their images."""
        z = self.prior.sample(n, self.dim_z, seed)
        return z, self.decoder(z, labels)

    def sample(self, n, seed=None, labels=None):
        """Returns n new images, (n, n_pixels): decoded draws from the prior, different at each call.

        labels: (n,), for a model with classes; by default, all ten classes in turn.
        """
        if seed is None:
            seed = tf.cast(self.sampling_seeds.next(), tf.int32)
        if labels is None:
            labels = tf.range(n) % N_CLASSES
        _, logits = self.sample_with_latents(n, seed, labels)
        return self.likelihood.mean(logits)

    def classify(self, x):
        """Returns predicted labels, (n,), of images x: (n, n_pixels); None if the model has no classifier."""
        return None

    def test_metrics(self, batch):
        """Returns model-specific test metrics, {name: number}: here a classifier's error rate."""
        predicted = self.classify(batch.inputs)
        return {} if predicted is None else {"test_error": float(np.mean(predicted != batch.labels))}

    def fingerprint(self):
        """Returns numbers that identify what the network computes: -ELBO, its two terms, a log weight."""
        with tf.device("CPU"):  # a GPU rounds differently
            image = tf.reverse(self.mean_image, axis=[0])[None]  # reversed, because centring would make it 0
            batch = Batch(image, image, tf.zeros(1, tf.int32))
            log_weights = self.log_importance_weights(batch, 1, seed=(0, 0))
            return np.concatenate([*self.negative_elbo(batch, seed=(0, 0)), *log_weights])


@keras.saving.register_keras_serializable("vae")
class ClippedSGD(keras.optimizers.SGD):
    """SGD that clips each variable's gradient to the norm clip_norm: Keras' `clipnorm`, but faster."""

    def __init__(self, learning_rate=0.01, clip_norm=1.0, **options):
        super().__init__(learning_rate, **options)
        self.clip_norm = clip_norm

    def get_config(self):
        return super().get_config() | {"clip_norm": self.clip_norm}

    def update_step(self, gradient, variable, learning_rate):
        # XLA reduces a large tensor on one core. Partial norms use all cores, and a step is a sixth faster.
        n_rows = math.gcd(gradient.shape.num_elements(), 16)
        partial_norms = tf.norm(tf.reshape(gradient, (n_rows, -1)), axis=0)
        scale = self.clip_norm / tf.maximum(tf.norm(partial_norms), self.clip_norm)
        super().update_step(gradient * scale, variable, learning_rate)


# --- Other models: each overrides only what it changes ------------------------------------------------


@keras.saving.register_keras_serializable("vae")
class Convolutional(VAE):
    """The lecture's model with two convolutions in the encoder and two transposed ones in the decoder.

    Next to z, encoder and decoder each have a dense hidden layer, too: encoder_3 and decoder_1. Without
    these, SGD reached an ELBO of only -151.9 in 17 epochs.
    """

    def encoder_layers(self):
        side = math.isqrt(self.n_pixels)
        return [
            keras.layers.Reshape((side, side, 1)),
            strided_layer(keras.layers.Conv2D, 16, "encoder_1"),
            strided_layer(keras.layers.Conv2D, 32, "encoder_2"),
            keras.layers.Flatten(),
            hidden_layer(self.n_hidden, "tanh", name="encoder_3"),
        ]

    def decoder_layers(self):
        side = math.ceil(math.isqrt(self.n_pixels) / 4)  # doubled by each transposed convolution
        return [
            self.first_decoder_layer(self.n_hidden, "tanh"),
            hidden_layer(side * side * 32, "elu", name="decoder_2"),
            keras.layers.Reshape((side, side, 32)),
            strided_layer(keras.layers.Conv2DTranspose, 16, "decoder_3"),
            # Few channels, because the output layer is dense: each pixel of each channel costs 784 weights.
            strided_layer(keras.layers.Conv2DTranspose, 2, "decoder_4"),
            keras.layers.Flatten(),
        ]


def strided_layer(layer_class, n_channels, name):
    """Returns a 4 x 4 convolution that halves the side of its images or, if transposed, doubles it."""
    return layer_class(
        n_channels, 4, strides=2, padding="same", activation="elu", kernel_initializer="he_normal", name=name
    )


@keras.saving.register_keras_serializable("vae")
class IWAE(VAE):
    """Importance-weighted autoencoder: Burda, Grosse and Salakhutdinov, arXiv:1509.00519.

    Trains with L_k = E[log 1/k sum_i w_i], w_i = p(x|z_i) p(z_i) / q(z_i|x), k = n_samples (equation 8): a
    tighter bound than the ELBO, which is L_1. Differentiating it weights the samples as in equation 13.
    """

    def __init__(self, *arguments, n_samples=5, **options):
        self.n_samples = n_samples
        super().__init__(*arguments, **options)

    def get_config(self):
        return super().get_config() | {"n_samples": self.n_samples}

    def training_loss(self, batch, *, seed, keep_prob, kl_weight):
        """Returns -L_k and its two terms: see `importance_weighted_loss`."""
        terms = self.importance_terms(batch, self.n_samples, seed=seed, keep_prob=keep_prob)
        return importance_weighted_loss(*terms, kl_weight)


def importance_weighted_loss(log_px_given_z, log_ratio, kl_weight):
    """Returns -L_k, with log [p(z) / q(z|x)] multiplied by kl_weight, and two terms to log: (batch,) each.

    The two terms add up to the unweighted -L_k. The first is the reconstruction error, averaged over the
    samples with their normalized weights. log_px_given_z, log_ratio: what `VAE.importance_terms` returns.
    """
    n_samples = log_px_given_z.shape[0]
    log_weights = log_px_given_z + kl_weight * log_ratio
    loss = math.log(n_samples) - tf.reduce_logsumexp(log_weights, axis=0)
    reconstruction = -tf.reduce_sum(tf.nn.softmax(log_weights, axis=0) * log_px_given_z, axis=0)
    bound = tf.reduce_logsumexp(log_px_given_z + log_ratio, axis=0) - math.log(n_samples)
    return loss, reconstruction, -bound - reconstruction


class GaussianPixels(Likelihood):
    """p(x|z) = N(x; sigmoid(logits), std^2 I) with a trained std: a density, so its log may be positive."""

    def __init__(self):
        super().__init__()
        initial = keras.initializers.Constant(math.log(255 * 0.2 - 1))  # std 0.2
        self.raw_std = self.add_weight((), initial, name="raw_std")  # any real number

    @property
    def log_std(self):
        """Above log(1/255): a smaller std would claim more precision than grey levels have."""
        return tf.nn.softplus(self.raw_std) - math.log(255)

    def log_prob(self, x, logits):
        return log_normal(x, tf.sigmoid(logits), 2 * self.log_std)

    def log_prob_table(self, x, logits):
        mean = tf.sigmoid(logits)
        squares = tf.reduce_sum(x**2, axis=-1, keepdims=True) + tf.reduce_sum(mean**2, axis=-1)
        squares -= 2 * tf.matmul(x, mean, transpose_b=True)
        log_normalizer = x.shape[-1] * (0.5 * math.log(2 * math.pi) + self.log_std)
        return -0.5 * squares * tf.exp(-2 * self.log_std) - log_normalizer

    def mean(self, logits):
        return tf.sigmoid(logits)

    def initial_output_bias(self, mean_image):
        return Bernoulli().initial_output_bias(mean_image)  # for the same sigmoid


@keras.saving.register_keras_serializable("vae")
class LeastSquares(VAE):
    """Least squares: Ramachandra, arXiv:1707.03134 (only the abstract was available to us).

    Interpreted here as Gaussian pixels in place of Bernoulli ones, with the KL divergence as the
    regularization. The reconstruction error is sum (x - mean)^2 / (2 std^2) + n_pixels/2 log(2 pi std^2),
    with mean = sigmoid(logits). Because std is trained, no weight has to be chosen, as in the sigma-VAE
    (Rybkin et al. 2021).
    """

    def make_likelihood(self):
        return GaussianPixels()


@keras.saving.register_keras_serializable("vae")
class StickBreaking(VAE):
    """Stick-breaking prior: Nalisnick and Smyth, arXiv:1605.06197, with a Gaussian in place of their q.

    The decoder sees sticks pi_k = v_k prod_{j<k} (1 - v_j), v_k ~ Beta(1, CONCENTRATION). With z_k ~ N(0, 1),
    v_k = 1 - (1 - Phi(z_k))^(1 / CONCENTRATION) has exactly this distribution. The map is monotone, so the KL
    divergence of the z is that of the v, and only the decoder's input changes. q(v|x) is then much like their
    "Gauss-logit" posterior, with Phi in place of the logistic function.
    """

    CONCENTRATION = 5.0
    decoder_bias_scale = 0.0  # sticks are small: biases would dominate them

    def make_prior(self):
        return StandardNormal()  # which the map to sticks turns into the paper's prior

    def sticks(self, z):
        """Returns the sticks, (..., dim_z + 1), for z: (..., dim_z). They sum to 1; the last is the rest."""
        z = tf.clip_by_value(z, -8.0, 8.0)  # from 13 on, log(1 - Phi(z)) has no finite gradient in float32
        log_left = tf.math.log(0.5 * tf.math.erfc(z / math.sqrt(2))) / self.CONCENTRATION  # log(1 - v)
        before = tf.exp(tf.cumsum(log_left, axis=-1, exclusive=True))
        last = tf.exp(tf.reduce_sum(log_left, axis=-1, keepdims=True))
        return tf.concat([before * -tf.math.expm1(log_left), last], axis=-1)

    def decoder(self, z, labels=None, *, keep_prob=None, seed=None):
        return super().decoder(self.sticks(as_float32(z)), labels, keep_prob=keep_prob, seed=seed)


class LadderSample(NamedTuple):
    """Samples of both layers of a ladder, (n, batch, ...), and the (mean, log_var) of their Gaussians."""

    z_1: tf.Tensor
    q_1: tuple  # q(z_1|z_2, x)
    p_1: tuple  # p(z_1|z_2)
    z_2: tf.Tensor
    q_2: tuple  # q(z_2|x)


@keras.saving.register_keras_serializable("vae")
class Ladder(VAE):
    """Ladder VAE with two layers of latent variables: Sønderby et al., arXiv:1602.02282.

    p(z_2) = N(0, I), p(z_1|z_2) is a Gaussian parameterized by a network, and p(x|z_1) the decoder.
    q(z_1|z_2, x) is the product of p(z_1|z_2) and the encoder's Gaussian: precisions add (equations 17 and
    18). encode, decode and sample refer to z_2, of dim_z numbers; the decoder takes z_1, of dim_z_lower
    numbers. The paper has up to five layers and batch normalization. The layers bottom_up_* and top_down_*
    have no dropout. With n_samples above 1, it is trained with IWAE's bound, through both layers.
    """

    has_log_joint = False  # p(x|z_2) would be an integral over z_1

    def __init__(self, *arguments, dim_z_lower=64, n_samples=1, **options):
        self.dim_z_lower = dim_z_lower
        self.n_samples = n_samples
        super().__init__(*arguments, **options)

    def get_config(self):
        return super().get_config() | {"dim_z_lower": self.dim_z_lower, "n_samples": self.n_samples}

    @property
    def dim_z_bottom(self):
        return self.dim_z_lower

    def make_posterior(self):
        return GaussianPosterior()  # the precision-weighted product needs it

    def make_layers(self, mean_image):
        super().make_layers(mean_image)
        n = self.n_hidden
        self.bottom_up_layers = [
            hidden_layer(n, "elu", name="bottom_up_1"),
            hidden_layer(n, "tanh", name="bottom_up_2"),
        ]
        self.z_2_output = output_layer(2 * self.dim_z, name="z_2_output")
        self.top_down_layers = [
            hidden_layer(n, "tanh", name="top_down_1"),
            hidden_layer(n, "elu", name="top_down_2"),
        ]
        self.z_1_prior_output = output_layer(2 * self.dim_z_lower, name="z_1_prior_output")

    def encoder(self, x, labels=None, *, keep_prob=None, seed=None):
        """q(z_2|x): returns mean and log_var, (batch, dim_z) each."""
        _, q_2 = self.bottom_up(x, keep_prob, seed)
        return q_2

    def bottom_up(self, x, keep_prob=None, seed=None):
        """Returns the encoder's Gaussian of z_1, which is not yet q(z_1|z_2, x), and q(z_2|x)."""
        h = self.encoder_features(x, keep_prob, seed)
        bottom_up_1 = self.posterior.parameters(self.encoder_output(h))
        for layer in self.bottom_up_layers:
            h = layer(h)
        return bottom_up_1, self.posterior.parameters(self.z_2_output(h))

    def top_down(self, z_2):
        """p(z_1|z_2): returns mean and log_var, (..., dim_z_lower) each, for z_2: (..., dim_z)."""
        h = z_2
        for layer in self.top_down_layers:
            h = layer(h)
        return self.posterior.parameters(self.z_1_prior_output(h))

    def precision_weighted_product(self, one, other):
        """Returns (mean, log_var) of the product of two Gaussians (mean, log_var), weighted by precision."""
        mean, log_var = one
        other_mean, other_log_var = other
        log_precision = tf.nn.softplus(log_var - other_log_var) - log_var  # log(1 / var + 1 / other_var)
        weight = tf.exp(-log_var - log_precision)
        return weight * mean + (1 - weight) * other_mean, -log_precision

    def sample_latents(self, x, n, keep_prob, seed):
        """Returns a LadderSample of n samples per image: z_2 ~ q(z_2|x), then z_1 ~ q(z_1|z_2, x)."""
        bottom_up_1, q_2 = self.bottom_up(x, keep_prob, seed)
        q_2 = tile_samples(q_2, n)
        z_2 = reparameterize(*q_2, seed, Stream.UPPER_LATENT)
        p_1 = self.top_down(z_2)
        q_1 = self.precision_weighted_product(bottom_up_1, p_1)
        return LadderSample(reparameterize(*q_1, seed), q_1, p_1, z_2, q_2)

    def negative_elbo(self, batch, *, seed, keep_prob=None, kl_weight=1.0):
        """-ELBO with the KL divergences of both layers; arguments and results as for VAE."""
        batch = as_batch(batch)
        sample = self.sample_latents(batch.inputs, 1, keep_prob, seed)
        logits = self.decode_samples(sample.z_1, batch.labels, keep_prob=keep_prob, seed=seed)
        kl_1 = tf.reduce_sum(self.kl_z_1_per_unit(sample.q_1, sample.p_1), axis=-1)
        kl = kl_1 + self.prior.kl_divergence(self.posterior, sample.q_2, sample.z_2)
        reconstruction = -self.likelihood.log_prob(batch.targets, logits)
        return (reconstruction + kl_weight * kl)[0], reconstruction[0], kl[0]

    def training_loss(self, batch, *, seed, keep_prob, kl_weight):
        """Returns -ELBO or, with several samples, IWAE's bound, and the two terms to log."""
        if self.n_samples == 1:
            return self.negative_elbo(batch, seed=seed, keep_prob=keep_prob, kl_weight=kl_weight)
        terms = self.importance_terms(batch, self.n_samples, seed=seed, keep_prob=keep_prob)
        return importance_weighted_loss(*terms, kl_weight)

    def kl_z_1_per_unit(self, q_1, p_1):
        """KL[q(z_1|z_2, x) || p(z_1|z_2)] of each unit, (..., dim_z_lower), from their means and log_vars."""
        mean, log_var = q_1
        prior_mean, prior_log_var = p_1
        distance = (tf.exp(log_var) + (mean - prior_mean) ** 2) * tf.exp(-prior_log_var)
        return 0.5 * (prior_log_var - log_var + distance - 1)

    def importance_terms(self, batch, n, *, seed, keep_prob=None):
        batch = as_batch(batch)
        sample = self.sample_latents(batch.inputs, n, keep_prob, seed)
        logits = self.decode_samples(sample.z_1, batch.labels, keep_prob=keep_prob, seed=seed)
        log_ratio_1 = log_normal(sample.z_1, *sample.p_1) - log_normal(sample.z_1, *sample.q_1)
        log_ratio_2 = self.prior.log_prob(sample.z_2) - log_normal(sample.z_2, *sample.q_2)
        return self.likelihood.log_prob(batch.targets, logits), log_ratio_1 + log_ratio_2

    def log_joint(self, x, z):
        raise NotImplementedError("p(x|z_2) is an integral over z_1")

    def decode(self, z, labels=None):
        """Returns the images for z_2: (n, dim_z), with z_1 at its mean given z_2."""
        mean_1, _ = self.top_down(as_float32(z))
        return super().decode(mean_1, labels)

    def reconstruct(self, x, labels=None):
        """Returns images x: (n, n_pixels), encoded and decoded through both layers."""
        return super().decode(self.encode_lower(x), labels)

    def encode_lower(self, x):
        """Returns the means of z_1, (n, dim_z_lower), of images x: (n, n_pixels), with z_2 at its mean."""
        bottom_up_1, (mean_2, _) = self.bottom_up(x)
        mean_1, _ = self.precision_weighted_product(bottom_up_1, self.top_down(mean_2))
        return mean_1

    def sample_with_latents(self, n, seed, labels=None):
        z_2 = self.prior.sample(n, self.dim_z, seed)
        return z_2, self.decoder(reparameterize(*self.top_down(z_2), seed))

    def test_metrics(self, batch):
        """Returns the KL divergence of z_2, and how many units of z_1 are active."""
        sample = self.sample_latents(batch.inputs, 1, None, (0, 0))
        kl_2 = tf.reduce_mean(self.prior.kl_divergence(self.posterior, sample.q_2, sample.z_2))
        n_active = active_units(self.encode_lower(batch.inputs))
        return {"test_kl_upper": float(kl_2), "active_units_lower": int(n_active)}


@keras.saving.register_keras_serializable("vae")
class Stein(VAE):
    """Stein VAE: Pu et al., arXiv:1704.05155, with one decoder where the paper has samples of its weights.

    The encoder has no density: it draws particles z_j = f(x, xi_j), xi_j ~ N(0, I), here mean + std * xi_j
    plus the output of a small network of x and xi_j. They follow Stein variational gradient descent:
    phi(z_j) = 1/M sum_i [k(z_i, z_j) grad log p(x, z_i) + grad_{z_i} k(z_i, z_j)], M = n_samples. In
    evaluation, q is the Gaussian fitted to FITTED particles, so that the ELBO is a bound.
    """

    FITTED = 64
    FITTED_SEED = (-1, -1)  # training uses other seeds, so it never draws these particles

    def __init__(self, *arguments, n_samples=20, **options):
        self.n_samples = n_samples
        super().__init__(*arguments, **options)

    def get_config(self):
        return super().get_config() | {"n_samples": self.n_samples}

    def make_posterior(self):
        return GaussianPosterior()  # fitted to particles

    def make_layers(self, mean_image):
        super().make_layers(mean_image)
        self.noise_mlp_x = hidden_layer(self.n_hidden, None, name="noise_mlp_x")
        self.noise_mlp_xi = hidden_layer(self.n_hidden, None, name="noise_mlp_xi")
        self.noise_mlp_output = output_layer(self.dim_z, name="noise_mlp_output")

    def particles(self, x, n, *, seed, keep_prob=None):
        """Returns n draws of z for each image: (n, batch, dim_z)."""
        h = self.encoder_features(x, keep_prob, seed)
        mean, log_var = self.posterior.parameters(self.encoder_output(h))
        xi = normal((n, 1, self.dim_z), seed, Stream.LATENT)  # shared by all images, as in the paper
        nonlinear_term = self.noise_mlp_output(tf.tanh(self.noise_mlp_x(h) + self.noise_mlp_xi(xi)))
        return mean + tf.exp(log_var / 2) * xi + nonlinear_term

    def encoder(self, x, labels=None, *, keep_prob=None, seed=None):
        """Returns the Gaussian fitted to FITTED particles: no dropout, and the same xi at each call."""
        return self.fit_gaussian(self.particles(x, self.FITTED, seed=self.FITTED_SEED))

    def fit_gaussian(self, z):
        """Returns mean and log_var, (batch, dim_z) each, of the Gaussian fitted to z: (n, batch, dim_z)."""
        return tf.reduce_mean(z, axis=0), tf.math.log(tf.math.reduce_variance(z, axis=0) + 1e-6)

    def training_loss(self, batch, *, seed, keep_prob, kl_weight):
        """Returns a loss whose gradient moves the particles along phi, and trains the decoder on them.

        The terms to log are the particles' mean reconstruction error and the KL divergence of their Gaussian.
        """
        z = self.particles(batch.inputs, self.n_samples, seed=seed, keep_prob=keep_prob)
        fixed = tf.stop_gradient(z)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(fixed)
            logits = self.decode_samples(fixed, batch.labels, keep_prob=keep_prob, seed=seed)
            log_px_given_z = self.likelihood.log_prob(batch.targets, logits)
            log_joint = log_px_given_z + kl_weight * self.prior.log_prob(fixed)
        direction = svgd_direction(fixed, tape.gradient(log_joint, fixed), kl_weight)
        # Its gradient with respect to z is minus the direction, divided by n_samples.
        svgd_surrogate = -tf.reduce_mean(tf.reduce_sum(tf.stop_gradient(direction) * z, axis=-1), axis=0)
        reconstruction = -tf.reduce_mean(log_px_given_z, axis=0)
        kl = self.prior.kl_divergence(self.posterior, self.fit_gaussian(fixed), fixed[0])
        return svgd_surrogate + reconstruction, reconstruction, kl


def svgd_direction(z, score, repulsion=1.0):
    """Returns the update direction of Stein variational gradient descent; all arrays are (n, batch, dim_z).

    z: particles. score: the gradient of log p(x, z). repulsion: weight of the repulsive term. Liu and Wang,
    arXiv:1608.04471, with the kernel exp(-r^2 / h). Here h is the mean of r^2 over all pairs; theirs is
    median(r)^2 / log n, and Pu et al. take the median of the distances.
    """
    n = z.shape[0]
    difference = z[:, None] - z[None]  # (i, j, batch, dim_z)
    squared_distance = tf.reduce_sum(difference**2, axis=-1)
    h = tf.reduce_sum(squared_distance, axis=(0, 1)) / max(1, n * (n - 1)) + 1e-6
    kernel = tf.exp(-squared_distance / h)
    attraction = tf.einsum("ijb,ibd->jbd", kernel, score)
    kernel_gradient = -2 * tf.einsum("ijb,ijbd->jbd", kernel / h, difference)
    return (attraction + repulsion * kernel_gradient) / n


@keras.saving.register_keras_serializable("vae")
class Labels(VAE):
    """Images and labels: Pu et al., arXiv:1609.08976, without their convolutions and captions.

    A linear one-versus-rest support vector machine predicts the label from z. On labelled digits, its hinge
    loss also trains the encoder: the objective is ELBO - HINGE_WEIGHT E_q[hinge(y, z)]. The paper has
    xi E_q[log p(y|z)] with the p of a Bayesian support vector machine.
    """

    # xi, in the paper 784 pixels / (10 classes * share of labelled images): mean_over_labelled divides by the
    # share, and the rest is rounded.
    HINGE_WEIGHT = 80.0

    def make_layers(self, mean_image):
        super().make_layers(mean_image)
        self.classifier = hidden_layer(N_CLASSES, None, name="classifier")

    def training_loss(self, batch, *, seed, keep_prob, kl_weight):
        """Returns -ELBO plus the weighted hinge loss, and the two terms of -ELBO."""
        q = self.encoder(batch.inputs, batch.labels, keep_prob=keep_prob, seed=seed)
        z = self.posterior.sample(q, seed)
        reconstruction, kl = self.elbo_terms(batch, q, z, keep_prob=keep_prob, seed=seed)
        hinge = self.hinge_loss(self.classifier(z), labels_of(batch))
        return reconstruction + kl_weight * kl + self.HINGE_WEIGHT * hinge, reconstruction, kl

    def hinge_loss(self, scores, labels):
        """Returns the hinge loss, summed over the classes and scaled by `mean_over_labelled`: (batch,).

        scores: (batch, 10).
        """
        signs = 2 * tf.one_hot(labels, N_CLASSES) - 1
        hinge = tf.reduce_sum(tf.nn.relu(1 - signs * scores), axis=-1)
        return mean_over_labelled(hinge, labels)

    def classify(self, x, n=50, seed=(0, 0)):
        """Returns predicted labels, (batch,), from scores averaged over n samples of z per image."""
        z = self.posterior.sample(tile_samples(self.encoder(x), n), seed)
        return tf.argmax(tf.reduce_mean(self.classifier(z), axis=0), axis=-1, output_type=tf.int32)


def mean_over_labelled(loss, labels):
    """Returns the loss, (batch,), with 0 for images without a label and the others scaled.

    Its mean over the mini-batch is that of the labelled images. labels: (batch,), -1 for an unknown one.
    """
    is_labelled = tf.cast(labels >= 0, tf.float32)
    return loss * is_labelled / tf.maximum(1e-6, tf.reduce_mean(is_labelled))


@keras.saving.register_keras_serializable("vae")
class Conditional(VAE):
    """A class y and a latent z, which holds the style: model M2 of Kingma et al. 2014, arXiv:1406.5298.

    p(y) = 1/10; the decoder p(x|y, z) gets y beside z, the encoder q(z|x, y) gets it beside x, and q(y|x) is
    a classifier. With all labels, this is the conditional VAE:
    ELBO(x, y) = E_q[log p(x|y, z)] - KL[q(z|x, y) || p(z)] - log 10 bounds log p(x, y) (equation 6). If a
    label is unknown, sum_y q(y|x) ELBO(x, y) + H[q(y|x)] bounds log p(x) (equation 7). Labelled images also
    train the classifier (equation 9).

    n_labels: how many images of each class are labelled. None: all. Then no label may be -1, and training is
    ten times as fast.
    """

    has_log_joint = False  # p(x|z) would be a sum over the classes
    has_classes = True
    decoder_bias_scale = 0.0  # the weights of the classes act as random biases
    # alpha, which has the value of Labels.HINGE_WEIGHT. The paper's, 0.1 N for a sum over N images, would be
    # 0.1 here.
    CLASSIFIER_WEIGHT = 80.0

    def __init__(self, *arguments, n_labels=None, **options):
        self.n_labels = n_labels
        super().__init__(*arguments, **options)

    def get_config(self):
        return super().get_config() | {"n_labels": self.n_labels}

    def make_layers(self, mean_image):
        super().make_layers(mean_image)
        self.classifier_hidden = [
            hidden_layer(self.n_hidden, "elu", name="classifier_1"),
            hidden_layer(self.n_hidden, "tanh", name="classifier_2"),
        ]
        self.classifier_output = output_layer(N_CLASSES, name="classifier_output")

    def classifier(self, x, keep_prob=None, seed=None):
        """q(y|x): returns the logits, (batch, 10), for images x: (batch, n_pixels)."""
        first_layer = len(self.encoder_hidden) + len(self.decoder_hidden)
        centred = as_float32(x) - self.mean_image
        h = self.hidden(self.classifier_hidden, centred, keep_prob, seed, first_layer)
        return self.classifier_output(h)

    def encoder(self, x, labels=None, *, keep_prob=None, seed=None):
        """q(z|x, y): returns mean and log_var, (batch, dim_z) each. Without labels, `classify` finds y.

        No label may be -1 here; `encode` and `reconstruct` allow that.
        """
        labels = self.classify(x) if labels is None else labels
        x_and_y = append_class(as_float32(x) - self.mean_image, labels)
        h = self.hidden(self.encoder_hidden, x_and_y, keep_prob, seed, 0)
        return self.posterior.parameters(self.encoder_output(h))

    def decoder(self, z, labels=None, *, keep_prob=None, seed=None):
        """p(x|y, z): returns the logits, (batch, n_pixels). ValueError without labels."""
        if labels is None:
            raise ValueError("this model decodes z together with a class: pass labels")
        z_and_y = append_class(as_float32(z), labels)
        return super().decoder(z_and_y, keep_prob=keep_prob, seed=seed)

    def negative_elbo(self, batch, *, seed, keep_prob=None, kl_weight=1.0):
        """-ELBO of the image alone, whatever its label; arguments and results as for VAE.

        The KL divergence is that of q(y, z|x) from p(y) p(z).
        """
        batch = as_batch(batch)
        q_y = tf.nn.softmax(self.classifier(batch.inputs, keep_prob, seed))
        reconstruction, kl = self.sum_over_classes(batch, q_y, keep_prob=keep_prob, seed=seed)
        return reconstruction + kl_weight * kl, reconstruction, kl

    def sum_over_classes(self, batch, q_y, *, keep_prob, seed):
        """The two terms of -ELBO, (batch,) each, in expectation over the class; q_y: (batch, 10)."""
        _, reconstruction, kl = super().negative_elbo(with_every_class(batch), seed=seed, keep_prob=keep_prob)
        kl_y = tf.reduce_sum(tf.math.xlogy(q_y, q_y), axis=-1) + math.log(N_CLASSES)
        q_y = tf.transpose(q_y)
        kl_z = tf.reduce_sum(q_y * tf.reshape(kl, tf.shape(q_y)), axis=0)
        return tf.reduce_sum(q_y * tf.reshape(reconstruction, tf.shape(q_y)), axis=0), kl_y + kl_z

    def training_loss(self, batch, *, seed, keep_prob, kl_weight):
        """Returns -ELBO plus the weighted cross-entropy of the labels, and the two terms of -ELBO.

        The class of a labelled image is known: the other nine have probability 0. If n_labels is None, raises
        ValueError without labels.
        """
        if self.n_labels is None and batch.labels is None:
            raise ValueError("pass the labels of all images, or make the network with n_labels")
        labels = labels_of(batch)
        logits = self.classifier(batch.inputs, keep_prob, seed)
        y = tf.one_hot(labels, N_CLASSES)
        if self.n_labels is None:
            _, reconstruction, kl = super().negative_elbo(batch, seed=seed, keep_prob=keep_prob)
            kl += math.log(N_CLASSES)
        else:
            q_y = tf.where(labels[:, tf.newaxis] >= 0, y, tf.nn.softmax(logits))
            reconstruction, kl = self.sum_over_classes(batch, q_y, keep_prob=keep_prob, seed=seed)
        cross_entropy = mean_over_labelled(tf.nn.softmax_cross_entropy_with_logits(y, logits), labels)
        return reconstruction + kl_weight * kl + self.CLASSIFIER_WEIGHT * cross_entropy, reconstruction, kl

    def log_importance_weights(self, batch, n, *, seed):
        """log sum_y p(y) p(x|y, z_y) p(z_y) / q(z_y|x, y) for n samples of each z_y: (n, batch), in nats."""
        every_class = with_every_class(as_batch(batch))
        log_weights = super().log_importance_weights(every_class, n, seed=seed)
        log_weights = tf.reshape(log_weights, (n, N_CLASSES, -1))
        return tf.reduce_logsumexp(log_weights, axis=1) - math.log(N_CLASSES)

    def encode(self, x, labels=None):
        """Returns the latent means, (n, dim_z), of images x: (n, n_pixels); labels as for `known_labels`."""
        return super().encode(x, self.known_labels(x, labels))

    def reconstruct(self, x, labels=None):
        """Returns images x: (n, n_pixels), encoded and decoded; labels as for `known_labels`."""
        labels = self.known_labels(x, labels)
        return self.decode(super().encode(x, labels), labels)

    def known_labels(self, x, labels):
        """Returns labels, (n,), in which the class found in x replaces -1; without labels, all are found."""
        found = self.classify(x)
        if labels is None:
            return found
        labels = tf.cast(labels, tf.int32)
        return tf.where(labels >= 0, labels, found)

    def classify(self, x):
        """Returns the most probable class, (n,), of images x: (n, n_pixels)."""
        return tf.argmax(self.classifier(x), axis=-1, output_type=tf.int32)


def append_class(h, labels):
    """Returns h, (batch, n), with ten more columns: the one-hot code of the labels, (batch,)."""
    return tf.concat([h, tf.one_hot(labels, N_CLASSES)], axis=-1)


def with_every_class(batch):
    """Returns a batch of all its images with label 0, then all of them with label 1, and so on."""
    labels = tf.repeat(tf.range(N_CLASSES), tf.shape(batch.targets)[0])
    return Batch(tf.tile(batch.targets, (N_CLASSES, 1)), tf.tile(batch.inputs, (N_CLASSES, 1)), labels)
