"""The variational autoencoder: encoder, decoder, the overall network and its loss.

After Kingma and Welling, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), with two hidden layers
where the networks of their appendix C have one:

    encoder   q(z|x) = N(z; mean(x), diag exp(log_var(x)))
    decoder   p(x|z) = Bernoulli(x; sigmoid(logits(z)))
    prior     p(z)   = N(0, I)
    loss      -ELBO  = -E_q[log p(x|z)] + KL[q(z|x) || p(z)]

An image x is a row of 784 pixels in [0, 1], a latent vector z a row of dim_z numbers. Losses are in
nats per image: sums over pixels or latent dimensions, never means over them.

Whatever is random in a function below is determined by its `seed`, two int32 numbers.
"""

import numpy as np
import tensorflow as tf
from tensorflow import keras

N_PIXELS = 28 * 28

# What is folded into one seed, so that its draws for different purposes are independent. Dropout's layers
# have 1 to 4, reparameterize has the seed itself.
NOISE, PIXELS, IMPORTANCE = 0, 5, 6

IMPORTANCE_BLOCK = 50  # draws of z for an image at a time; bounds the memory that any number of them takes


class VAE(keras.Model):
    """The overall network: the weights of encoder and decoder, and what is computed with them.

    dim_z: length of a latent vector. n_hidden: units of a hidden layer.
    mean_image: (784,) mean of the training images, in [0, 1]; kept among the weights.
    seed: integer, the initial weights are a function of it.
    """

    def __init__(self, dim_z, n_hidden, mean_image, seed):
        super().__init__(name="vae")
        draws = keras.random.SeedGenerator(seed)
        he = keras.initializers.HeNormal(draws)
        # A tenth of He: the loss sums 784 pixels, so full-size outputs make the first gradients huge. Clipped
        # SGD stands them, but ends 1.0 nats behind (dim_z 2, 20 epochs).
        tenth_of_he = keras.initializers.VarianceScaling(2 * 0.1**2, "fan_in", "truncated_normal", draws)

        def dense(n_in, n_out, activation=None, weights=he, bias="zeros"):
            layer = keras.layers.Dense(n_out, activation, kernel_initializer=weights, bias_initializer=bias)
            layer.build((None, n_in))
            return layer

        self.encoder_1 = dense(N_PIXELS, n_hidden, "elu")
        self.encoder_2 = dense(n_hidden, n_hidden, "tanh")
        self.z_mean_log_var = dense(n_hidden, 2 * dim_z, weights=tenth_of_he)
        self.decoder_1 = dense(dim_z, n_hidden, "tanh")
        self.decoder_2 = dense(n_hidden, n_hidden, "elu")
        # The decoder starts from the mean image, the encoder from what differs from it. Pixels that
        # are black in all of training get a finite logit.
        pixels = np.clip(mean_image, 0.001, 0.999)
        mean_logits = keras.initializers.Constant(np.log(pixels / (1 - pixels)))
        self.x_logits = dense(n_hidden, N_PIXELS, weights=tenth_of_he, bias=mean_logits)
        self.mean_image = self.add_weight(
            (N_PIXELS,), keras.initializers.Constant(mean_image), trainable=False
        )
        self.built = True

    def gaussian_encoder(self, x, keep_prob=1.0, seed=None):
        """q(z|x): returns mean and log_var, (batch, dim_z) each, of images x: (batch, 784)."""
        h = dropout(self.encoder_1(x - self.mean_image), keep_prob, seed, layer=1)
        h = dropout(self.encoder_2(h), keep_prob, seed, layer=2)
        mean, log_var = tf.split(self.z_mean_log_var(h), 2, axis=1)
        return mean, log_var

    def bernoulli_decoder(self, z, keep_prob=1.0, seed=None):
        """p(x|z): returns the pixels' logits, (batch, 784), for latent vectors z: (batch, dim_z)."""
        h = dropout(self.decoder_1(z), keep_prob, seed, layer=3)
        h = dropout(self.decoder_2(h), keep_prob, seed, layer=4)
        return self.x_logits(h)

    def autoencoder(self, x, seed, keep_prob=1.0):
        """Encodes images x: (batch, 784), draws a z for each and decodes it.

        Returns mean and log_var, (batch, dim_z), and the pixels' logits, (batch, 784).
        """
        mean, log_var = self.gaussian_encoder(x, keep_prob, seed)
        z = reparameterize(mean, log_var, seed)
        return mean, log_var, self.bernoulli_decoder(z, keep_prob, seed)

    def negative_elbo(self, x, x_seen, seed, keep_prob=1.0):
        """The two terms of -ELBO, an unbiased estimate with one draw of z (equation 10 of the paper).

        x: (batch, 784) the images to reconstruct; x_seen: (batch, 784) what the encoder sees of them,
        x itself or x with noise. Returns the reconstruction error and the KL divergence, (batch,) each.
        """
        mean, log_var, logits = self.autoencoder(x_seen, seed, keep_prob)
        return reconstruction_error(x, logits), kl_divergence(mean, log_var)

    def log_marginal_likelihood(self, x, x_seen, n_importance, seed):
        """log p(x) in nats, (batch,), estimated by importance sampling with n_importance draws of z an image.

        log p(x) ~ logsumexp_k [log p(x|z_k) + log p(z_k) - log q(z_k|x)] - log n_importance, z_k ~ q(z|x).
        With one draw its mean is the ELBO; it rises with their number towards log p(x) (Burda et al. 2016,
        section 3). x and x_seen as in negative_elbo; n_importance is a scalar tensor where this is compiled.
        """
        mean, log_var = self.gaussian_encoder(x_seen)
        seed = tf.random.fold_in(seed, IMPORTANCE)
        log_sum = tf.fill([x.shape[0]], -np.inf)
        n_done = 0
        while n_done < n_importance:
            # (draws, batch, ...) from here on
            epsilon = tf.random.stateless_normal(
                (IMPORTANCE_BLOCK, *mean.shape), tf.random.fold_in(seed, n_done)
            )
            z = mean + tf.exp(log_var / 2) * epsilon
            logits = tf.reshape(self.bernoulli_decoder(tf.reshape(z, (-1, z.shape[2]))), (-1, *x.shape))
            log_px_z = -reconstruction_error(tf.broadcast_to(x, logits.shape), logits)
            # log p(z) - log q(z|x), in which the terms with 2 pi cancel
            log_ratio = tf.reduce_sum(epsilon**2 + log_var - z**2, axis=2) / 2
            wanted = n_done + tf.range(IMPORTANCE_BLOCK) < n_importance
            log_weights = tf.where(wanted[:, None], log_px_z + log_ratio, -np.inf)
            log_sum = tf.reduce_logsumexp(tf.concat([log_sum[None], log_weights], axis=0), axis=0)
            n_done += IMPORTANCE_BLOCK
        return log_sum - tf.math.log(tf.cast(n_importance, tf.float32))


