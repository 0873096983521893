"""The variational autoencoder: encoder, decoder, the overall network and its loss.

After Kingma and Welling, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), with two hidden layers
where the networks of their appendix C have one:

    encoder   q(z|x) = N(z; mean(x), diag exp(log_var(x)))
    decoder   p(x|z) = Bernoulli(x; sigmoid(logits(z)))
    prior     p(z)   = N(0, I)
    loss      -ELBO  = -E_q[log p(x|z)] + KL[q(z|x) || p(z)]

An image x is a row of 784 pixels in [0, 1], a latent vector z a row of dim_z numbers. Losses are in
nats per image: sums over pixels or latent dimensions, never means over them.

Each density is written once, and all else uses it. All random functions but the initialization are
stateless: the same `seed`, two int32 numbers, gives the same draw (normal ones differ with and without XLA).
"""

import enum
import math

import keras
import numpy as np
import tensorflow as tf

N_PIXELS = 28 * 28
IMPORTANCE_CHUNK = 50  # importance samples per image processed at once; bounds the memory they take


class Stream(enum.IntEnum):
    """What is folded into a seed, so that its draws for different purposes are independent.

    The hidden layers' dropout has DROPOUT, DROPOUT + 1, ...; reparameterize uses the seed as it is.
    """

    IMPORTANCE, BINARIZATION, NOISE, DROPOUT = -2, -1, 0, 1


def reparameterize(mean, log_var, seed):
    """Draws z ~ N(mean, exp(log_var)) as a differentiable function of both: z = mean + std * epsilon.

    The reparameterization trick, section 2.4 of the paper. mean, log_var and z: (..., dim_z).
    """
    return mean + tf.exp(log_var / 2) * tf.random.stateless_normal(mean.shape, seed)


def log_normal(z, mean, log_var):
    """log N(z; mean, diag exp(log_var)) in nats, summed over the last axis; all three are (..., dim_z)."""
    return -0.5 * tf.reduce_sum(math.log(2 * math.pi) + log_var + (z - mean) ** 2 / tf.exp(log_var), axis=-1)


class Prior:
    """p(z). A subclass needs log_prob and sample, as StandardNormal has them; all else follows."""

    def kl_divergence(self, mean, log_var, z):
        """KL[q(z|x) || p(z)] in nats, (batch,), estimated as log q(z|x) - log p(z) at a draw z ~ q(z|x).

        mean, log_var and z: (batch, dim_z).
        """
        return log_normal(z, mean, log_var) - self.log_prob(z)


class StandardNormal(Prior):
    """p(z) = N(0, I)."""

    def log_prob(self, z):
        """log p(z) in nats, (...,), of latent vectors z: (..., dim_z)."""
        return log_normal(z, tf.zeros_like(z), tf.zeros_like(z))

    def sample(self, n, dim_z, seed):
        """Returns n draws from p(z): (n, dim_z)."""
        return tf.random.stateless_normal((n, dim_z), seed)

    def kl_divergence(self, mean, log_var, z):
        """In closed form, so that it does not depend on the draw: appendix B of the paper."""
        return -0.5 * tf.reduce_sum(1 + log_var - mean**2 - tf.exp(log_var), axis=-1)


class Bernoulli:
    """p(x|z) = Bernoulli(x; sigmoid(logits)), with the logits (..., 784) that the decoder returns for z."""

    def log_prob(self, x, logits):
        """log p(x|z) in nats, (...,): minus the binary cross-entropy, summed over the pixels.

        Equation 11 of the paper, from logits, so that no probability needs clipping.
        """
        x = tf.broadcast_to(x, tf.shape(logits))
        return -tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels=x, logits=logits), axis=-1)

    def log_prob_table(self, x, logits):
        """log p(x|z) in nats, (n, m), of each of x: (n, 784) with each of logits: (m, 784), as a product."""
        return tf.matmul(x, logits, transpose_b=True) - tf.reduce_sum(tf.nn.softplus(logits), axis=-1)

    def mean(self, logits):
        """E[x|z]: the pixels' probabilities, which pictures show as grey levels."""
        return tf.sigmoid(logits)

    def sample(self, logits, seed):
        """Returns a draw from p(x|z): black and white pixels."""
        return binarize(tf.sigmoid(logits), seed)

    def output_bias(self, mean_image):
        """The logits, (784,), whose mean is mean_image; finite where a pixel is always black."""
        pixels = np.clip(mean_image, 0.001, 0.999)
        return np.log(pixels / (1 - pixels))


