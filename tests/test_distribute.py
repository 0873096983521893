"""Training on several devices and machines: it computes what one device does, and never hangs."""

import json
import signal
import socket

import numpy as np
import pytest
from conftest import ROOT, SMALL, assert_mentions, files, names, one_line, read_log

import run_main
import vae

CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "-1"}  # two processes would get in each other's way on one GPU
DATA = f"--data_dir={ROOT / 'data'}"
NO_PICTURES = ("--PMLR=False", "--PRR=False")
FLAGS = ("--n_hidden=32", "--batch_size=1000", "--num_epochs=6", *NO_PICTURES, DATA)
N_EPOCHS = 6

# Two CPU devices stand for two GPUs. With z at its mean and neither dropout nor noise, nothing is random but
# the order of the digits, so two devices compute what one does. The weight decay is large, so that a weight
# which is decayed on one device but not on two would differ.
WEIGHT_DECAY = 1.0
SCRIPT = """
import sys
import run_main

run_main.start_tensorflow(run_main.parse_flags([]))
tf = run_main.tf
[cpu] = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
assert run_main.main([*sys.argv[1:], "--batch_size=501"]) == 2

make_batch = run_main.make_batch

def print_and_make_batch(images, labels, flags, seed):
    pixel_sum = tf.reduce_sum(tf.cast(images, tf.int64))
    n_labelled = tf.math.count_nonzero(labels >= 0)
    tf.print("batch", *tf.unstack(seed), len(images), n_labelled, pixel_sum, output_stream=sys.stdout)
    return make_batch(images, labels, flags, seed)

run_main.make_batch = print_and_make_batch
"""
DETERMINISTIC = f"""
run_main.vae.reparameterize = lambda mean, log_var, seed: mean
run_main.WEIGHT_DECAY = {WEIGHT_DECAY}
"""
RUN = "sys.exit(run_main.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def one_process(data_dir, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert run_main.main([*FLAGS, f"--results_path={folder}"]) == 0
    return folder


def cluster(n):
    """Returns the TF_CONFIG of each of n workers on this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    workers = [f"127.0.0.1:{server.getsockname()[1]}" for server in sockets]
    for server in sockets:
        server.close()
    tasks = [{"type": "worker", "index": index} for index in range(n)]
    return [{"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task})} for task in tasks]


def start_workers(program, folder, *flags, own_flags=((), ())):
    """Starts two workers with the same flags, and each with its own."""
    arguments = ("--distribute=multi_worker", "--results_path", folder, *flags)
    environments = [CPU_ONLY | task for task in cluster(2)]
    return [program(*arguments, *own, env=env) for own, env in zip(own_flags, environments, strict=True)]


def wait_for_line(process, beginning):
    """Reads what a process prints up to a line that begins so."""
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line begins with {beginning!r}")


def wait_for_success(workers):
    """Waits until two workers have succeeded, silently except for the chief; returns the chief's output."""
    outputs = [worker.communicate(timeout=120) for worker in workers]
    chief_output, chief_errors = outputs[0]
    assert chief_errors == ""
    assert outputs[1] == ("", "")
    assert [worker.returncode for worker in workers] == [0, 0]
    return chief_output


def log_without_seconds(folder):
    """Returns the rows of log.csv with all seconds replaced by 0."""
    return [row | {"seconds": 0} for row in read_log(folder)]


def read_checkpoint(folder, epoch):
    """Returns the arrays in a checkpoint but the history, which has seconds: {name: array}."""
    arrays = run_main.read_checkpoint(run_main.checkpoint_files(folder)[epoch])
    del arrays["history"]
    return arrays


def lose_worker(program, folder, flags, lost):
    """Trains with two workers and kills one of them after the first epoch; the other ends with one line."""
    workers = start_workers(program, folder, *flags)
    wait_for_line(workers[0], "epoch ")
    workers[lost].kill()
    survivor = workers[1 - lost]
    _, err = survivor.communicate(timeout=120)
    workers[lost].communicate()
    assert survivor.returncode == 2
    assert "lost another worker" in one_line(err)
    assert 1 <= len(read_log(folder)) < N_EPOCHS


