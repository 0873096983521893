"""Nothing is lost: killed runs go on to the same bits, and what is on disk is safe from faults and flags."""

import contextlib
import json
import math
import random
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kills
import numpy as np
import pytest
from conftest import files, one_line, read_log
from kills import differences, what_is_left
from PIL import Image

import mnist_data
import run_main

FLAGS = ("--num_epochs=3", "--animate", "--PMLR_n_img_x=5", "--PMLR_n_img_y=5")
THEIRS = ("notes.txt", "best.png", "mine/input.png", "mine/.part-1.txt")
THEIRS += ("checkpoint/epoch-best.npz", "checkpoint/epoch-1.keep.npz", "checkpoint/notes.txt")


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The folder of a run, beside copies of it from right before each of its files came."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    replace = Path.replace

    def copy_and_replace(part, path):
        with contextlib.suppress(FileExistsError):  # log.csv comes again and again
            shutil.copytree(folder, folder.parent / f"before_{path.name}")
        return replace(part, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", copy_and_replace)
        assert run(*FLAGS, f"--results_path={folder}") == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


# --- kills --------------------------------------------------------------------------------------------


def test_killed_at_a_random_moment_and_resumed_ends_in_the_same_bits(data_dir, tmp_path):
    (tmp_path / "data").symlink_to(data_dir)  # with all digits, as the processes read it
    flags = (*kills.FLAGS, f"--data_dir={tmp_path / 'data'}", "--num_epochs=6")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_main.main, [*flags, f"--results_path={undisturbed}"])
        assert kills.train(killed, flags, 1, random.Random(16)) == 1  # half a second after epoch 2
    assert run.result() == 0
    assert differences(what_is_left(undisturbed), what_is_left(killed)) == []


@pytest.mark.parametrize(
    "name",
    ["config.json", "log.csv", "epoch-3.npz", "vae.keras"],
)
def test_killed_before_a_file_came_and_resumed_ends_in_the_same_bits(run, trained, tmp_path, name):
    folder = shutil.copytree(trained.parent / f"before_{name}", tmp_path / "run")
    assert [path.name[-len(name) :] for path in folder.rglob(".part-*")] == [name]
    begun = (folder / "config.json").exists()
    assert begun == (name != "config.json")
    assert run(f"--results_path={folder}", *(["--resume"] if begun else FLAGS)) == 0
    assert differences(what_is_left(folder), what_is_left(trained)) == []


def test_other_states_are_restored_too(run, tmp_path):
    flags = ["--optimizer=adam", "--add_noise", "--binarize", "--augment", "--dim_z=3", "--num_epochs=2"]
    assert run(*flags, f"--results_path={tmp_path / 'run'}") == 0
    pictures = {path.stem for path in (tmp_path / "run").glob("*.png")}
    shown = {"input", "input_noise", "reconstruction", "denoising"}
    assert pictures == shown | {"latent_map", "samples", "interpolation", "elbo"}
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "checkpoint" / "epoch-2.npz").unlink()
    assert run("--resume", f"--results_path={tmp_path / 'again'}") == 0
    assert differences(what_is_left(tmp_path / "again"), what_is_left(tmp_path / "run")) == []


# --- damage -------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_costs_one_epoch(run, trained, copy, capsys):
    newest = copy / "checkpoint" / "epoch-3.npz"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run("--resume", f"--results_path={copy}") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "epoch-3.npz" in line)
    assert [word for word in ("damaged", "epoch 2") if word not in line] == []
    assert differences(what_is_left(copy), what_is_left(trained)) == []


def test_no_damage_is_read_as_other_values(small_mnist, copy):
    outcomes, problems = kills.try_damage(copy, 40, random.Random(0))
    assert problems == []
    assert outcomes["passed over for the older one"] > 20
    assert outcomes.total() > 40


# --- refused ------------------------------------------------------------------------------------------


def refuse(run, folder, capsys, line, words=""):
    """Checks that --resume and the flags in a line are refused with words, and change nothing."""
    before = files(folder)
    assert run("--resume", f"--results_path={folder}", *line.split()) == 2
    err = one_line(capsys.readouterr().err)
    assert [word for word in words.split() if word not in err] == []
    assert files(folder) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--dim_z 7", "--dim_z 7 2"),
        ("--optimizer adam", "--optimizer adam sgd"),
        ("--add_noise", "--add_noise True False"),
        ("--seed 1", "--seed 1 0"),
        ("--num_epochs 2", "--num_epochs 2 3"),
        ("--num_epochs 101", "--num_epochs 100 or fewer --animate"),
        ("--animate False", "--animate False True"),
        ("--overwrite", "--resume --overwrite"),
        ("--load {}", "--resume --load"),
        ("--n_generate 3", "generated.npz --overwrite"),
        ("--reconstruct mine.npy", "reconstructed.png --overwrite"),
    ],
)
def test_resume_refuses_by_name(run, copy, capsys, line, words):
    for name in ("generated.npz", "reconstructed.png"):
        (copy / name).write_text("made before")
    refuse(run, copy, capsys, line.format(copy), words)