@keras.saving.register_keras_serializable("vae")
class VAE(keras.Model):
    """The overall network: the layers of encoder and decoder, and the quantities computed with them.

    dim_z: length of a latent vector. n_hidden: units per hidden layer.
    mean_image: mean of the training images, (784,) in [0, 1] or one number; stored as a non-trainable weight.
    seed: integer that determines the initial weights.
    """

    prior, likelihood = StandardNormal(), Bernoulli()

    def __init__(self, dim_z=2, n_hidden=500, mean_image=0.5, seed=0):
        super().__init__(name="vae", dtype="float32")
        self.dim_z, self.n_hidden = dim_z, n_hidden
        mean_image = np.broadcast_to(mean_image, N_PIXELS)
        draws = keras.random.SeedGenerator(seed)
        he = keras.initializers.HeNormal(draws)
        # A tenth of He: the loss sums 784 pixels, so full-size outputs make the first gradients huge. Clipped
        # SGD tolerates them, but ends 1.0 nats worse (dim_z 2, 20 epochs).
        tenth_of_he = keras.initializers.VarianceScaling(2 * 0.1**2, "fan_in", "truncated_normal", draws)
        constant = keras.initializers.Constant

        def dense(name, n_in, n_out, activation=None, kernel=he, bias="zeros"):
            options = {"kernel_initializer": kernel, "bias_initializer": bias, "dtype": "float32"}
            layer = keras.layers.Dense(n_out, activation, name=name, **options)
            layer.build((None, n_in))
            return layer

        self.encoder_hidden = [
            dense("encoder_1", N_PIXELS, n_hidden, "elu"),
            dense("encoder_2", n_hidden, n_hidden, "tanh"),
        ]
        self.encoder_output = dense("z_mean_and_log_var", n_hidden, 2 * dim_z, kernel=tenth_of_he)
        self.decoder_hidden = [
            dense("decoder_1", dim_z, n_hidden, "tanh"),
            dense("decoder_2", n_hidden, n_hidden, "elu"),
        ]
        # Before training, the decoder answers with the mean image.
        bias = constant(self.likelihood.output_bias(mean_image))
        self.decoder_output = dense("decoder_output", n_hidden, N_PIXELS, kernel=tenth_of_he, bias=bias)
        self.mean_image = self.add_weight(
            (N_PIXELS,), constant(mean_image), trainable=False, name="mean_image"
        )
        self.built = True  # dense() has built all layers

    def get_config(self):
        """What keras.models.load_model makes the network from; all else is in its weights."""
        return {"dim_z": self.dim_z, "n_hidden": self.n_hidden}

    def encoder(self, x, *, keep_prob=1.0, seed=None):
        """The Gaussian encoder q(z|x): returns mean and log_var, (batch, dim_z) each, of x: (batch, 784)."""
        h = x - self.mean_image  # centred
        for stream, layer in enumerate(self.encoder_hidden, Stream.DROPOUT):
            h = dropout(layer(h), keep_prob, seed, stream)
        mean_and_log_var = self.encoder_output(h)
        return mean_and_log_var[:, : self.dim_z], mean_and_log_var[:, self.dim_z :]

    def decoder(self, z, *, keep_prob=1.0, seed=None):
        """The Bernoulli decoder p(x|z): returns the pixels' logits, (batch, 784), for z: (batch, dim_z)."""
        h = z
        for stream, layer in enumerate(self.decoder_hidden, Stream.DROPOUT + len(self.encoder_hidden)):
            h = dropout(layer(h), keep_prob, seed, stream)
        return self.decoder_output(h)

    def elbo_terms(self, x, x_corrupted, *, seed, keep_prob=1.0):
        """The two terms of -ELBO, an unbiased estimate with one sample of z (equation 10 of the paper).

        x: (batch, 784) the targets; x_corrupted: (batch, 784) the encoder's inputs, x itself or x with noise.
        Returns the reconstruction error -log p(x|z) and the KL divergence, (batch,) each, in nats.
        """
        mean, log_var = self.encoder(x_corrupted, keep_prob=keep_prob, seed=seed)
        z = reparameterize(mean, log_var, seed)
        logits = self.decoder(z, keep_prob=keep_prob, seed=seed)
        return -self.likelihood.log_prob(x, logits), self.prior.kl_divergence(mean, log_var, z)

    def log_weights(self, x, x_corrupted, n, *, seed):
        """log [p(x|z) p(z) / q(z|x)] for n importance samples z ~ q(z|x) per image: (n, batch), in nats."""
        mean, log_var = (tf.broadcast_to(array, (n, *array.shape)) for array in self.encoder(x_corrupted))
        z = reparameterize(mean, log_var, seed)
        logits = tf.reshape(self.decoder(tf.reshape(z, (-1, self.dim_z))), (n, *x.shape))
        return self.likelihood.log_prob(x, logits) + self.prior.log_prob(z) - log_normal(z, mean, log_var)

    def log_marginal_likelihood(self, x, x_corrupted, n_importance, *, seed):
        """log p(x) in nats, (batch,), estimated with n_importance samples of z per image.

        log p(x) ~ logsumexp_k log_weights_k - log n_importance. With one sample its mean is the ELBO; it
        rises with their number towards log p(x) (Burda et al. 2016, section 3).
        """
        seed = tf.random.fold_in(seed, Stream.IMPORTANCE)
        n_chunks = math.ceil(n_importance / IMPORTANCE_CHUNK)
        size = math.ceil(n_importance / n_chunks)
        log_sum = tf.fill([x.shape[0]], -np.inf)
        for chunk in tf.range(n_chunks):
            log_weights = self.log_weights(x, x_corrupted, size, seed=tf.random.fold_in(seed, chunk))
            wanted = chunk * size + tf.range(size) < n_importance  # the last chunk may have too many
            log_weights = tf.where(wanted[:, None], log_weights, -np.inf)
            log_sum = tf.reduce_logsumexp(tf.concat([log_sum[None], log_weights], axis=0), axis=0)
        return log_sum - math.log(n_importance)

    def log_marginal_likelihood_grid(self, x, x_corrupted):
        """log p(x) in nats, (n,), by quadrature over the plane of dim_z 2: exact, whatever the encoder.

        The grid reaches beyond the farthest mean by six of its deviations, and to 5 at least; its spacing is
        the smallest deviation, 0.05 at most.
        """
        mean, log_var = self.encoder(x_corrupted)
        std = tf.exp(log_var / 2)
        spacing = tf.minimum(0.05, tf.reduce_min(std))
        reach = tf.maximum(5.0, tf.reduce_max(tf.abs(mean) + 6 * std))
        axis, log_sum = tf.range(-reach, reach, spacing), tf.fill([x.shape[0]], -np.inf)
        for z_1 in axis:  # a column of the grid at a time
            z = tf.stack([tf.fill(axis.shape, z_1), axis], axis=1)
            log_joint = self.likelihood.log_prob_table(x, self.decoder(z)) + self.prior.log_prob(z)
            log_sum = tf.reduce_logsumexp(tf.concat([log_sum[:, None], log_joint], axis=1), axis=1)
        return log_sum + 2 * tf.math.log(spacing)

    def encode(self, x):
        """Returns the latent means, (n, dim_z), of images x: (n, 784) in [0, 1]. TypeError for integers."""
        x = tf.convert_to_tensor(x)
        if not x.dtype.is_floating:
            raise TypeError(f"the pixels are {x.dtype.name}: take floats in [0, 1], as in images / 255")
        return self.encoder(tf.cast(x, tf.float32))[0]

    def decode(self, z):
        """Returns the images (n, 784) that latent vectors z: (n, dim_z) stand for: E[x|z]."""
        return self.likelihood.mean(self.decoder(tf.cast(z, tf.float32)))

    def reconstruct(self, x):
        """Returns images x: (n, 784), encoded and decoded. So does the network itself: network(x)."""
        return self.decode(self.encode(x))

    def call(self, x):
        return self.reconstruct(x)

    def sample(self, n, seed=(0, 0)):
        """Returns n new images, (n, 784): draws from the prior, decoded."""
        return self.decode(self.prior.sample(n, self.dim_z, seed))


