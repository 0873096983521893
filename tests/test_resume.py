"""Nothing is lost: resumed runs end in the same bits, and neither faults nor flags damage what is on disk."""

import contextlib
import csv
import dataclasses
import json
import math
import random
import shutil
import signal
from pathlib import Path

import kills
import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_mentions, files, names, one_line, read_log
from kills import differences, read_events, what_is_left
from PIL import Image

import mnist_data
import plot_utils
import run_main
import vae

run_main.import_tensorflow()

FLAGS = ("--num_epochs=3", "--animate", "--PMLR_n_img_x=5", "--PMLR_n_img_y=5")
USER_FILES = ("notes.txt", "best.png", "mine/input.png", "mine/.part-1.txt")
USER_FILES += ("checkpoint/epoch-best.npz", "checkpoint/epoch-1.keep.npz", "checkpoint/notes.txt")


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """The folder of a run, beside copies of it from right before each of its files was written."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    replace = Path.replace

    def copy_and_replace(part, path):
        with contextlib.suppress(FileExistsError):  # log.csv is written several times
            shutil.copytree(folder, folder.parent / f"before_{path.name}")
        return replace(part, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", copy_and_replace)
        assert run(*FLAGS, f"--results_path={folder}") == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def edit_config(folder, edit):
    """Changes the recorded flags of a run, in place."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["flags"])
    (folder / "config.json").write_text(json.dumps(config))


# --- kills --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "log.csv", "epoch-3.npz", "vae.keras"])
def test_a_run_killed_before_a_file_was_written_ends_in_the_same_bits(run, trained, tmp_path, name):
    folder = shutil.copytree(trained.parent / f"before_{name}", tmp_path / "run")
    (part,) = folder.rglob(".part-*")
    assert part.name.endswith(f"-{name}")
    has_config = (folder / "config.json").exists()
    assert has_config == (name != "config.json")
    assert run(f"--results_path={folder}", *(["--resume"] if has_config else FLAGS)) == 0
    assert differences(what_is_left(folder), what_is_left(trained)) == []


def test_other_flags_are_resumed_to_the_same_bits(run, tmp_path):
    flags = ["--optimizer=adam", "--add_noise", "--binarize", "--augment", "--dim_z=3", "--num_epochs=2"]
    assert run(*flags, f"--results_path={tmp_path / 'run'}") == 0
    pictures = {path.stem for path in (tmp_path / "run").glob("*.png")}
    shown = {"input", "input_noise", "reconstruction", "denoising"}
    assert pictures == shown | {"latent_map", "samples", "interpolation", "worst", "elbo"}
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    (tmp_path / "again" / "checkpoint" / "epoch-2.npz").unlink()
    assert run("--resume", f"--results_path={tmp_path / 'again'}") == 0
    assert differences(what_is_left(tmp_path / "again"), what_is_left(tmp_path / "run")) == []


# --- damage -------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_costs_one_epoch(run, trained, copy, capsys):
    newest = copy / "checkpoint" / "epoch-3.npz"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run("--resume", f"--results_path={copy}") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "epoch-3.npz" in line]
    assert_mentions(line, ["damaged", "after epoch 2"])
    assert differences(what_is_left(copy), what_is_left(trained)) == []


def test_no_damage_is_read_as_other_values(small_mnist, copy):
    outcomes, problems = kills.try_damage(copy, 40, random.Random(0))
    assert problems == []
    assert outcomes["passed over for the older one"] > 20
    assert outcomes.total() > 40


# --- refused ------------------------------------------------------------------------------------------