def test_a_run_without_a_finished_epoch_can_be_started_anew(run, tmp_path, capsys):
    assert run("--learn_rate=1e6", f"--results_path={tmp_path}") == 2
    err = one_line(capsys.readouterr().err)
    assert "NaN in epoch 1: lower --learn_rate" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert run(f"--load={tmp_path}") == 2
    assert "no finished epoch" in one_line(capsys.readouterr().err)
    assert run("--num_epochs=1", f"--results_path={tmp_path}") == 0
    assert run("--num_epochs=1", f"--results_path={tmp_path}") == 2  # now there is something to lose


def test_without_a_good_checkpoint_nothing_is_done(run, copy, capsys):
    for path in (copy / "checkpoint").iterdir():
        path.write_bytes(b"")
    refuse(run, copy, capsys, "--num_epochs=4", "epoch-3.npz epoch-2.npz damaged")
    shutil.rmtree(copy / "checkpoint")
    refuse(run, copy, capsys, "--num_epochs=4", str(copy))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"flags": 3}', '{"flags": {"dim_z": "x"}}', "\xff", "[" * 100_000]
)
def test_a_damaged_config_is_refused(run, copy, capsys, content):
    (copy / "config.json").write_bytes(content.encode("latin1"))
    refuse(run, copy, capsys, "", str(copy))


@pytest.mark.parametrize("change", [{"free_nats": 2.0}, {"keep_prob": None}])
def test_a_run_of_code_with_other_flags_is_refused(run, copy, capsys, change):
    config = json.loads((copy / "config.json").read_text())
    flags = {name: value for name, value in {**config["flags"], **change}.items() if name != "keep_prob"}
    flags |= {} if "keep_prob" in change else {"keep_prob": 0.9}
    (copy / "config.json").write_text(json.dumps(config | {"flags": flags}))
    refuse(run, copy, capsys, "", " ".join(change))


# --- what may change ----------------------------------------------------------------------------------


def test_more_epochs_another_rate_and_other_pictures(run, trained, copy):
    (copy / "metrics.json").write_text('{"test_elbo": -1, "test_log_px": 1}')
    more = ["--num_epochs=5", "--learn_rate=0.001", "--PMLR_n_img_x=4", "--PRR=False"]
    assert run("--resume", f"--results_path={copy}", *more) == 0
    log = read_log(copy)
    assert log[:3] == read_log(trained)
    assert [row["epoch"] for row in log] == [1, 2, 3, 4, 5]
    cosine = [0.001 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in (3, 4)]
    assert [row["learn_rate"] for row in log[3:]] == pytest.approx(cosine, rel=1e-4)
    assert "test_log_px" not in (copy / "metrics.json").read_text()  # which was another epoch's
    with Image.open(trained / "manifold.gif") as before, Image.open(copy / "manifold.gif") as after:
        assert (before.n_frames, before.size) == (3, (5 * 28, 5 * 28))
        assert (after.n_frames, after.size) == (2, (4 * 28, 5 * 28))  # its size changed: it begins anew
    gone = {path.name for path in trained.rglob("*")} - {path.name for path in copy.rglob("*")}
    assert gone == {"input.png", "reconstruction.png", "epoch-2.npz", "epoch-3.npz"}


# --- folders ------------------------------------------------------------------------------------------


def put(folder, names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"theirs: {name}")


def read_texts(folder):
    """Returns what is left of a user's files."""
    return {name: (folder / name).read_text() for name in THEIRS if (folder / name).exists()}


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(copy, few_digits):
    put(copy, THEIRS)
    put(copy, ("generated.npz", "reconstructed.npz", "reconstructed.png", "input_noise.png"))
    run_main.begin_run(run_main.parse_flags([f"--results_path={copy}", "--overwrite"]), few_digits)
    assert {str(name) for name in files(copy)} == {"config.json", *THEIRS}
    assert read_texts(copy) == {name: f"theirs: {name}" for name in THEIRS}


def test_resume_keeps_what_is_a_users(run, copy):
    put(copy, THEIRS)
    metrics = json.loads((copy / "metrics.json").read_text()) | {"test_log_px": 1.0}  # measured before
    (copy / "metrics.json").write_text(json.dumps(metrics))
    assert run("--resume", f"--results_path={copy}") == 0
    assert json.loads((copy / "metrics.json").read_text()) == metrics
    assert read_texts(copy) == {name: f"theirs: {name}" for name in THEIRS}