@tf.function(jit_compile=True, autograph=False)
def uniform(shape, seed):
    """Returns uniform draws from [0, 1), by XLA's generator: with TensorFlow's, noise doubles the time."""
    return tf.random.stateless_uniform(shape, seed, alg="threefry")  # threefry exists in compiled code only


def dropout(h, keep_prob, seed, stream):
    """Zeros each unit of h: (batch, n) with probability 1 - keep_prob and scales the others by 1 / keep_prob.

    So the mean stays (Srivastava et al. 2014). keep_prob may change during training and be a tensor; with the
    number 1, as in evaluation, h stays as it is.
    """
    if not tf.is_tensor(keep_prob) and keep_prob == 1:
        return h
    shape = tuple(h.shape)

    def mask():
        return tf.cast(uniform(shape, tf.random.fold_in(seed, stream)) < keep_prob, tf.float32) / keep_prob

    # Keras' Dropout layer would cost a fifth of an epoch; drawing when nothing is dropped any more, 6%.
    return h * tf.cond(keep_prob < 1, mask, lambda: tf.ones(shape))


def salt_and_pepper(x, noise_level, seed):
    """Returns x: (batch, 784), each pixel replaced with probability noise_level by 0 or 1 at even odds."""
    u = uniform(tuple(x.shape), tf.random.fold_in(seed, Stream.NOISE))
    return tf.where(u < noise_level / 2, 0.0, tf.where(u < noise_level, 1.0, x))


def binarize(x, seed):
    """Returns x: (batch, 784), each pixel drawn from Bernoulli(grey level): Salakhutdinov and Murray 2008."""
    u = uniform(tuple(x.shape), tf.random.fold_in(seed, Stream.BINARIZATION))
    return tf.cast(u < x, tf.float32)


def active_units(mean):
    """Returns how many latent units of mean: (n, dim_z), over n images, are active: Var_x[E[z|x]] > 0.01.

    Burda et al. 2016, section 5.2.
    """
    return tf.math.count_nonzero(tf.math.reduce_variance(mean, axis=0) > 0.01)
