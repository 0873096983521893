"""The benchmark's programs are the same network, and learn. Nothing is timed here."""

import benchmark
import numpy as np
import pytest

import vae


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("peer", benchmark.installed_peers())
def test_programs_learn_alike(peer, optimizer, mnist):
    setting = {"optimizer": optimizer, "dim_z": 2, "n_hidden": 60, "batch_size": 50}

    def losses(name):
        reported = []
        benchmark.program(name)(mnist.train_images[:5_000], 3, reported.append, **setting)
        return reported

    peers, own = losses(peer), losses("ours")
    assert peers == sorted(peers, reverse=True)
    assert own == sorted(own, reverse=True)
    # Ours starts from the mean image, so it is ahead at first. A sum over the mini-batch or a mean over the
    # pixels would be off by a factor of 50 or more.
    assert 0.7 < own[-1] / peers[-1] < 1.1


def test_multiply_adds_are_those_of_the_products_with_the_weights():
    network = vae.VAE(3, 40, np.full(784, 0.5), 0)
    weights = sum(int(np.prod(w.shape)) for w in network.trainable_variables if len(w.shape) == 2)
    assert benchmark.multiply_adds(3, 40) == 3 * weights - 784 * 40