@pytest.mark.parametrize("flag", ["", "--overwrite", "--resume"])
@pytest.mark.parametrize(
    ("name", "content"), [("input.png", "theirs"), ("config.json", '{"model_type": "bert"}')]
)
def test_a_folder_without_a_run_is_refused(run, tmp_path, capsys, flag, name, content):
    (tmp_path / name).write_text(content)
    assert run(*([flag] if flag else []), f"--results_path={tmp_path}") == 2
    assert str(tmp_path) in one_line(capsys.readouterr().err)
    assert files(tmp_path) == {Path(name): content.encode()}


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_with_a_run_needs_a_word(run, copy, capsys, killed):
    if killed:  # in --overwrite, or before the first log.csv
        (copy / "log.csv").unlink()
    before = files(copy)
    assert run(f"--results_path={copy}") == 2
    err = one_line(capsys.readouterr().err)
    assert [word for word in (str(copy), "--resume", "--overwrite") if word not in err] == []
    assert files(copy) == before


# --- faults -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(n_bytes):
    """Files cannot grow above n_bytes: it stands in for a disk that fills up while a file is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("name", "n_bytes", "flags"),
    [
        ("config.json", 100, ["--results_path={}/new"]),
        ("epoch-4.npz", 100_000, ["--resume", "--results_path={}", "--num_epochs=4"]),
        ("input.png", 10_000, ["--resume", "--results_path={}"]),
        ("vae.keras", 150_000, ["--resume", "--results_path={}"]),
        ("generated.npz", 150_000, ["--load={}", "--n_generate=1000"]),
    ],
)
def test_a_full_disk_is_one_error_and_costs_no_file(run, copy, capsys, name, n_bytes, flags):
    before = what_is_left(copy)
    with full_disk(n_bytes):
        assert run(*(flag.format(copy) for flag in flags)) == 2
    assert name in one_line(capsys.readouterr().err)
    after = what_is_left(copy)
    after.pop("new", None)
    expected = {"config.json"} if "--num_epochs=4" in flags else set()
    assert set(differences(before, after)) == expected


def test_a_lost_number_is_one_error_and_keeps_the_good_state(run, tmp_path, monkeypatch, capsys):
    save_checkpoint, good = run_main.save_checkpoint, {}

    def save_and_lose(state, folder):
        save_checkpoint(state, folder)
        good.update(files(folder))
        state.network.decoder_output.bias.assign(np.full(784, np.nan))

    monkeypatch.setattr(run_main, "save_checkpoint", save_and_lose)
    assert run(*FLAGS, f"--results_path={tmp_path / 'run'}") == 2
    err = one_line(capsys.readouterr().err)
    assert [word for word in ("epoch 2", "--learn_rate") if word not in err] == []
    assert {str(name) for name in good} == {"config.json", "log.csv", "checkpoint/epoch-1.npz"}
    assert files(tmp_path / "run") == good


def test_ctrl_c_leaves_the_state_after_the_newest_epoch(run, trained, tmp_path, monkeypatch, capsys):
    save_checkpoint = run_main.save_checkpoint

    def interrupted(state, folder):
        save_checkpoint(state, folder)
        if len(state.history) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_main, "save_checkpoint", interrupted)
    # Where these tests run in the background of a shell, Ctrl-C may be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run(*FLAGS, f"--results_path={tmp_path / 'run'}") == 130
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.splitlines()[-1].startswith("interrupted")
    left, killed = what_is_left(tmp_path / "run"), what_is_left(trained.parent / "before_epoch-3.npz")
    assert all(".part-" in name for name in differences(left, killed))  # from which it goes on, above


@pytest.mark.parametrize("whose", ["tensorflow", "numpy"])
def test_too_little_memory_is_one_line(run, copy, monkeypatch, capsys, whose):
    def fails(*_):
        text = "{{function_node x}} OOM\n when allocating"
        raise (
            run_main.tf.errors.ResourceExhaustedError(None, None, text)
            if whose == "tensorflow"
            else MemoryError
        )

    monkeypatch.setattr(run_main, "train", fails)
    assert run("--resume", f"--results_path={copy}", "--num_epochs=4") == 2
    assert "out of memory: lower --n_hidden" in one_line(capsys.readouterr().err)


def test_workers_compare_flags_data_and_checkpoints(run, copy, few_digits, tmp_path, monkeypatch):
    compared = []

    def check_agreement(strategy, what, content):
        compared.append(content)
        raise run_main.UserError("they differ")

    monkeypatch.setattr(run_main, "check_agreement", check_agreement)
    new, resumed = [f"--results_path={tmp_path / 'new'}"], ["--resume", f"--results_path={copy}"]
    for flags in (new, [*new, "--seed=1"], [*new, "--animate"], resumed):
        assert run(*flags) == 2
    (copy / "checkpoint" / "epoch-3.npz").unlink()
    assert run(*resumed) == 2
    monkeypatch.setattr(few_digits, "sha256", {})
    assert run(*new) == 2
    assert len(set(compared)) == 6
    assert not (tmp_path / "new").exists()


def test_ctrl_c_before_training_leaves_no_folder(monkeypatch, tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist_data, "load_mnist", interrupted)
    assert run_main.main([]) == 130
    assert list(tmp_path.iterdir()) == []
