"""Training split over devices and machines: it learns as well, resumes to the same bits, and never hangs."""

import json
import signal
import socket

import conftest
import numpy as np
import pytest

import run_main
import vae

CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "-1"}  # two processes would get in each other's way on one GPU
DATA = f"--data_dir={conftest.ROOT / 'data'}"
FLAGS = ("--n_hidden=32", "--batch_size=1000", "--num_epochs=6", "--PMLR=False", "--PRR=False", DATA)

# Two CPU devices stand for two GPUs. With z at its mean and neither dropout nor noise, nothing random is left
# but the order of the digits, so that two devices have to do what one does.
TWO_DEVICES = """
import sys
import run_main

def spy(images, flags, seed):
    digits = tf.reduce_sum(tf.cast(images, tf.int64))
    tf.print("drawn", *tf.unstack(seed), len(images), digits, output_stream=sys.stdout)
    return prepare(images, flags, seed)

run_main.load_tensorflow(run_main.parse_flags([]))
import vae
tf = run_main.tf
device, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
assert run_main.main([*sys.argv[1:], "--batch_size=501"]) == 2
prepare, run_main.prepare = run_main.prepare, spy
vae.reparameterize = lambda mean, log_var, seed: mean
sys.exit(run_main.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def one(data_dir, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert run_main.main([*FLAGS, f"--results_path={folder}"]) == 0
    return folder


@pytest.fixture
def python(program, tmp_path):
    """A function that starts a Python program, given as a string, with flags."""

    def start(code, *flags, env=None):
        script = tmp_path / "script.py"
        script.write_text(code)
        return program(*flags, script=script, env={"PYTHONPATH": str(conftest.ROOT)} | CPU_ONLY | (env or {}))

    return start


def cluster(n):
    """Returns the TF_CONFIG of each of n workers on this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    workers = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    tasks = [{"type": "worker", "index": index} for index in range(n)]
    return [{"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task})} for task in tasks]


def start_workers(program, folder, *flags, each=((), ())):
    """Starts two workers with the flags, and each with some of its own."""
    arguments = ("--distribute=multi_worker", "--results_path", folder, *flags)
    environments = [CPU_ONLY | task for task in cluster(2)]
    return [program(*arguments, *own, env=env) for own, env in zip(each, environments, strict=True)]


def finish(workers):
    """Waits for two workers to end well; returns what the chief, the first, says."""
    (out, err), other = (worker.communicate(timeout=120) for worker in workers)
    assert (err, other) == ("", ("", ""))
    assert [worker.returncode for worker in workers] == [0, 0]
    return out


def log(folder):
    """Returns the rows of log.csv, without the seconds."""
    return [row | {"seconds": 0} for row in conftest.read_log(folder)]


def test_each_of_two_workers_dies_and_both_resume(program, one, tmp_path):
    """The survivor ends with one line, and what is resumed ends in the bits of workers that never died."""
    died, alive = tmp_path / "died", tmp_path / "alive"
    finish(start_workers(program, alive, *FLAGS))
    for victim, flags in ((1, FLAGS), (0, ["--resume"])):
        workers = start_workers(program, died, *flags)
        for line in workers[0].stdout:
            if line.startswith("epoch "):
                workers[victim].kill()
                break
        _, err = workers[1 - victim].communicate(timeout=120)
        workers[victim].communicate()
        assert workers[1 - victim].returncode == 2
        assert "another worker is gone" in conftest.one_line(err)
        assert 1 <= len(log(died)) < 6
    assert "taking the state after epoch" in finish(start_workers(program, died, "--resume"))

    assert log(died) == log(alive)
    for epoch, path in run_main.checkpoints(alive).items():
        with np.load(path) as expected, np.load(run_main.checkpoints(died)[epoch]) as arrays:
            assert set(arrays) == set(expected)
            for name in set(expected) - {"history"}:  # the log, with seconds
                np.testing.assert_array_equal(arrays[name], expected[name])
    assert (died / "metrics.json").read_bytes() == (alive / "metrics.json").read_bytes()
    # They train as well as one process, and leave the same files.
    assert log(alive)[-1]["valid_elbo"] == pytest.approx(log(one)[-1]["valid_elbo"], abs=1.5)
    assert {path.name for path in died.rglob("*")} == {path.name for path in one.rglob("*")}


def test_two_devices_do_what_one_does(python, mnist, monkeypatch, tmp_path):
    """Each takes its half of a mini-batch and draws random numbers of its own; the gradients are added up."""
    flags = (*conftest.SMALL, "--num_epochs=1", "--keep_prob=1", "--PMLR=False", "--PRR=False", DATA)
    two = python(TWO_DEVICES, *flags, "--distribute=mirrored", "--results_path=two")
    monkeypatch.setattr(vae, "reparameterize", lambda mean, log_var, seed: mean)
    assert run_main.main([*flags, f"--results_path={tmp_path / 'one'}"]) == 0
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0, err
    assert "--batch_size 501" in conftest.one_line(err)
    assert log(tmp_path / "two")[0] == pytest.approx(log(tmp_path / "one")[0], rel=1e-3)

    drawn = [line.split()[1:] for line in out.splitlines() if line.startswith("drawn")]
    drawn = [(*seed, int(digits)) for *seed, n, digits in drawn if n == "250"]  # not of the evaluation
    assert len(drawn) == len({tuple(seed) for *seed, _ in drawn}) == 2 * (55_000 // 500)
    assert sum(digits for *_, digits in drawn) == mnist.train_images.sum(dtype=np.int64)


def test_workers_with_other_flags_leave_an_old_run_alone(program, one, tmp_path):
    before = conftest.files(one)
    workers = start_workers(program, one, *FLAGS, "--overwrite", each=[("--seed=1",), ("--seed=2",)])
    errors = [conftest.one_line(worker.communicate(timeout=120)[1]) for worker in workers]
    assert any("different flags" in error for error in errors)
    assert [worker.returncode for worker in workers] == [2, 2]
    assert conftest.files(one) == before


def test_a_worker_waits_neither_at_a_wrong_address_nor_after_ctrl_c(program, data_dir, tmp_path):
    wrong = {"TF_CONFIG": '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}'}
    flags = (DATA, "--distribute=multi_worker", f"--results_path={tmp_path / 'run'}")
    runs = [program(*flags, env=CPU_ONLY | env) for env in (wrong, cluster(2)[0])]
    for line in runs[1].stdout:
        if line.startswith("waiting for the other workers"):
            runs[1].send_signal(signal.SIGINT)
            break
    (_, wrong_address), (_, alone) = (run.communicate(timeout=120) for run in runs)
    assert "TF_CONFIG" in conftest.one_line(wrong_address)
    assert [run.returncode for run in runs] == [2, -signal.SIGINT]
    assert alone == ""
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
def test_a_cluster_that_is_none_is_one_line(config, data_dir, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    assert run_main.main(["--distribute=multi_worker", DATA]) == 2
    assert "TF_CONFIG" in conftest.one_line(capsys.readouterr().err)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("job", ["chief", "worker"])
def test_the_chief_is_who_is_named_so_or_the_first_worker(monkeypatch, job):
    jobs = {"chief": ["a:1"], "worker": ["b:1", "c:1"]} if job == "chief" else {"worker": ["b:1", "c:1"]}
    flags = run_main.parse_flags([])
    flags.distribute = "multi_worker"
    chiefs = []
    for name, addresses in jobs.items():
        for index in range(len(addresses)):
            config = {"cluster": jobs, "task": {"type": name, "index": index}}
            monkeypatch.setenv("TF_CONFIG", json.dumps(config))
            if run_main.is_chief(flags):
                chiefs.append((name, index))
    assert chiefs == [(job, 0)]
