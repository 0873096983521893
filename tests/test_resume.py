"""Nothing is lost: killed runs go on to the same bits, and what is on disk is safe from faults."""

import fcntl
import json
import os
import random
import resource
import shutil
import subprocess

import conftest
import numpy as np
import pytest
from PIL import Image
from test_run_main import FLAGS, few, read_log

import run_main

run_main.import_tensorflow()
tf, vae = run_main.tf, run_main.vae


def final_state(folder):
    """Returns all that a run leaves behind and that its flags determine: all but the seconds."""
    log = [{**row, "seconds": None} for row in read_log(folder)]
    reader = tf.train.load_checkpoint(str(folder / "checkpoint" / f"epoch-{len(log)}"))
    names = [
        name for name in reader.get_variable_to_shape_map() if "history" not in name and "GRAPH" not in name
    ]
    state = {name: reader.get_tensor(name).tobytes() for name in names}
    assert len(state) >= 2 * 12 + 2  # weights and momenta, the mean image, the number of steps
    state |= {path.name: path.read_bytes() for path in folder.glob("*.png")}
    return state | {"log": log, "metrics": (folder / "metrics.json").read_text()}


def differences(one, other):
    return [name for name in one | other if one.get(name) != other.get(name)]


def test_same_flags_same_bits_and_another_seed_others(program, data_dir, tmp_path):
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        run = program(
            "--data_dir", data_dir, "--results_path", name, "--seed", seed, "--num_epochs", 2, *FLAGS
        )
        assert run.communicate()[1] == ""
    one, again, other = (final_state(tmp_path / name) for name in ("one", "again", "other"))
    assert differences(one, again) == []
    same = set(one) - set(differences(one, other))
    # Every run has the same mean image, number of steps, no frames, and picture of the test digits.
    assert len(same) <= 4, same


def test_killed_at_random_moments_and_resumed_ends_in_the_same_bits(program, data_dir, tmp_path):
    flags = ["--data_dir", data_dir, "--num_epochs", 20, "--keep_prob", 0.8, *FLAGS]
    undisturbed = program(*flags, "--results_path", "undisturbed")
    assert undisturbed.communicate()[1] == ""
    rng = random.Random(0)
    run = program(*flags, "--results_path", "killed")
    kills = 0
    while kills < 5:
        for line in run.stdout:  # there is a run to resume as soon as it loads TensorFlow
            if line.startswith(("loading", "taking", "epoch")) and rng.random() < 0.5:
                break
        try:
            run.wait(timeout=rng.uniform(0, 1.5))
            break
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            kills += 1
        run = program("--results_path", "killed", "--resume")
    _, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    assert kills >= 3
    assert differences(final_state(tmp_path / "undisturbed"), final_state(tmp_path / "killed")) == []
    left = {path.name for path in (tmp_path / "killed").rglob("*")}
    assert left == {path.name for path in (tmp_path / "undisturbed").rglob("*")}


@pytest.fixture
def trained(mnist, tmp_path, console):
    """A function that trains in a folder, anew or resumed; returns the final weights."""

    def train(folder, num_epochs, *more, resume=False, other=None):
        flags = [*FLAGS, "--PRR=False", "--PMLR=False", "--num_epochs", str(num_epochs), *more]
        flags = run_main.parse_flags(flags)
        flags.resume = resume
        data = few(mnist, 1_000, flags)
        (tmp_path / folder).mkdir(exist_ok=True)
        flags.results_path = tmp_path / folder
        strategy, state = conftest.build(data, flags)
        state = other or state
        evaluate = run_main.make_evaluate(state.network, flags)
        run_main.train(strategy, state, evaluate, data, flags, tmp_path / folder, console)
        return [weight.numpy() for weight in state.network.weights]

    return train


def flip(content, position):
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "bit-flipped": lambda content: flip(content, len(content) // 2),
}


def test_damaged_checkpoint_falls_back_to_the_one_before(trained, tmp_path, console):
    good = trained("run", 3)
    path = tmp_path / "run" / "checkpoint" / "epoch-3.data-00000-of-00001"
    path.write_bytes(DAMAGE["bit-flipped"](path.read_bytes()))
    weights = trained("run", 3, resume=True)
    assert console.lines[3].startswith("the checkpoint of epoch 3 is damaged")
    assert console.lines[3].endswith("taking the state after epoch 2")
    assert all(map(np.array_equal, weights, good))
    assert [row["epoch"] for row in read_log(tmp_path / "run")] == [1, 2, 3]


