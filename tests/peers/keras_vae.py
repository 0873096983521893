"""The same network and training step with Keras' layers and its fit."""

import tensorflow as tf
from tensorflow import keras


class Sampling(keras.layers.Layer):
    """Draws z by the reparameterization trick and adds the KL divergence to the loss."""

    def call(self, mean_log_var):
        mean, log_var = tf.split(mean_log_var, 2, axis=1)
        self.add_loss(-0.5 * tf.reduce_mean(tf.reduce_sum(1 + log_var - mean**2 - tf.exp(log_var), axis=1)))
        return mean + tf.exp(log_var / 2) * tf.random.normal(tf.shape(mean))


def reconstruction_error(x, logits):
    return tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels=x, logits=logits), axis=1)


def train(images, n_epochs, report, optimizer, dim_z, n_hidden=500, batch_size=128, keep_prob=0.9):
    """Trains on images (n, 784) uint8 and reports the loss of every epoch, nats per image."""
    he = keras.initializers.HeNormal(0)

    def hidden(activation):
        dense = keras.layers.Dense(n_hidden, activation, kernel_initializer=he)
        return [dense, keras.layers.Dropout(1 - keep_prob)]

    layers = [*hidden("elu"), *hidden("tanh"), keras.layers.Dense(2 * dim_z), Sampling()]
    layers += [*hidden("tanh"), *hidden("elu"), keras.layers.Dense(784)]
    network = keras.Sequential([keras.Input((784,)), *layers])
    adam, sgd = keras.optimizers.Adam, keras.optimizers.SGD
    update = adam(1e-3) if optimizer == "adam" else sgd(1e-3, 0.98, nesterov=True, global_clipnorm=20.0)
    network.compile(update, reconstruction_error, steps_per_execution=39)
    n_steps = len(images) // batch_size
    x = images[: n_steps * batch_size].astype("float32") / 255
    at_end = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: report(logs["loss"]))
    network.fit(x, x, batch_size, n_epochs, shuffle=True, verbose=0, callbacks=[at_end])
