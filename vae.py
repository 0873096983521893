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

import math

import keras
import numpy as np
import tensorflow as tf

N_PIXELS = 28 * 28
IMPORTANCE_CHUNK = 50  # importance samples per image processed at once; bounds the memory they take

# The numbers folded into a seed, one per purpose, so that the draws are independent. Dropout takes DROPOUT,
# DROPOUT + 1, ... for one layer after the other; reparameterize, the seed as it is.
UPPER_LAYER, IMPORTANCE, BINARIZATION, NOISE, DROPOUT = -3, -2, -1, 0, 1


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
        """The logits whose mean is mean_image, (784,) or one number; finite where a pixel is always black."""
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
    # Initial biases of the decoder's first layer, in standard deviations of its weights. With 0, all of its
    # units would change sign at the origin of the latent plane; spread over it, 6 epochs gain 1.5 nats.
    spread = 2.0
    extra_inputs = 0  # of the decoder, beside z

    def __init__(self, dim_z=2, n_hidden=500, mean_image=0.5, seed=0, **options):
        super().__init__(name="vae", dtype="float32")
        self.dim_z, self.n_hidden, self.options = dim_z, n_hidden, options  # options: of the papers' models
        draws = keras.random.SeedGenerator(seed)
        he = keras.initializers.HeNormal(draws)
        # A tenth of He: the loss sums 784 pixels, so full-size outputs make the first gradients huge. Clipped
        # SGD tolerates them, but ends 0.4 nats worse (dim_z 2, 20 epochs).
        tenth_of_he = keras.initializers.VarianceScaling(2 * 0.1**2, "fan_in", "truncated_normal", draws)

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
        n_inputs = dim_z + self.extra_inputs
        spread = keras.initializers.RandomNormal(0.0, self.spread * math.sqrt(2 / n_inputs), seed=draws)
        self.decoder_hidden = [
            dense("decoder_1", n_inputs, n_hidden, "tanh", bias=spread),
            dense("decoder_2", n_hidden, n_hidden, "elu"),
        ]
        # Before training, the decoder answers roughly with the mean image.
        bias = keras.initializers.Constant(self.likelihood.output_bias(mean_image))
        self.decoder_output = dense("decoder_output", n_hidden, N_PIXELS, kernel=tenth_of_he, bias=bias)
        mean_image = keras.initializers.Constant(mean_image)
        self.mean_image = self.add_weight((N_PIXELS,), mean_image, trainable=False, name="mean_image")
        self.dense, self.small = dense, tenth_of_he
        self.built = True  # dense() has built all layers

    def get_config(self):
        """What keras.models.load_model makes the network from; all else is in its weights."""
        return {"dim_z": self.dim_z, "n_hidden": self.n_hidden, **self.options}

    def features(self, x, keep_prob=1.0, seed=None):
        """The encoder's hidden layers: returns (batch, n_hidden) for images x: (batch, 784)."""
        h = x - self.mean_image  # centred
        for stream, layer in enumerate(self.encoder_hidden, DROPOUT):
            h = dropout(layer(h), keep_prob, seed, stream)
        return h

    def encoder(self, x, *, keep_prob=1.0, seed=None):
        """The Gaussian encoder q(z|x): returns mean and log_var, (batch, dim_z) each, of x: (batch, 784)."""
        return halves(self.encoder_output(self.features(x, keep_prob, seed)))

    def decoder(self, z, *, keep_prob=1.0, seed=None):
        """The Bernoulli decoder p(x|z): returns the pixels' logits, (batch, 784), for z: (batch, dim_z)."""
        h = z
        for stream, layer in enumerate(self.decoder_hidden, DROPOUT + len(self.encoder_hidden)):
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

    def training_terms(self, x, x_corrupted, labels, *, seed, keep_prob, kl_weight):
        """The terms to train with, (batch,) each: the loss is the first plus kl_weight times the second."""
        return self.elbo_terms(x, x_corrupted, seed=seed, keep_prob=keep_prob)

    def weight_terms(self, x, x_corrupted, n, *, seed, keep_prob=1.0):
        """log p(x|z) and log [p(z) / q(z|x)] for n samples z ~ q(z|x) per image: (n, batch) each, in nats."""
        mean, log_var = repeated(self.encoder(x_corrupted, keep_prob=keep_prob, seed=seed), n)
        z = reparameterize(mean, log_var, seed)
        logits = self.decoder(tf.reshape(z, (-1, self.dim_z)), keep_prob=keep_prob, seed=seed)
        log_px = self.likelihood.log_prob(x, tf.reshape(logits, (n, *x.shape)))
        return log_px, self.prior.log_prob(z) - log_normal(z, mean, log_var)

    def log_weights(self, x, x_corrupted, n, *, seed):
        """log [p(x|z) p(z) / q(z|x)] for n importance samples z ~ q(z|x) per image: (n, batch), in nats."""
        return sum(self.weight_terms(x, x_corrupted, n, seed=seed))

    def log_marginal_likelihood(self, x, x_corrupted, n_importance, *, seed):
        """log p(x) in nats, (batch,), estimated with n_importance samples of z per image.

        log p(x) ~ logsumexp_k log_weights_k - log n_importance. With one sample its mean is the ELBO; it
        rises with their number towards log p(x) (Burda et al. 2016, section 3).
        """
        seed = tf.random.fold_in(seed, IMPORTANCE)
        n_chunks = math.ceil(n_importance / IMPORTANCE_CHUNK)
        size = math.ceil(n_importance / n_chunks)

        def log_sum(chunk):
            log_weights = self.log_weights(x, x_corrupted, size, seed=tf.random.fold_in(seed, chunk))
            wanted = chunk * size + tf.range(size) < n_importance  # the last chunk may have too many
            return tf.reduce_logsumexp(tf.where(wanted[:, None], log_weights, -np.inf), axis=0)

        log_sums = tf.map_fn(log_sum, tf.range(n_chunks), fn_output_signature=tf.float32)
        return tf.reduce_logsumexp(log_sums, axis=0) - math.log(n_importance)

    def log_joint(self, x, z):
        """log p(x, z) in nats, (n, m), of each of x: (n, 784) with each of z: (m, dim_z)."""
        return self.likelihood.log_prob_table(x, self.decoder(z)) + self.prior.log_prob(z)

    def log_marginal_likelihood_grid(self, x, mean, log_var):
        """log p(x) in nats, (n,), by quadrature over the plane of dim_z 2; mean and log_var are q(z|x)'s.

        The grid reaches beyond the farthest mean by six of its deviations, and to 5 at least; its spacing is
        the smallest deviation, 0.05 at most, and no less than a thousandth of its width. This is exact where
        p(z|x) is no narrower than the spacing.
        """
        std = tf.exp(log_var / 2)
        reach = tf.maximum(5.0, tf.reduce_max(tf.abs(mean) + 6 * std))
        spacing = tf.maximum(tf.minimum(0.05, tf.reduce_min(std)), reach / 500)
        axis, log_sum = tf.range(-reach, reach, spacing), tf.fill([x.shape[0]], -np.inf)
        for z_1 in axis:  # a column of the grid at a time
            z = tf.stack([tf.fill(axis.shape, z_1), axis], axis=1)
            log_joint = self.log_joint(x, z)
            log_sum = tf.reduce_logsumexp(tf.concat([log_sum[:, None], log_joint], axis=1), axis=1)
        return log_sum + 2 * tf.math.log(spacing)

    def encode(self, x):
        """Returns the latent means, (n, dim_z), of images x: (n, 784) in [0, 1]. TypeError for integers."""
        return self.encoder(pixels(x))[0]

    def decode(self, z):
        """Returns the images (n, 784) that latent vectors z: (n, dim_z) stand for: E[x|z]."""
        return self.likelihood.mean(self.decoder(tf.cast(z, tf.float32)))

    def reconstruct(self, x):
        """Returns images x: (n, 784), encoded and decoded. So does the network itself: network(x)."""
        return self.decode(self.encode(x))

    def call(self, x):
        return self.reconstruct(x)

    def draw(self, n, seed):
        """Returns n draws z from the prior, (n, dim_z), and the logits, (n, 784), of their images."""
        z = self.prior.sample(n, self.dim_z, seed)
        return z, self.decoder(z)

    def sample(self, n, seed=(0, 0)):
        """Returns n new images, (n, 784): draws from the prior, decoded."""
        return self.likelihood.mean(self.draw(n, seed)[1])

    def test_metrics(self, x, labels):
        """Returns what this model alone is measured by, {name: number}, on images and their labels."""
        return {}