def test_no_damage_gets_into_the_weights(trained, tmp_path, console):
    good = trained("run", 2)
    network = vae.VAE(2, 64, np.zeros(784), seed=1)
    optimizer = run_main.make_optimizer(run_main.parse_flags([*FLAGS]), 4, network.trainable_variables)
    state = run_main.make_state(network, optimizer)
    rng = random.Random(0)
    for path in (tmp_path / "run" / "checkpoint").glob("epoch-2.*"):
        content = path.read_bytes()
        for name, damage in DAMAGE.items():
            path.write_bytes(damage(content))
            assert len(run_main.restore_checkpoint(state, tmp_path / "run", console)) == 1, (path, name)
            assert "epoch 2 is damaged" in console.lines[-1]
        for _ in range(40):
            path.write_bytes(flip(content, rng.randrange(len(content))))
            history = run_main.restore_checkpoint(state, tmp_path / "run", console)
            if len(history) == 2:  # a byte that nothing is read from
                assert all(map(np.array_equal, (weight.numpy() for weight in network.weights), good))
            else:
                assert len(history) == 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    "more",
    [["--optimizer", "adam"], ["--add_noise"], ["--binarize"], ["--PMLR", "--animate"]],
    ids=lambda flags: flags[-1],
)
def test_other_states_are_restored_too(trained, tmp_path, more):
    good = trained("run", 3, *more)
    pictures = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*g*")}
    for path in (tmp_path / "run" / "checkpoint").glob("epoch-3.*"):
        path.unlink()
    assert all(map(np.array_equal, good, trained("run", 3, *more, resume=True)))
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*g*")} == pictures
    if "--animate" in more:
        assert Image.open(tmp_path / "run" / "manifold.gif").n_frames == 3


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize(
    "moment", ["temporary files", "data without index", "index under its temporary name"]
)
def test_killed_while_a_checkpoint_is_written(trained, tmp_path, epoch, moment):
    """Every state that TensorFlow's writing goes through, made by hand."""
    good = trained("run", 3)
    checkpoint = tmp_path / "run" / "checkpoint"
    if epoch == 1:
        shutil.rmtree(tmp_path / "run")
        trained("run", 1)
        (tmp_path / "run" / "log.csv").unlink()
    index, data = (checkpoint / f"epoch-{epoch}.{suffix}" for suffix in ("index", "data-00000-of-00001"))
    if moment == "temporary files":
        (checkpoint / f"epoch-{epoch}_temp").mkdir()
        data.rename(checkpoint / f"epoch-{epoch}_temp" / "part-00000-of-00001.data-00000-of-00001")
        index.unlink()
    elif moment == "data without index":
        index.unlink()
    else:
        index.rename(f"{index}.tempstate1234567890")
    weights = trained("run", 3, resume=True)
    assert all(map(np.array_equal, weights, good))
    complete = {f"epoch-{n}.{suffix}" for n in (2, 3) for suffix in ("index", "data-00000-of-00001")}
    assert {path.name for path in checkpoint.iterdir()} == complete


def test_a_refused_resume_changes_nothing(program, data_dir, tmp_path):
    run = program("--data_dir", data_dir, "--results_path", "out", "--num_epochs", 1, *FLAGS)
    run.communicate()
    shutil.rmtree(tmp_path / "out" / "checkpoint")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run = program("--results_path", "out", "--resume", "--num_epochs", 5)
    _, err = run.communicate()
    assert (run.returncode, err.count("\n")) == (1, 1)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_lost_checkpoints_are_not_taken_for_a_new_run(trained, tmp_path):
    trained("run", 1)
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    log = (tmp_path / "run" / "log.csv").read_text()
    with pytest.raises(run_main.UserError, match="gone"):
        trained("run", 2, resume=True)
    assert (tmp_path / "run" / "log.csv").read_text() == log


def test_no_good_checkpoint_is_one_error(trained, tmp_path):
    trained("run", 2)
    for path in (tmp_path / "run" / "checkpoint").glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(run_main.UserError, match=r"epoch 2 is damaged.*epoch 1 is damaged.*another folder"):
        trained("run", 3, resume=True)


