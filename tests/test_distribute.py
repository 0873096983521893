"""Training split over devices and machines: the same as on one, quiet, and never hanging."""

import json
import re
import socket
import subprocess
import sys
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
from test_run_main import FLAGS, read_log

import run_main

run_main.import_tensorflow()

CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "-1"}  # two processes would get in each other's way on one GPU
STEPS = ("--batch_size", "64", "--n_hidden", "48", "--add_noise", "--binarize")  # draws of every kind


def cluster(n):
    """Returns the TF_CONFIG of each of n workers on this machine."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    workers = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    tasks = [{"type": "worker", "index": index} for index in range(n)]
    return [{"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task})} for task in tasks]


def test_replicas_follow_the_trajectory_of_one(program, data_dir, tmp_path):
    def ten_steps(name, distribute, env=None):
        script = conftest.ROOT / "tests" / "ten_steps.py"
        arguments = (data_dir, f"{name}.npz", "--distribute", distribute, *STEPS)
        return program(*arguments, script=script, env=CPU_ONLY | (env or {}))

    runs = [ten_steps("one", "none"), ten_steps("devices", "mirrored")]
    runs += [ten_steps(f"worker_{i}", "multi_worker", env) for i, env in enumerate(cluster(2))]
    for run in runs:
        assert (*run.communicate(timeout=300), run.returncode)[1:] == ("", 0)
    one, *others = (np.load(tmp_path / f"{name}.npz") for name in ("one", "devices", "worker_0", "worker_1"))
    assert (one["n_replicas"], *(other["n_replicas"] for other in others)) == (1, 2, 2, 2)
    for other in others:
        assert set(other) == set(one)
        for name in set(one) - {"n_replicas"}:
            error = np.linalg.norm(other[name] - one[name]) / np.linalg.norm(one[name])
            assert error < 1e-4, name


def test_replicas_draw_different_numbers(monkeypatch):
    """The rows of a replica are those of its images, not the first ones again."""
    tf = run_main.tf
    whole = tf.random.stateless_normal((6, 2), [1, 2])
    for i in range(2):
        replica = SimpleNamespace(num_replicas_in_sync=2, replica_id_in_sync_group=i)
        monkeypatch.setattr(tf.distribute, "get_replica_context", lambda replica=replica: replica)
        rows = slice(3 * i, 3 * i + 3)
        np.testing.assert_array_equal(run_main.vae.own_rows(tf.range(6)), np.arange(6)[rows])
        drawn = run_main.vae.draw_rows(tf.random.stateless_normal, (3, 2), [1, 2])
        np.testing.assert_array_equal(drawn, whole[rows])


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
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}',
        '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": [1]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": ["a:1"], "task": {"type": "worker", "index": 0}}',
    ],
)
def test_a_cluster_that_is_none_is_one_line(config, monkeypatch, capsys):
    if config is None:
        monkeypatch.delenv("TF_CONFIG", raising=False)
    else:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(SystemExit) as end:
        run_main.parse_flags(["--distribute", "multi_worker"])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "TF_CONFIG" in err
    assert run_main.parse_flags([]).distribute == "none"  # which needs no cluster


@pytest.mark.parametrize("chief", [False, True])
def test_the_chief_is_the_first_worker_or_who_is_named_so(monkeypatch, chief):
    jobs = {"chief": ["a:1"], "worker": ["b:1", "c:1"]} if chief else {"worker": ["b:1", "c:1"]}
    flags = run_main.parse_flags([])
    flags.distribute = "multi_worker"
    chiefs = []
    for job, addresses in jobs.items():
        for index in range(len(addresses)):
            config = {"cluster": jobs, "task": {"type": job, "index": index}}
            monkeypatch.setenv("TF_CONFIG", json.dumps(config))
            if run_main.is_chief(flags):
                chiefs.append((job, index))
    assert chiefs == [("chief" if chief else "worker", 0)]


def test_a_run_of_many_is_loaded_by_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_main.parse_flags(["--load", str(tmp_path), "--distribute", "mirrored"])
    assert capsys.readouterr().err.count("\n") == 1


def start_workers(program, data_dir, *flags, each=((), ())):
    """Starts two workers with the flags, and each with some of its own."""
    arguments = ("--data_dir", data_dir, "--distribute", "multi_worker", "--results_path", "run", *flags)
    environments = [CPU_ONLY | task for task in cluster(2)]
    return [program(*arguments, *own, env=env) for own, env in zip(each, environments, strict=True)]


def test_two_workers_survive_the_death_of_each(program, data_dir, tmp_path):
    """One of two is killed, then, in the resumed run, the other; the third run ends as one worker's would."""
    flags = (*FLAGS, "--num_epochs", "8", "--PMLR=False", "--PRR=False")
    for victim, how in ((1, flags), (0, ["--resume"])):
        workers = start_workers(program, data_dir, *how)
        survivor = workers[1 - victim]
        for line in workers[0].stdout:
            if line.startswith("epoch "):
                workers[victim].kill()
                break
        _, err = survivor.communicate(timeout=120)
        workers[victim].communicate()
        assert survivor.returncode == 1
        assert err.startswith("run_main.py: error: another worker is gone: start all of them again")
        assert err.count("\n") == 1
        assert read_log(tmp_path / "run")
    chief, other = start_workers(program, data_dir, "--resume")
    out, err = chief.communicate(timeout=300)
    assert (other.communicate(timeout=60), other.returncode) == (("", ""), 0)
    assert (err, chief.returncode) == ("", 0)
    assert re.search(r"taking the state after epoch [2-7]\n", out)
    assert out.count("test ELBO") == 1
    one = program("--data_dir", data_dir, "--results_path", "one", *flags)
    one.communicate()
    together, alone = read_log(tmp_path / "run"), read_log(tmp_path / "one")
    assert [row["epoch"] for row in together] == list(range(1, 9))
    for rows in zip(together, alone, strict=True):
        elbos = [row["train_elbo"] for row in rows]
        assert elbos[0] == pytest.approx(elbos[1], abs=0.2)
    files = ({path.name for path in (tmp_path / name).iterdir()} for name in ("run", "one"))
    assert next(files) == next(files)


def test_workers_that_do_not_fit_leave_an_old_run_alone(program, data_dir, tmp_path):
    """Other flags or a batch that cannot be split: both end with one line, before --overwrite acts."""
    first = program("--data_dir", data_dir, "--results_path", "run", *FLAGS, "--num_epochs", "1")
    first.communicate()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    assert before
    cases = {
        "the workers have not the same flags": [("--seed", "1"), ("--seed", "2")],
        "--batch_size 501 cannot be split over 2 replicas": [("--batch_size", "501")] * 2,
    }
    for problem, each in cases.items():
        for run in start_workers(program, data_dir, "--overwrite", each=each):
            _, err = run.communicate(timeout=120)
            assert problem in err
            assert err.count("\n") == 1
            assert run.returncode in (1, 2)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before


def test_a_worker_that_does_not_come_is_not_waited_for_without_end(data_dir, tmp_path):
    lines = [
        "import run_main, sys",
        "run_main.JOIN_SECONDS = 3",
        "sys.exit(run_main.main(sys.argv[1:]))",
    ]
    command = [sys.executable, "-c", "\n".join(lines), "--data_dir", str(data_dir)]
    environment = conftest.environment() | cluster(2)[0] | {"PYTHONPATH": str(conftest.ROOT)}
    command += ["--distribute", "multi_worker"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1].startswith("waiting for the other workers")
    assert run.stderr == ""