def assert_refused(run, folder, capsys, flags=(), words=()):
    """Asserts that --resume with flags is refused in one line with the words, and changes nothing."""
    before = files(folder)
    assert run("--resume", f"--results_path={folder}", *flags) == 2
    assert_mentions(one_line(capsys.readouterr().err), words)
    assert files(folder) == before


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--dim_z 7", "--dim_z 7 2"),
        ("--optimizer adam", "--optimizer adam sgd"),
        ("--add_noise", "--add_noise True False"),
        ("--seed 1", "--seed 1 0"),
        ("--num_epochs 2", "--num_epochs 3"),
        ("--learn_rate 0.01", "--learn_rate --num_epochs 3"),
        ("--num_epochs 101", "--num_epochs 100 or fewer --animate"),
        ("--animate False", "--animate False True"),
        ("--overwrite", "--resume --overwrite"),
        ("--load {folder}", "--resume --load"),
        ("--n_generate 3", ["generated.npz", ": move it\n"]),
        ("--reconstruct mine.npy", ["reconstructed.png", ": move it\n"]),
    ],
)
def test_resume_refuses_conflicting_flags_by_name(run, copy, capsys, line, words):
    for name in ("generated.npz", "reconstructed.png"):
        (copy / name).write_text("made before")
    assert_refused(run, copy, capsys, line.format(folder=copy).split(), words)


def test_a_run_without_a_finished_epoch_can_be_started_again(run, trained, few_digits, tmp_path, capsys):
    folder = shutil.copytree(trained.parent / "before_epoch-1.npz", tmp_path / "run")
    assert names(folder) == {"config.json", "checkpoint", run_main.EVENT_FILES}
    assert run(f"--load={folder}") == 2
    assert "no checkpoint" in one_line(capsys.readouterr().err)
    flags = run_main.parse_flags(["--num_epochs=1", f"--results_path={folder}"])
    state = run_main.TrainingState(vae.VAE(n_hidden=1))
    run_main.restore_state(state, folder)
    assert "starting from the beginning" in capsys.readouterr().out
    assert run_main.claim_folder(flags, few_digits, state) == folder
    assert json.loads((folder / "config.json").read_text())["flags"]["num_epochs"] == 1
    assert names(folder) == {"config.json", "checkpoint", run_main.EVENT_FILES}
    assert names(folder / "checkpoint") == set()


def test_a_run_without_a_good_checkpoint_is_refused(run, copy, capsys):
    for path in (copy / "checkpoint").iterdir():
        path.write_bytes(b"")
    assert_refused(run, copy, capsys, ["--num_epochs=4"], "epoch-3.npz epoch-2.npz damaged")
    shutil.rmtree(copy / "checkpoint")
    assert_refused(run, copy, capsys, ["--num_epochs=4"], [str(copy), "missing"])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"flags": 3}', '{"flags": {"dim_z": "x"}}', "\xff", "[" * 100_000]
)
def test_a_damaged_config_is_refused(run, copy, capsys, content):
    (copy / "config.json").write_bytes(content.encode("latin1"))
    assert_refused(run, copy, capsys, words=[str(copy)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dim_z", 0),
        ("dim_z", "two"),
        ("dim_z", 2.5),
        ("keep_prob", 2.5),
        ("keep_prob", math.nan),
        ("model", "gan"),
        ("add_noise", "maybe"),
        ("n_hidden", [32]),
        ("data_dir", ""),
        ("PRR_n_img_x", 1000),
    ],
)
def test_recorded_values_are_checked_like_given_ones(run, copy, capsys, name, value):
    edit_config(copy, lambda flags: flags.update({name: value}))
    assert_refused(run, copy, capsys, words=[f"--{name}", str(value)])
    before = files(copy)
    assert run(f"--load={copy}") == 2
    assert_mentions(one_line(capsys.readouterr().err), [f"--{name}", str(value)])
    assert files(copy) == before


def test_recorded_flags_that_do_not_go_together_are_refused(run, copy, capsys):
    edit_config(copy, lambda flags: flags.update(warm_up=4))
    assert_refused(run, copy, capsys, words="--warm_up 4 --num_epochs 3")


def test_a_run_by_a_version_with_more_flags_is_refused(run, copy, capsys):
    edit_config(copy, lambda flags: flags.update(free_nats=2.0))
    assert_refused(run, copy, capsys, words="other flags --free_nats")


@pytest.mark.parametrize("name", ["learn_rate", "n_samples"])
def test_a_flag_that_may_change_need_not_be_recorded(copy, name):
    edit_config(copy, lambda flags: flags.pop(name))
    assert run_main.parse_flags(["--resume", f"--results_path={copy}"]).num_epochs == 3


