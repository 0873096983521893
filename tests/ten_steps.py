"""Takes ten steps under --distribute and writes the weights: python ten_steps.py DATA_DIR OUT FLAG ..."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import mnist_data
import run_main

N_DEVICES = 2  # of --distribute mirrored

if __name__ == "__main__":
    data_dir, out, *arguments = sys.argv[1:]
    flags = run_main.parse_flags(arguments)
    images = mnist_data.load_mnist(Path(data_dir), run_main.Console()).train_images
    run_main.import_tensorflow()
    tf = run_main.tf
    if flags.distribute == "mirrored":
        devices = [tf.config.LogicalDeviceConfiguration()] * N_DEVICES
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    with run_main.make_strategy(flags, run_main.Console(quiet=True)) as strategy:
        state = run_main.build(strategy, images, flags)
        train_steps = run_main.make_train_steps(strategy, state.network, state.optimizer, flags)
        batches = run_main.shuffled_batches(len(images), 1, flags)
        terms = train_steps(tf.constant(images), batches, *map(tf.constant, (1, 0, 10)))
        np.savez(out, *state.network.weights, terms=terms, n_replicas=strategy.num_replicas_in_sync)
