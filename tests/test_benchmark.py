"""The programs that the benchmark compares train the same network. Nothing is timed here."""

import math

import benchmark
import pytest

import vae


def losses(name, images, optimizer):
    """Returns the losses of three epochs of one of the programs."""
    reported = []
    train = benchmark.program(name)
    train(images, 3, reported.append, optimizer=optimizer, dim_z=2, n_hidden=60, batch_size=50)
    return reported


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("peer", benchmark.installed_peers())
def test_programs_have_similar_losses(peer, optimizer, mnist):
    peer_losses = losses(peer, mnist.train_images[:5_000], optimizer)
    our_losses = losses("ours", mnist.train_images[:5_000], optimizer)
    assert peer_losses == sorted(peer_losses, reverse=True)
    assert our_losses == sorted(our_losses, reverse=True)
    # Ours starts from the mean image, so it is ahead at first. A sum over the mini-batch or a mean over the
    # pixels would be off by a factor of 50 or more.
    assert 0.7 < our_losses[-1] / peer_losses[-1] < 1.1


def test_multiply_adds_follow_from_the_weight_matrices():
    network = vae.VAE(dim_z=3, n_hidden=40)
    sizes = [math.prod(weights.shape) for weights in network.trainable_variables if len(weights.shape) == 2]
    assert benchmark.multiply_adds(3, 40) == 3 * sum(sizes) - 784 * 40