def own_rows(batch):
    """Returns what a replica under tf.distribute takes of a whole batch (n, ...); without replicas, all."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return batch
    n = batch.shape[0] // replica.num_replicas_in_sync
    first = n * replica.replica_id_in_sync_group
    return batch[first : first + n]


def draw_rows(draw, shape, seed, **more):
    """Returns draw(shape, seed), random numbers for images, the first axis of the shape.

    Under tf.distribute a replica draws for the whole batch and takes the rows of its own images: so the
    numbers differ between replicas, and are those of a single one.
    """
    n_replicas = tf.distribute.get_replica_context().num_replicas_in_sync
    return own_rows(draw((n_replicas * shape[0], *shape[1:]), seed, **more))


def dropout(h, keep_prob, seed, layer):
    """Zeros each unit of h with chance 1 - keep_prob and scales the others by 1 / keep_prob.

    The mean stays (Srivastava et al. 2014). Layers of one network differ in `layer`. With a keep_prob
    of 1, as in evaluation, h comes back as it is.
    """
    if keep_prob == 1:
        return h
    # Keras' Dropout layer costs a fifth of the training time, these random bits far less. They exist
    # in compiled functions only.
    u = draw_rows(tf.random.stateless_uniform, h.shape, tf.random.fold_in(seed, layer), alg="threefry")
    return tf.nn.experimental.general_dropout(h, rate=1 - keep_prob, uniform_sampler=lambda **_: u)


def reparameterize(mean, log_var, seed):
    """Draws z ~ N(mean, exp(log_var)) as a differentiable function of both: z = mean + std * epsilon.

    The reparameterization trick, section 2.4 of the paper. mean, log_var and z: (batch, dim_z).
    """
    epsilon = draw_rows(tf.random.stateless_normal, mean.shape, seed)
    return mean + tf.exp(log_var / 2) * epsilon


def reconstruction_error(x, logits):
    """-log p(x|z) in nats, (batch,): binary cross-entropy summed over the pixels, x and logits (batch, 784).

    Equation 11 of the paper, from logits, so that no probability needs clipping. There may be more axes in
    front of the last.
    """
    return tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels=x, logits=logits), axis=-1)


def kl_divergence(mean, log_var):
    """KL[N(mean, exp(log_var)) || N(0, I)] in nats, (batch,), of mean and log_var (batch, dim_z).

    In closed form: appendix B of the paper.
    """
    return -0.5 * tf.reduce_sum(1 + log_var - mean**2 - tf.exp(log_var), axis=1)


def sample_prior(n, dim_z, seed):
    """Returns n draws from p(z) = N(0, I): (n, dim_z)."""
    return tf.random.stateless_normal((n, dim_z), seed)


def salt_and_pepper(x, noise_level, seed):
    """Returns x: (batch, 784) with each pixel replaced, with chance noise_level, by 0 or 1 at even odds."""
    u = draw_rows(tf.random.stateless_uniform, x.shape, tf.random.fold_in(seed, NOISE))
    return tf.where(u < noise_level / 2, 0.0, tf.where(u < noise_level, 1.0, x))


def binarize(x, seed):
    """Returns x: (batch, 784) with each pixel drawn as 1, with its grey level for chance, or 0.

    Salakhutdinov and Murray 2008. Of such images the Bernoulli decoder gives a real likelihood.
    """
    u = draw_rows(tf.random.stateless_uniform, x.shape, tf.random.fold_in(seed, PIXELS))
    return tf.cast(u < x, tf.float32)


def active_units(mean):
    """Returns how many latent units of mean: (n, dim_z), over n images, carry something about an image.

    Those whose variance over the images is above 0.01 (Burda et al. 2016, section 5.2).
    """
    return tf.math.count_nonzero(tf.math.reduce_variance(mean, axis=0) > 0.01)