def test_a_run_by_a_version_with_fewer_flags_is_refused(run, copy, capsys):
    edit_config(copy, lambda flags: flags.pop("keep_prob"))
    assert_refused(run, copy, capsys, words="other flags --keep_prob")


# --- what may change ----------------------------------------------------------------------------------


def test_epochs_learning_rate_and_pictures_may_change(run, trained, copy):
    (copy / "metrics.json").write_text('{"test_elbo": -1, "test_log_px": 1}')
    more = ["--num_epochs=5", "--learn_rate=0.001", "--PMLR_n_img_x=4", "--PRR=False"]
    assert run("--resume", f"--results_path={copy}", *more) == 0
    log = read_log(copy)
    assert log[:3] == read_log(trained)
    assert [row["epoch"] for row in log] == [1, 2, 3, 4, 5]
    half_cosine = [0.001 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in (3, 4)]
    assert [row["learn_rate"] for row in log[3:]] == pytest.approx(half_cosine, rel=1e-4)
    assert "test_log_px" not in (copy / "metrics.json").read_text()  # of another epoch
    with Image.open(trained / "manifold.gif") as before, Image.open(copy / "manifold.gif") as after:
        assert (before.n_frames, before.size) == (3, (5 * 28, 5 * 28))
        assert (after.n_frames, after.size) == (2, (4 * 28, 5 * 28))  # a new size starts a new animation
    assert names(trained) - names(copy) == {"input.png", "reconstruction.png", "worst.png"}
    assert names(copy / "checkpoint") == {"epoch-4.npz", "epoch-5.npz"}


def test_a_constant_learning_rate_follows_the_flag(few_digits, tmp_path, monkeypatch):
    """As after an edit of make_optimizer."""

    def make_constant_rate(network, n_steps, flags):
        optimizer = run_main.OPTIMIZERS[flags.optimizer].make(flags.learn_rate)
        optimizer.build(network.trainable_variables)
        return optimizer

    def build(learn_rate):
        flags = run_main.parse_flags(["--n_hidden=8", f"--learn_rate={learn_rate}"])
        digits = run_main.prepare_digits(few_digits, flags)
        return flags, run_main.TrainingState(run_main.build_network(digits, flags))

    monkeypatch.setattr(run_main, "make_optimizer", make_constant_rate)
    flags, saved = build(0.02)
    saved.network.optimizer.apply([tf.ones(weight.shape) for weight in saved.network.trainable_variables])
    saved.history = [{"epoch": 1, "seconds": 1.0}]
    run_main.start_events(saved, tmp_path)
    run_main.save_epoch(saved, None, flags, tmp_path)
    _, restored = build(0.001)
    run_main.restore_state(restored, tmp_path)
    optimizer = restored.network.optimizer
    assert float(optimizer.learning_rate) == pytest.approx(0.001)
    assert float(optimizer.iterations) == 1
    assert restored.history == saved.history
    for variable, other in zip(optimizer.variables, saved.network.optimizer.variables, strict=True):
        if variable.name != "learning_rate":
            np.testing.assert_array_equal(variable, other)


def test_columns_that_older_epochs_lack_are_empty_in_log_csv(run, trained, copy):
    """As after an edit that adds a column to the rows, here before epoch 3."""
    newest = copy / "checkpoint" / "epoch-3.npz"
    arrays = run_main.read_checkpoint(newest)
    history = json.loads(str(arrays["history"]))
    for row in history[:2]:
        del row["train_kl"]
    np.savez(newest, **arrays | {"history": json.dumps(history)})
    assert run("--resume", f"--results_path={copy}") == 0
    with (copy / "log.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    expected = read_log(trained)
    assert sorted(header) == sorted(expected[0])
    for row, expected_row in zip(rows, expected, strict=True):
        found = dict(zip(header, row, strict=True))
        if expected_row["epoch"] < 3:
            assert found.pop("train_kl") == ""
            del expected_row["train_kl"]
        assert {name: float(value) for name, value in found.items()} == expected_row


# --- folders ------------------------------------------------------------------------------------------


def write_files(folder, file_names):
    for name in file_names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"theirs: {name}")