def test_resume_after_losing_each_worker_is_bitwise_reproducible(program, one_process, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    resumed = tmp_path / "resumed"
    wait_for_success(start_workers(program, undisturbed, *FLAGS))
    lose_worker(program, resumed, FLAGS, lost=1)
    lose_worker(program, resumed, ["--resume"], lost=0)
    output = wait_for_success(start_workers(program, resumed, "--resume"))
    assert "using the state after epoch" in output

    log = log_without_seconds(undisturbed)
    assert log_without_seconds(resumed) == log
    for epoch in run_main.checkpoint_files(undisturbed):
        expected = read_checkpoint(undisturbed, epoch)
        arrays = read_checkpoint(resumed, epoch)
        assert arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(arrays[name], array)
    assert (resumed / "metrics.json").read_bytes() == (undisturbed / "metrics.json").read_bytes()
    # Two workers train as well as one process, and write the same files.
    # With other random numbers, runs of this small network differ by up to 2 nats.
    assert log[-1]["valid_elbo"] == pytest.approx(read_log(one_process)[-1]["valid_elbo"], abs=3)
    assert names(resumed) == names(one_process)
    assert names(resumed / "checkpoint") == names(one_process / "checkpoint")


def test_two_devices_compute_what_one_does(program, mnist, monkeypatch, tmp_path):
    """Losses, weights and momenta agree; each device has its half of every mini-batch and its own seeds."""
    script = tmp_path / "two_devices.py"
    script.write_text(SCRIPT + DETERMINISTIC + RUN)
    flags = (*SMALL, "--num_epochs=1", "--keep_prob=1", *NO_PICTURES, DATA)
    two_flags = (*flags, "--distribute=mirrored", "--results_path=two")
    two = program(*two_flags, script=script, env=CPU_ONLY | {"PYTHONPATH": str(ROOT)})
    monkeypatch.setattr(vae, "reparameterize", lambda mean, log_var, seed: mean)
    monkeypatch.setattr(run_main, "WEIGHT_DECAY", WEIGHT_DECAY)
    assert run_main.main([*flags, f"--results_path={tmp_path / 'one'}"]) == 0
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert "--batch_size 501" in one_line(err)

    [expected_row] = log_without_seconds(tmp_path / "one")
    assert log_without_seconds(tmp_path / "two") == [pytest.approx(expected_row, rel=1e-3)]
    expected = read_checkpoint(tmp_path / "one", 1)
    arrays = read_checkpoint(tmp_path / "two", 1)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=0.01 * np.abs(array).max(initial=0))

    seeds = set()
    pixel_sums = []
    for line in out.splitlines():
        if line.startswith("batch "):
            *seed, n_images, _, pixel_sum = line.split()[1:]
            if n_images == "250":  # not the validation or test digits
                seeds.add(tuple(seed))
                pixel_sums.append(int(pixel_sum))
    assert len(pixel_sums) == len(seeds) == 2 * (55_000 // 500)
    assert sum(pixel_sums) == mnist.train_images.sum(dtype=np.int64)


def test_two_devices_share_the_labelled_digits(program, data_dir, tmp_path):
    """A quarter of --batch_size is added to each mini-batch, and each device has half of it."""
    script = tmp_path / "two_devices.py"
    script.write_text(f'{SCRIPT}\nassert run_main.main([*sys.argv[1:], "--batch_size=1002"]) == 2\n{RUN}')
    model = ("--model=conditional", "--n_labels=10", "--n_hidden=8", "--num_epochs=1")
    flags = (*model, *NO_PICTURES, DATA, "--distribute=mirrored", "--results_path=two")
    run = program(*flags, "--batch_size=1000", script=script, env=CPU_ONLY | {"PYTHONPATH": str(ROOT)})
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "251 labelled digits" in err
    batches = [line.split() for line in out.splitlines() if line.startswith("batch ")]
    n_labelled = [int(batch[-2]) for batch in batches if batch[-3] == "625"]
    assert len(n_labelled) == 2 * 55
    assert all(125 <= n <= 130 for n in n_labelled)
    assert read_log(tmp_path / "two")[0]["valid_elbo"] < -100


def test_workers_with_different_flags_are_rejected(program, one_process, tmp_path):
    before = files(one_process)
    own_flags = [("--seed=1",), ("--seed=2",)]
    workers = start_workers(program, one_process, *FLAGS, "--overwrite", own_flags=own_flags)
    errors = [one_line(worker.communicate(timeout=120)[1]) for worker in workers]
    assert any("different flags" in error for error in errors)
    assert [worker.returncode for worker in workers] == [2, 2]
    assert files(one_process) == before


def test_invalid_address_is_a_user_error(program, data_dir, tmp_path):
    config = {"TF_CONFIG": '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}'}
    run = program(DATA, "--distribute=multi_worker", "--results_path=run", env=CPU_ONLY | config)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 2
    assert_mentions(one_line(err), "TF_CONFIG")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_stops_waiting_for_the_other_workers(program, data_dir, tmp_path):
    env = CPU_ONLY | cluster(2)[0]
    run = program(DATA, "--distribute=multi_worker", "--results_path=run", env=env)
    wait_for_line(run, "waiting for the other workers")
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    assert run.returncode == -signal.SIGINT
    assert err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        "[]",
        "{}",
        '{"cluster": {"worker": ["a:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": "0"}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": -1}}',
        '{"cluster": {"worker": "a:1"}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}',
        '{"cluster": ["a:1"], "task": {"type": "worker", "index": 0}}',
    ],
)
def test_malformed_tf_config_is_a_user_error(config, data_dir, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    assert run_main.main(["--distribute=multi_worker", DATA]) == 2
    assert "TF_CONFIG" in one_line(capsys.readouterr().err)
    assert not [*tmp_path.iterdir()]


def chiefs(monkeypatch, jobs):
    """Returns which tasks of a cluster take themselves for the chief: (job, index) each."""
    flags = run_main.Flags(distribute="multi_worker")
    found = []
    for job, addresses in jobs.items():
        for index in range(len(addresses)):
            config = {"cluster": jobs, "task": {"type": job, "index": index}}
            monkeypatch.setenv("TF_CONFIG", json.dumps(config))
            if run_main.is_chief(flags):
                found.append((job, index))
    return found


def test_chief_selection(monkeypatch):
    assert chiefs(monkeypatch, {"worker": ["b:1", "c:1"]}) == [("worker", 0)]
    assert chiefs(monkeypatch, {"chief": ["a:1"], "worker": ["b:1", "c:1"]}) == [("chief", 0)]