def pixels(x):
    """Returns images in [0, 1] as float32; TypeError for integers."""
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_floating:
        raise TypeError(f"the pixels are {x.dtype.name}: take floats in [0, 1], as in images / 255")
    return tf.cast(x, tf.float32)


def halves(array):
    """Returns the two halves of the last axis: mean and log_var."""
    n = array.shape[-1] // 2  # the gradient of tf.split would not compile within tf.distribute
    return array[..., :n], array[..., n:]


def repeated(arrays, n):
    """Returns each of the arrays, (...), n times: (n, ...)."""
    return [tf.broadcast_to(array, (n, *array.shape)) for array in arrays]


@tf.function(jit_compile=True, autograph=False)
def uniform(shape, seed):
    """Returns uniform draws from (0, 1).

    By XLA's generator: with TensorFlow's, an epoch with noise takes twice as long. A random 32-bit integer is
    halved into two draws, which saves 4% of an epoch.
    """
    n = math.prod(shape)
    # Threefry exists in compiled code only.
    bits = tf.random.stateless_uniform([math.ceil(n / 2)], seed, None, None, tf.uint32, alg="threefry")
    draws = tf.concat([bits % 2**16, bits // 2**16], axis=0)[:n]
    return tf.reshape((tf.cast(draws, tf.float32) + 0.5) / 2**16, shape)


def dropout(h, keep_prob, seed, stream):
    """Zeros each unit of h: (batch, n) with probability 1 - keep_prob and scales the others by 1 / keep_prob.

    This keeps the mean (Srivastava et al. 2014). keep_prob may be a tensor that changes during training; with
    the number 1, as in evaluation, h stays as it is.
    """
    if not tf.is_tensor(keep_prob) and keep_prob == 1:
        return h
    # Keras' Dropout layer would cost a fifth of the training time.
    kept = uniform(tuple(h.shape), tf.random.fold_in(seed, stream)) < keep_prob
    return h * (tf.cast(kept, tf.float32) / keep_prob)


def salt_and_pepper(x, noise_level, seed):
    """Returns x: (batch, 784), each pixel replaced with probability noise_level by 0 or 1 at even odds."""
    u = uniform(tuple(x.shape), tf.random.fold_in(seed, NOISE))
    return tf.where(u < noise_level / 2, 0.0, tf.where(u < noise_level, 1.0, x))


def binarize(x, seed):
    """Returns x: (batch, 784), each pixel drawn from Bernoulli(grey level): Salakhutdinov and Murray 2008."""
    u = uniform(tuple(x.shape), tf.random.fold_in(seed, BINARIZATION))
    return tf.cast(u < x, tf.float32)


def active_units(mean):
    """Returns how many units of mean: (n, dim_z) are active: Var_x[E[z|x]] > 0.01 (Burda et al. 2016)."""
    return tf.math.count_nonzero(tf.math.reduce_variance(mean, axis=0) > 0.01)


# --- The papers: each a model that overrides just what its paper changes ------------------------------


@keras.saving.register_keras_serializable("vae")
class IWAE(VAE):
    """Importance-weighted autoencoder: Burda, Grosse and Salakhutdinov, arXiv:1509.00519.

    Trains with L_k = E[log 1/k sum_i w_i], w_i = p(x|z_i) p(z_i) / q(z_i|x), k = n_samples (equation 8): a
    tighter bound than the ELBO, which is L_1. Its gradient is sum_i w~_i grad log w_i, with the weights
    normalized (equation 13). What is logged as KL divergence in training is -L_k minus the first term.
    """

    def training_terms(self, x, x_corrupted, labels, *, seed, keep_prob, kl_weight):
        k = self.options["n_samples"]
        log_px, minus_kl = self.weight_terms(x, x_corrupted, k, seed=seed, keep_prob=keep_prob)
        shares = tf.stop_gradient(tf.nn.softmax(log_px + kl_weight * minus_kl, axis=0))
        bound = tf.reduce_logsumexp(log_px + minus_kl, axis=0) - math.log(k)
        reconstruction, kl = (-tf.reduce_sum(shares * term, axis=0) for term in (log_px, minus_kl))
        # Their sum is -L_k; their gradient is that of the weighted terms.
        return reconstruction, kl + tf.stop_gradient(-bound - reconstruction - kl)


class GaussianPixels(Bernoulli):
    """p(x|z) = N(x; sigmoid(logits), std^2 I): a density of grey levels, so log p(x) has another unit.

    Shapes, mean and output_bias are Bernoulli's.
    """

    def __init__(self, raw_std):
        self.raw_std = raw_std  # one number, any real one

    @property
    def log_std(self):
        """Above log(1/255): a smaller std would say more than grey levels have."""
        return tf.nn.softplus(self.raw_std) - math.log(255)

    def log_prob(self, x, logits):
        return log_normal(x, tf.sigmoid(logits), 2 * self.log_std)

    def log_prob_table(self, x, logits):
        mean, log_std = tf.sigmoid(logits), self.log_std
        squares = tf.reduce_sum(x**2, axis=-1, keepdims=True) + tf.reduce_sum(mean**2, axis=-1)
        squares -= 2 * tf.matmul(x, mean, transpose_b=True)
        return -squares / (2 * tf.exp(2 * log_std)) - x.shape[-1] * (0.5 * math.log(2 * math.pi) + log_std)

    def sample(self, logits, seed):
        return reparameterize(tf.sigmoid(logits), 2 * self.log_std, seed)


@keras.saving.register_keras_serializable("vae")
class LeastSquares(VAE):
    """Least squares: Ramachandra, arXiv:1707.03134, of which only the abstract was at hand.

    Read here as Gaussian pixels in place of Bernoulli ones, with the KL divergence as the regularization. The
    reconstruction error is sum (x - x^)^2 / (2 std^2) + 392 log(2 pi std^2). std is trained with the rest, so
    that no weight between error and KL divergence has to be chosen.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        initial = keras.initializers.Constant(math.log(255 * 0.2 - 1))  # std 0.2
        self.raw_std = self.add_weight((), initial, name="raw_std")
        self.likelihood = GaussianPixels(self.raw_std)


@keras.saving.register_keras_serializable("vae")
class StickBreaking(VAE):
    """Stick-breaking prior: Nalisnick and Smyth, arXiv:1605.06197, with a Gaussian in place of their q.

    The decoder sees sticks pi_k = v_k prod_{j<k} (1 - v_j), v_k ~ Beta(1, CONCENTRATION). With z_k ~ N(0, 1),
    v_k = 1 - (1 - Phi(z_k))^(1 / CONCENTRATION) has just this distribution; the map is monotone, so that the
    KL divergence of the z is that of the v, and all but the decoder's input stays. q(v|x) is then much like
    their "Gauss-logit" posterior, with Phi in place of the logistic function.
    """

    CONCENTRATION = 5.0
    extra_inputs = 1  # the last stick
    spread = 0.0  # sticks are small: biases would drown them

    def sticks(self, z):
        """Returns the sticks, (..., dim_z + 1), that z: (..., dim_z) stands for: they add to 1."""
        log_left = tf.math.log(0.5 * tf.math.erfc(z / math.sqrt(2))) / self.CONCENTRATION  # log(1 - v)
        before = tf.exp(tf.cumsum(log_left, axis=-1, exclusive=True))
        last = tf.exp(tf.reduce_sum(log_left, axis=-1, keepdims=True))
        return tf.concat([before * -tf.math.expm1(log_left), last], axis=-1)

    def decoder(self, z, **options):
        return super().decoder(self.sticks(z), **options)


@keras.saving.register_keras_serializable("vae")
class Ladder(VAE):
    """Ladder VAE with two layers of latent variables: Sonderby et al., arXiv:1602.02282.

    p(z_2) = N(0, I), p(z_1|z_2) a Gaussian by a network, p(x|z_1) the decoder. q(z_1|z_2, x) is the product
    of p(z_1|z_2) and the encoder's Gaussian: precisions add (equations 17 and 18). z_2, of dim_z numbers, is
    what encode and decode speak of; z_1 has dim_z_lower numbers. The paper has up to five layers, and batch
    normalization; here, the layers up_* and down_* have no dropout.
    """

    log_joint = log_marginal_likelihood_grid = None  # z_2 alone gives no p(x|z)

    def __init__(self, dim_z=2, n_hidden=500, mean_image=0.5, seed=0, dim_z_lower=64):
        super().__init__(dim_z_lower, n_hidden, mean_image, seed, dim_z_lower=dim_z_lower)
        self.dim_z, dense, small = dim_z, self.dense, self.small
        self.upwards = [dense("up_1", n_hidden, n_hidden, "elu"), dense("up_2", n_hidden, n_hidden, "tanh")]
        self.upper_output = dense("z_2_mean_and_log_var", n_hidden, 2 * dim_z, kernel=small)
        self.downwards = [
            dense("down_1", dim_z, n_hidden, "tanh"),
            dense("down_2", n_hidden, n_hidden, "elu"),
        ]
        self.lower_output = dense("z_1_prior_mean_and_log_var", n_hidden, 2 * dim_z_lower, kernel=small)

    def encoder(self, x, *, keep_prob=1.0, seed=None):
        return self.both_encoders(x, keep_prob, seed)[1]

    def both_encoders(self, x, keep_prob=1.0, seed=None):
        """Returns (mean, log_var) of the encoder's Gaussians: of z_1, which is not yet q, and of z_2."""
        h = lower = self.features(x, keep_prob, seed)
        for layer in self.upwards:
            h = layer(h)
        return halves(self.encoder_output(lower)), halves(self.upper_output(h))

    def lower_prior(self, z_2):
        """Returns mean and log_var, (..., dim_z_lower), of p(z_1|z_2)."""
        for layer in self.downwards:
            z_2 = layer(z_2)
        return halves(self.lower_output(z_2))

    def merge(self, one, other):
        """Returns (mean, log_var) of the product of two Gaussians: the more precise one counts for more."""
        (mean, log_var), (other_mean, other_log_var) = one, other
        log_precision = tf.nn.softplus(log_var - other_log_var) - log_var  # log(1 / var + 1 / other_var)
        share = tf.exp(-log_var - log_precision)
        return share * mean + (1 - share) * other_mean, -log_precision

    def path(self, x, n, keep_prob, seed):
        """Returns draws of both layers, (n, batch, ...), z_1 first: each z with its q and its prior."""
        encoded, upper = self.both_encoders(x, keep_prob, seed)
        mean, log_var = repeated(upper, n)
        z_2 = reparameterize(mean, log_var, tf.random.fold_in(seed, UPPER_LAYER))
        prior = self.lower_prior(z_2)
        lower = self.merge(encoded, prior)
        return (reparameterize(*lower, seed), lower, prior), (z_2, (mean, log_var))

    def elbo_terms(self, x, x_corrupted, *, seed, keep_prob=1.0):
        (z_1, lower, prior), (z_2, upper) = self.path(x_corrupted, 1, keep_prob, seed)
        logits = super().decoder(z_1[0], keep_prob=keep_prob, seed=seed)
        kl = tf.reduce_sum(self.lower_kl(lower, prior), axis=-1) + self.prior.kl_divergence(*upper, z_2)
        return -self.likelihood.log_prob(x, logits), kl[0]

    def lower_kl(self, lower, prior):
        """KL[q(z_1|z_2, x) || p(z_1|z_2)] of each unit, (..., dim_z_lower), from their means and log_vars."""
        (mean, log_var), (prior_mean, prior_log_var) = lower, prior
        distance = (tf.exp(log_var) + (mean - prior_mean) ** 2) / tf.exp(prior_log_var)
        return 0.5 * (prior_log_var - log_var + distance - 1)

    def weight_terms(self, x, x_corrupted, n, *, seed, keep_prob=1.0):
        (z_1, lower, prior), (z_2, upper) = self.path(x_corrupted, n, keep_prob, seed)
        logits = super().decoder(tf.reshape(z_1, (-1, z_1.shape[-1])), keep_prob=keep_prob, seed=seed)
        log_ratio = log_normal(z_1, *prior) - log_normal(z_1, *lower)
        log_ratio += self.prior.log_prob(z_2) - log_normal(z_2, *upper)
        return self.likelihood.log_prob(x, tf.reshape(logits, (n, *x.shape))), log_ratio

    def decoder(self, z, **options):
        """Returns the logits of what z_2 alone says: with z_1 at its mean."""
        return super().decoder(self.lower_prior(z)[0], **options)

    def reconstruct(self, x):
        encoded, (mean, _) = self.both_encoders(pixels(x))
        z_1, _ = self.merge(encoded, self.lower_prior(mean))
        return self.likelihood.mean(super().decoder(z_1))

    def draw(self, n, seed):
        z_2 = self.prior.sample(n, self.dim_z, seed)
        z_1 = reparameterize(*self.lower_prior(z_2), tf.random.fold_in(seed, UPPER_LAYER))
        return z_2, super().decoder(z_1)

    def test_metrics(self, x, labels):
        """Returns z_2's part of the KL divergence, and how many units of z_1 have 0.01 nats of the rest."""
        (_, lower, prior), (z_2, upper) = self.path(x, 1, 1.0, (0, 0))
        kl = tf.reduce_mean(self.prior.kl_divergence(*upper, z_2))
        used = tf.reduce_mean(self.lower_kl(lower, prior)[0], axis=0) > 0.01
        return {"test_kl_upper": float(kl), "active_units_lower": int(tf.math.count_nonzero(used))}


@keras.saving.register_keras_serializable("vae")
class Stein(VAE):
    """Stein VAE: Pu et al., arXiv:1704.05155, with one decoder where the paper has samples of its weights.

    The encoder has no density: it draws particles z_j = f(x, xi_j), xi_j ~ N(0, I), here mean + std * xi_j
    plus the output of a small network of x and xi_j. They are trained to go where Stein variational gradient
    descent moves them: phi(z_j) = 1/M sum_i [k(z_i, z_j) grad log p(x, z_i) + grad_{z_i} k(z_i, z_j)],
    M = n_samples. In evaluation, q is the Gaussian fitted to FITTED particles, so that the ELBO is a bound.
    """

    FITTED = 64

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        n = self.n_hidden
        self.bend_x, self.bend_noise = self.dense("bend_x", n, n), self.dense("bend_noise", self.dim_z, n)
        self.bend_output = self.dense("bend_output", n, self.dim_z, kernel=self.small)

    def particles(self, x, n, *, seed, keep_prob=1.0):
        """Returns n draws of z for each image: (n, batch, dim_z)."""
        h = self.features(x, keep_prob, seed)
        mean, log_var = halves(self.encoder_output(h))
        noise = tf.random.stateless_normal((n, 1, self.dim_z), seed)  # one for all images, as in the paper
        bend = self.bend_output(tf.tanh(self.bend_x(h) + self.bend_noise(noise)))
        return mean + tf.exp(log_var / 2) * noise + bend

    def encoder(self, x, *, keep_prob=1.0, seed=None):
        """The Gaussian fitted to particles: always the same ones, without dropout."""
        return self.fitted(self.particles(x, self.FITTED, seed=(-1, -1)))  # a seed that no flag can give

    def fitted(self, z):
        """Returns mean and log_var, (batch, dim_z) each, of the Gaussian fitted to z: (n, batch, dim_z)."""
        return tf.reduce_mean(z, axis=0), tf.math.log(tf.math.reduce_variance(z, axis=0) + 1e-6)

    def training_terms(self, x, x_corrupted, labels, *, seed, keep_prob, kl_weight):
        z = self.particles(x_corrupted, self.options["n_samples"], seed=seed, keep_prob=keep_prob)
        fixed = tf.stop_gradient(z)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(fixed)
            logits = self.decoder(tf.reshape(fixed, (-1, self.dim_z)), keep_prob=keep_prob, seed=seed)
            log_px = self.likelihood.log_prob(x, tf.reshape(logits, (*z.shape[:2], -1)))
            log_joint = log_px + kl_weight * self.prior.log_prob(fixed)
        direction = svgd_direction(fixed, tape.gradient(log_joint, fixed), kl_weight)
        towards = -tf.reduce_mean(tf.reduce_sum(tf.stop_gradient(direction) * z, axis=-1), axis=0)
        kl = self.prior.kl_divergence(*self.fitted(fixed), fixed[0])
        # `towards` has a gradient only; what is logged are the particles' error and their Gaussian's KL.
        return towards - tf.stop_gradient(towards) - tf.reduce_mean(log_px, axis=0), tf.stop_gradient(kl)


def svgd_direction(z, score, repulsion=1.0):
    """Returns where Stein variational gradient descent moves particles z; all are (n, batch, dim_z).

    score: the gradient of log p(x, z). repulsion: weight of what keeps particles apart. Liu and Wang,
    arXiv:1608.04471, with the kernel exp(-r^2 / h); h is the mean of r^2 over the pairs, not the median.
    """
    n = z.shape[0]
    apart = z[:, None] - z[None]  # (i, j, batch, dim_z)
    squares = tf.reduce_sum(apart**2, axis=-1)
    h = tf.reduce_sum(squares, axis=(0, 1)) / max(1, n * (n - 1)) + 1e-6
    kernel = tf.exp(-squares / h)
    pushed = -2 * repulsion * tf.einsum("ijb,ijbd->jbd", kernel / h, apart)
    return (tf.einsum("ijb,ibd->jbd", kernel, score) + pushed) / n


@keras.saving.register_keras_serializable("vae")
class Labels(VAE):
    """Images and labels: Pu et al., arXiv:1609.08976, without their convolutions and captions.

    A linear support vector machine, one class against the others, reads the label from z. Its hinge loss
    trains the encoder, too, through the labelled digits: what is maximized is ELBO - xi E_q[hinge(y, z)]. The
    paper has xi E_q[log p(y|z)], with p of a Bayesian support vector machine.
    """

    WEIGHT = 80.0  # xi: 784 pixels to 10 classes, rounded; of the mean loss of a mini-batch's labelled digits

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.classifier = self.dense("classifier", self.dim_z, 10)

    def training_terms(self, x, x_corrupted, labels, *, seed, keep_prob, kl_weight):
        reconstruction, kl = self.elbo_terms(x, x_corrupted, seed=seed, keep_prob=keep_prob)
        z = reparameterize(*self.encoder(x_corrupted, keep_prob=keep_prob, seed=seed), seed)  # the same draw
        signs = 2 * tf.one_hot(labels, 10) - 1
        known = tf.cast(labels >= 0, tf.float32)
        hinge = known * tf.reduce_sum(tf.nn.relu(1 - signs * self.classifier(z)), axis=-1)
        loss = self.WEIGHT * hinge * known.shape[0] / tf.maximum(1.0, tf.reduce_sum(known))
        return reconstruction + loss - tf.stop_gradient(loss), kl  # what is logged stays the ELBO

    def classify(self, x, n=50, seed=(0, 0)):
        """Returns the labels, (batch,), that images have on average over n draws of z."""
        mean, log_var = repeated(self.encoder(x), n)
        scores = tf.reduce_mean(self.classifier(reparameterize(mean, log_var, seed)), axis=0)
        return tf.argmax(scores, axis=-1)

    def test_metrics(self, x, labels):
        return {"test_error": float(np.mean(self.classify(x) != labels))}