def assert_user_files_unchanged(folder):
    for name in USER_FILES:
        assert (folder / name).read_text() == f"theirs: {name}"


def test_overwrite_removes_the_files_of_a_run_only(copy, few_digits):
    write_files(copy, USER_FILES)
    write_files(copy, ("generated.npz", "reconstructed.npz", "reconstructed.png", "input_noise.png"))
    flags = run_main.parse_flags([f"--results_path={copy}", "--overwrite"])
    run_main.claim_folder(flags, few_digits, run_main.TrainingState(vae.VAE(n_hidden=1)))
    (events,) = copy.glob(run_main.EVENT_FILES)
    assert read_events(events) == {}
    assert {str(name) for name in files(copy)} == {"config.json", events.name, *USER_FILES}
    assert_user_files_unchanged(copy)


def test_resume_keeps_user_files_and_earlier_metrics(run, copy):
    write_files(copy, USER_FILES)
    metrics = json.loads((copy / "metrics.json").read_text()) | {"test_log_px": 1.0}
    (copy / "metrics.json").write_text(json.dumps(metrics))
    assert run("--resume", f"--results_path={copy}") == 0
    assert json.loads((copy / "metrics.json").read_text()) == metrics
    assert_user_files_unchanged(copy)


@pytest.mark.parametrize("flag", [None, "--overwrite", "--resume"])
@pytest.mark.parametrize(
    ("name", "content"), [("input.png", "theirs"), ("config.json", '{"model_type": "bert"}')]
)
def test_a_folder_without_a_run_is_refused(run, tmp_path, capsys, flag, name, content):
    (tmp_path / name).write_text(content)
    assert run(f"--results_path={tmp_path}", *([flag] if flag else [])) == 2
    assert str(tmp_path) in one_line(capsys.readouterr().err)
    assert files(tmp_path) == {Path(name): content.encode()}


@pytest.mark.parametrize("has_log", [True, False])
def test_a_folder_with_a_run_needs_resume_or_overwrite(run, copy, capsys, has_log):
    if not has_log:  # killed before the first log.csv was written
        (copy / "log.csv").unlink()
    before = files(copy)
    assert run(f"--results_path={copy}") == 2
    assert_mentions(one_line(capsys.readouterr().err), [str(copy), "--resume", "--overwrite"])
    assert files(copy) == before


# --- faults -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(n_bytes):
    """Files cannot grow beyond n_bytes, as on a disk that fills up while a file is written."""
    resource = pytest.importorskip("resource", reason="needs limits on files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("name", "n_bytes", "flags"),
    [
        ("config.json", 100, ["--results_path={folder}/new"]),
        ("epoch-4.npz", 100_000, ["--resume", "--results_path={folder}", "--num_epochs=4"]),
        ("latent.npz", 10_000, ["--resume", "--results_path={folder}"]),
        ("latent_map.png", 45_000, ["--load={folder}"]),
        ("vae.keras", 150_000, ["--resume", "--results_path={folder}"]),
        ("generated.npz", 150_000, ["--load={folder}", "--n_generate=1000"]),
    ],
)
def test_a_full_disk_is_a_one_line_error_and_costs_no_file(run, copy, capsys, name, n_bytes, flags):
    before = what_is_left(copy)
    with full_disk(n_bytes):
        assert run(*[flag.format(folder=copy) for flag in flags]) == 2
    assert name in one_line(capsys.readouterr().err)
    after = what_is_left(copy)
    after.pop("new", None)
    expected = {"config.json"} if "--num_epochs=4" in flags else set()
    if "--resume" in flags[0]:  # the new event file has no metrics yet
        assert after["events"].items() < before["events"].items()
        expected.add("events")
    assert set(differences(before, after)) == expected


