"""The same network and training step in JAX: an epoch is one compiled scan over its steps.

The training of the well-known MNIST example: He's initialization, Adam at 0.001; SGD with one common clip.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
from jax import nn, random


def train(images, n_epochs, report, optimizer, dim_z, n_hidden=500, batch_size=128, keep_prob=0.9):
    """Trains on images (n, 784) uint8 and reports the loss of every epoch, nats per image."""
    sizes = [784, n_hidden, n_hidden, 2 * dim_z], [dim_z, n_hidden, n_hidden, 784]
    layers = [pair for half in sizes for pair in pairwise(half)]
    keys = random.split(random.key(0), len(layers))
    he = nn.initializers.he_normal()
    weights = [(he(key, layer), jnp.zeros(layer[1])) for key, layer in zip(keys, layers, strict=True)]
    adam, sgd = optax.adam(1e-3), optax.sgd(1e-3, momentum=0.98, nesterov=True)
    update = adam if optimizer == "adam" else optax.chain(optax.clip_by_global_norm(20.0), sgd)
    state = update.init(weights)
    images = jnp.asarray(images)
    n_steps = len(images) // batch_size

    def hidden(x, weights_and_bias, activation, key):
        kernel, bias = weights_and_bias
        h = activation(x @ kernel + bias)
        return jnp.where(random.bernoulli(key, keep_prob, h.shape), h / keep_prob, 0)

    def negative_elbo(weights, x, key):
        keys = random.split(key, 5)
        h = hidden(hidden(x, weights[0], nn.elu, keys[0]), weights[1], jnp.tanh, keys[1])
        mean, log_var = jnp.split(h @ weights[2][0] + weights[2][1], 2, axis=1)
        z = mean + jnp.exp(log_var / 2) * random.normal(keys[4], mean.shape)
        h = hidden(hidden(z, weights[3], jnp.tanh, keys[2]), weights[4], nn.elu, keys[3])
        logits = h @ weights[5][0] + weights[5][1]
        reconstruction = optax.sigmoid_binary_cross_entropy(logits, x).sum(axis=1)
        kl = -0.5 * (1 + log_var - mean**2 - jnp.exp(log_var)).sum(axis=1)
        return (reconstruction + kl).mean()

    @jax.jit
    def epoch(weights, state, key):
        shuffling, key = random.split(key)
        batches = random.permutation(shuffling, len(images))[: n_steps * batch_size]

        def step(carry, batch_and_key):
            weights, state = carry
            batch, key = batch_and_key
            x = images[batch].astype(jnp.float32) / 255
            loss, gradients = jax.value_and_grad(negative_elbo)(weights, x, key)
            changes, state = update.update(gradients, state)
            return (optax.apply_updates(weights, changes), state), loss

        steps = batches.reshape(n_steps, batch_size), random.split(key, n_steps)
        (weights, state), losses = jax.lax.scan(step, (weights, state), steps)
        return weights, state, losses.mean()

    for key in random.split(random.key(1), n_epochs):
        weights, state, loss = epoch(weights, state, key)
        report(float(loss))