def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path):
    trained("run", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    narrower = vae.VAE(2, 32, np.zeros(784), seed=0)
    deeper = vae.VAE(2, 64, np.zeros(784), seed=0)
    deeper.another_layer = run_main.keras.layers.Dense(3)
    deeper.another_layer.build((None, 64))
    for network in (narrower, deeper):
        optimizer = run_main.make_optimizer(run_main.parse_flags([*FLAGS]), 4, network.trainable_variables)
        other = run_main.make_state(network, optimizer)
        with pytest.raises(run_main.UserError, match="does not fit the network"):
            trained("run", 2, resume=True, other=other)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before


def test_resuming_a_finished_run_remakes_its_pictures(trained, tmp_path, console):
    weights = trained("run", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    for path in (tmp_path / "run").glob("*.png"):
        path.unlink()
    (tmp_path / "run" / "log.csv").unlink()
    assert all(map(np.array_equal, weights, trained("run", 2, resume=True)))
    (tmp_path / "run" / "config.json").unlink()  # a resumed run writes it; of a new one, the program does
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == before


def test_an_animation_goes_on_and_begins_anew_where_its_size_changes(trained, tmp_path):
    def frames():
        return Image.open(tmp_path / "run" / "manifold.gif").n_frames

    trained("run", 2, "--PMLR", "--animate")
    trained("run", 3, "--PMLR", "--animate", resume=True)
    assert frames() == 3
    trained("run", 5, "--PMLR", "--animate", "--PMLR_n_img_x", "10", resume=True)
    assert frames() == 2
    trained("run", 6, resume=True)
    assert not (tmp_path / "run" / "manifold.gif").exists()


@pytest.mark.parametrize("name", ["generated.npz", "reconstructed.png"])
def test_resume_keeps_what_was_made_before(a_run, name, tmp_path):
    (a_run / name).write_text("made before")
    for more in (["--n_generate", "3"], ["--reconstruct", "mine.npy"]):
        flags = run_main.parse_flags(["--resume", "--results_path", str(a_run), *more])
        asked = flags.n_generate if name == "generated.npz" else flags.reconstruct
        if asked:
            with pytest.raises(run_main.FlagError, match=f"{name} is there already: move it away"):
                run_main.take_folder(flags)
    assert (a_run / name).read_text() == "made before"


def test_more_epochs_go_on_along_the_longer_schedule(trained, tmp_path):
    trained("run", 2)
    trained("run", 4, resume=True)
    log = read_log(tmp_path / "run")
    rate = run_main.LEARN_RATE["sgd"]
    assert [row["learn_rate"] for row in log] == pytest.approx(
        [rate, rate * (1 + np.cos(np.pi / 2)) / 2, rate / 2, rate * (1 + np.cos(3 * np.pi / 4)) / 2], rel=1e-4
    )


# --- flags and folders -------------------------------------------------------------------------------


THEIRS = {"notes.txt", "best.png", "mine.part", "input.png.part"}
THEIRS |= {"checkpoint/mine", "checkpoint/epoch-3.keep.zip", "checkpoint/epoch-9-best"}


@pytest.fixture
def a_run(tmp_path):
    """The folder of a run as far as flags are concerned, and a file of the user's in it."""
    folder = tmp_path / "run"
    (folder / "checkpoint").mkdir(parents=True)
    flags = run_main.parse_flags(["--dim_z", "5", "--learn_rate", "0.1", "--results_path", str(folder)])
    run_main.write_json(folder / "config.json", run_main.configuration(flags))
    for name in ("log.csv", "input.png", "input.png.1234abcd.part", "checkpoint/epoch-3.index"):
        (folder / name).write_text("ours")
    (folder / "checkpoint" / "epoch-3_temp").mkdir()
    for name in THEIRS:
        (folder / name).write_text("theirs")
    return folder


def test_resume_takes_the_runs_flags_and_some_anew(a_run):
    flags = run_main.parse_flags(
        ["--resume", "--results_path", str(a_run), "--num_epochs", "30", "--PRR", "False"]
    )
    assert (flags.dim_z, flags.learn_rate, flags.num_epochs, flags.PRR) == (5, 0.1, 30, False)
    assert (flags.PMLR, flags.resume) == (False, True)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dim_z 7", ["--dim_z", "7", "5"]),
        ("--learn_rate 0.2", ["--learn_rate", "0.2", "0.1"]),
        ("--optimizer adam", ["--optimizer", "adam", "sgd"]),
        ("--add_noise", ["--add_noise", "True", "False"]),
        ("--num_epochs 2", ["--num_epochs 2", "3"]),
        ("--overwrite", ["--resume", "--overwrite"]),
        ("--results_path elsewhere", ["--results_path elsewhere", "config.json"]),
        ("--results_path=", ["--results_path"]),
    ],
)
def test_resume_refuses_by_name(a_run, capsys, flags, words):
    with pytest.raises(SystemExit) as exit_:
        run_main.parse_flags(["--resume", "--results_path", str(a_run), *flags.split()])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert [word for word in words if word not in err] == []


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_resume_and_overwrite_need_a_folder(capsys, flag):
    with pytest.raises(SystemExit):
        run_main.parse_flags([flag])
    assert "--results_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"flags": 3}', '{"flags": {"dim_z": "x"}}', "\xff"]
)
def test_a_damaged_config_is_refused_in_a_line(a_run, capsys, content):
    (a_run / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(SystemExit) as exit_:
        run_main.parse_flags(["--resume", "--results_path", str(a_run)])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(a_run):
    run_main.take_folder(run_main.parse_flags(["--results_path", str(a_run), "--overwrite"]))
    run_main.remove_run(a_run)
    left = {str(path.relative_to(a_run)): path for path in a_run.rglob("*") if path.is_file()}
    assert set(left) == THEIRS | {
        "config.json"
    }  # which says whose folder it is, until the new one replaces it
    assert {left[name].read_text() for name in THEIRS} == {"theirs"}


def test_overwrite_does_not_take_a_users_file_for_a_runs(tmp_path):
    for name, content in (("input.png", "theirs"), ("config.json", '{"model_type": "bert"}')):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(run_main.FlagError, match=name):
            run_main.take_folder(run_main.parse_flags(["--results_path", str(folder), "--overwrite"]))
        assert (folder / name).read_text() == content


def test_a_folder_another_program_works_in_is_refused(program, tmp_path):
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    run = program("--results_path", "out")
    _, err = run.communicate()
    os.close(held)
    assert run.returncode == 2
    assert err.count("\n") == 1
    assert "another program" in err


def test_programs_that_start_at_once_take_different_folders(program, data_dir):
    runs = [program("--data_dir", data_dir) for _ in range(4)]
    folders = {run.stdout.readline().split(":")[0] for run in runs}
    for run in runs:
        run.kill()
        run.communicate()
    assert folders == {f"results/run{n}" for n in range(1, 5)}


# --- faults ------------------------------------------------------------------------------------------


def test_full_disk_is_one_error_and_the_last_good_state_stays(program, data_dir, tmp_path):
    """A limit on the size of a file stands in for the disk: the checkpoint is the largest."""
    flags = ["--data_dir", data_dir, "--results_path", "out", *FLAGS]
    assert program(*flags, "--num_epochs", 2).wait() == 0
    good = {path: path.read_bytes() for path in (tmp_path / "out").rglob("epoch-2.*")}
    limit = 700_000
    assert max(map(len, good.values())) > limit

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = program("--results_path", "out", "--resume", "--num_epochs", 3, preexec_fn=full)
    _, err = run.communicate()
    assert run.returncode == 1
    assert err.count("\n") == 1
    assert "checkpoint of epoch 3" in err
    assert {path: path.read_bytes() for path in good} == good
    run = program("--results_path", "out", "--resume")
    assert (run.communicate()[1], run.returncode) == ("", 0)
    assert len(read_log(tmp_path / "out")) == 3


@pytest.mark.parametrize("name", ["log.csv", "input.png", "config.json"])
def test_full_disk_names_the_file(monkeypatch, tmp_path, capsys, data_dir, name):
    monkeypatch.chdir(tmp_path)
    write = run_main.mnist_data.write_whole

    def full(path, content):
        if path.name == name:
            monkeypatch.setattr(type(path), "open", no_space)
        write(path, content)

    def no_space(path, mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_main.mnist_data, "write_whole", full)
    assert run_main.main(["--data_dir", str(data_dir), "--num_epochs", "1", *FLAGS]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "No space left" in err
    assert f"results/run1/{name}" in err
    assert list((tmp_path / "results" / "run1").glob("*.part")) == []


def test_read_only_data_are_enough(data_dir, console, monkeypatch):
    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")

    for method in ("write_bytes", "mkdir", "rename", "replace", "unlink"):
        monkeypatch.setattr(run_main.Path, method, read_only)
    assert len(run_main.mnist_data.load_mnist(data_dir, console).test_images) == 10_000


# --- every numeric flag ------------------------------------------------------------------------------

WHOLE = ("dim_z", "n_hidden", "num_epochs", "batch_size", "seed", "PMLR_n_samples")
WHOLE += ("PRR_n_img_x", "PRR_n_img_y", "PMLR_n_img_x", "PMLR_n_img_y")
REAL = ("keep_prob", "learn_rate", "noise_level", "PRR_resize_factor", "PMLR_resize_factor", "PMLR_z_range")
BAD = ("0", "-1", "nan", "inf", "-inf", "1e400", "word", "")


def test_the_table_has_every_numeric_flag():
    flags = vars(run_main.parse_flags([]))
    numeric = {name for name, value in flags.items() if type(value) in (int, float)}
    assert numeric == {*WHOLE, *REAL}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("flag", [*WHOLE, *REAL])
def test_bad_numbers_are_one_line(capsys, flag, value):
    arguments = ["--add_noise", f"--{flag}={value}"]
    if (flag, value) == ("seed", "0"):
        assert run_main.parse_flags(arguments).seed == 0
        return
    with pytest.raises(SystemExit) as exit_:
        run_main.parse_flags(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"--{flag}" in err
    assert repr(value) in err
    assert ("whole number from" if flag in WHOLE else "finite number greater than") in err


def test_config_holds_every_flag(a_run):
    flags = json.loads((a_run / "config.json").read_text())["flags"]
    assert set(flags) == set(vars(run_main.parse_flags([])))