def test_what_was_measured_is_kept_when_a_picture_fails(run, trained, tmp_path, monkeypatch):
    """As after an edit with a mistake; once that is corrected, --resume ends in the same bits."""

    def fail(*_, **__):
        raise ValueError("a mistake")

    folder = shutil.copytree(trained.parent / "before_metrics.json", tmp_path / "run")
    command = ["--resume", f"--results_path={folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(plot_utils, "draw", fail)
        with pytest.raises(ValueError, match="a mistake"):
            run(*command)
    measured = {"config.json", "checkpoint", "log.csv", "metrics.json", "latent.npz", "vae.keras"}
    assert names(folder) == measured | {run_main.EVENT_FILES}
    assert (folder / "metrics.json").read_bytes() == (trained / "metrics.json").read_bytes()
    assert (folder / "latent.npz").read_bytes() == (trained / "latent.npz").read_bytes()
    assert run(*command) == 0
    assert differences(what_is_left(folder), what_is_left(trained)) == []


def test_an_extended_run_has_no_measurements_of_earlier_epochs(run, copy, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert {"metrics.json", "latent.npz"} < names(copy)
    monkeypatch.setattr(run_main, "save_results", interrupt)
    assert run("--resume", f"--results_path={copy}") == 130  # nothing was left to train
    assert {"metrics.json", "latent.npz"} < names(copy)
    assert run("--resume", f"--results_path={copy}", "--num_epochs=4") == 130
    assert not {"metrics.json", "latent.npz"} & names(copy)


def test_nan_is_a_one_line_error_and_keeps_the_good_state(run, copy, capsys):
    before = what_is_left(copy)
    assert run("--resume", f"--results_path={copy}", "--num_epochs=4", "--learn_rate=1e6") == 2
    assert_mentions(one_line(capsys.readouterr().err), ["NaN in epoch 4", "lower --learn_rate"])
    assert differences(before, what_is_left(copy)) == ["config.json", "events"]
    lower = run_main.parse_flags(["--resume", f"--results_path={copy}", "--learn_rate=0.01"])
    assert (lower.learn_rate, lower.num_epochs) == (0.01, 4)


def test_ctrl_c_leaves_the_state_after_the_newest_epoch(run, trained, tmp_path, monkeypatch, capsys):
    save_epoch = run_main.save_epoch

    def save_and_interrupt(state, digits, flags, folder):
        save_epoch(state, digits, flags, folder)
        if len(state.history) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_main, "save_epoch", save_and_interrupt)
    # Where these tests run in the background of a shell, Ctrl-C may be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(*FLAGS, f"--results_path={tmp_path / 'run'}") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out.splitlines()[-1].startswith("interrupted")
    interrupted = what_is_left(tmp_path / "run")
    killed = what_is_left(trained.parent / "before_epoch-3.npz")  # whose resumption is tested above
    assert all(".part-" in name for name in differences(interrupted, killed))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), tf.errors.ResourceExhaustedError(None, None, "{{function_node x}} OOM\n allocating")],
)
def test_too_little_memory_is_a_one_line_error(run, copy, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(run_main, "train", fail)
    assert run("--resume", f"--results_path={copy}", "--num_epochs=4") == 2
    assert "out of memory: lower --n_hidden" in one_line(capsys.readouterr().err)


def test_workers_compare_flags_data_and_checkpoints(run, copy, few_digits, tmp_path, monkeypatch):
    compared = []

    def compare_workers(strategy, what, content):
        compared.append(content)
        raise run_main.UserError("they differ")

    monkeypatch.setattr(run_main, "compare_workers", compare_workers)
    new = [f"--results_path={tmp_path / 'new'}"]
    resumed = ["--resume", f"--results_path={copy}"]
    for flags in (new, [*new, "--seed=1"], [*new, "--animate"], resumed):
        assert run(*flags) == 2
    (copy / "checkpoint" / "epoch-3.npz").unlink()
    assert run(*resumed) == 2
    other_labels = dataclasses.replace(few_digits, train_labels=9 - few_digits.train_labels)
    monkeypatch.setattr(mnist_data, "load_mnist", lambda folder: other_labels)
    assert run(*new) == 2
    assert len(set(compared)) == 6
    assert not (tmp_path / "new").exists()


@pytest.mark.quick
def test_ctrl_c_before_training_creates_no_folder(monkeypatch, tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mnist_data, "load_mnist", interrupt)
    assert run_main.main([]) == 130
    assert list(tmp_path.iterdir()) == []
