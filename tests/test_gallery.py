"""results/gallery.py: what it runs, resumes, publishes and calls stale; the programs it runs are replaced."""

import importlib.util
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT

import run_main

pytestmark = pytest.mark.quick

MADE = {"config.json": "{}", "log.csv": "epoch\n", "samples.png": "picture", "vae.keras": "network"}


def load_gallery():
    """Returns the program as a module; dataclasses look it up in sys.modules."""
    spec = importlib.util.spec_from_file_location("gallery", ROOT / "results" / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gallery"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    """The program, in a copy of results/ that has a README and two experiments."""
    module = load_gallery()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    experiments = [
        module.Experiment("one", "--dim_z 3 --num_epochs 2", ("samples.png",), n_seeds=2),
        module.Experiment(
            "two", "--model iwae --num_epochs 2", n_seeds=1, continuation="--n_samples 9 --num_epochs 3"
        ),
    ]
    monkeypatch.setattr(module, "EXPERIMENTS", experiments)
    monkeypatch.setattr(
        module, "TABLES", [module.Table("A table", module.FIRST_COLUMNS | module.ELBO, "one two")]
    )
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "README.md").write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    return module


@pytest.fixture
def commands(gallery, tmp_path, monkeypatch):
    """The flags of the programs that are run; each trains all of its epochs."""
    commands = []

    def run(command, cwd, check):
        flags = run_main.make_parser().parse_args(command[2:])
        folder = tmp_path / flags.results_path
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        commands.append(shlex.join(command[2:]))
        (folder / "checkpoint" / f"epoch-{flags.num_epochs}.npz").touch()
        for name, content in MADE.items():
            (folder / name).write_text(content)
        (folder / "metrics.json").write_text(json.dumps({"test_elbo": -100.0 - flags.seed}))

    monkeypatch.setattr(gallery.subprocess, "run", run)
    return commands


def call(gallery, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["gallery.py", *arguments])
    return gallery.main()


def test_everything_is_made_once_and_published(gallery, commands, tmp_path, monkeypatch, capsys):
    (tmp_path / "results" / "one").mkdir()
    (tmp_path / "results" / "one" / "elbo.png").write_text("no longer published")
    assert call(gallery, monkeypatch, "--stale") == 1
    assert capsys.readouterr().out.split() == ["results/one", "results/one/seed_1", "results/two"]
    assert call(gallery, monkeypatch) == 0
    assert commands == [
        "--dim_z 3 --num_epochs 2 --seed 0 --results_path results/gallery_runs/one_0",
        "--dim_z 3 --num_epochs 2 --seed 1 --results_path results/gallery_runs/one_1",
        "--model iwae --num_epochs 2 --seed 0 --results_path results/gallery_runs/two_0",
        "--resume --n_samples 9 --num_epochs 3 --seed 0 --results_path results/gallery_runs/two_0",
    ]
    published = {"config.json", "log.csv", "metrics.json", "gallery.json"}
    one = {path.name for path in (tmp_path / "results" / "one").iterdir()}
    assert one == published | {"samples.png", "seed_1"}
    assert {path.name for path in (tmp_path / "results" / "one" / "seed_1").iterdir()} == published
    assert call(gallery, monkeypatch, "--stale") == 0
    commands.clear()
    assert call(gallery, monkeypatch) == 0
    assert commands == []
    table = (tmp_path / "results" / "README.md").read_text()
    assert table.startswith(f"before\n{gallery.BEGIN}\n") and table.endswith(f"{gallery.END}\nafter\n")
    rows = re.findall(r"^\| (.*) \|$", table, re.MULTILINE)
    assert rows[2:] == [
        "`--dim_z 3 --num_epochs 2` | [one](one) | 2 | \N{MINUS SIGN}100.50 ± 0.50",
        "`--model iwae --num_epochs 2`, then `--resume --n_samples 9 --num_epochs 3` | [two](two) | 1 | "
        "\N{MINUS SIGN}100.00",
    ]


def test_only_what_is_asked_for_is_made(gallery, commands, monkeypatch):
    assert call(gallery, monkeypatch, "--only", "two") == 0
    assert ["two_0" in command for command in commands] == [True, True]
    assert call(gallery, monkeypatch, "--stale", "--only", "two") == 0
    assert call(gallery, monkeypatch, "--stale") == 1


@pytest.mark.parametrize(("n_trained", "flags"), [(1, "--model iwae"), (2, "--resume --n_samples")])
def test_an_interrupted_run_is_resumed_where_it_was(
    gallery, commands, tmp_path, monkeypatch, n_trained, flags
):
    call(gallery, monkeypatch, "--only", "two")
    (tmp_path / "results" / "two" / "metrics.json").unlink()
    checkpoints = tmp_path / "results" / "gallery_runs" / "two_0" / "checkpoint"
    for file in checkpoints.iterdir():
        file.unlink()
    (checkpoints / f"epoch-{n_trained}.npz").touch()
    commands.clear()
    call(gallery, monkeypatch, "--only", "two")
    assert commands[0].startswith(flags)
    assert len(commands) == 3 - n_trained
    assert all("--resume" in command and "--overwrite" not in command for command in commands)


def test_other_code_or_another_command_makes_a_folder_stale(gallery, commands, monkeypatch):
    call(gallery, monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_main, "code_checksum", lambda name, without=(): "other")
        assert call(gallery, monkeypatch, "--stale") == 1
    assert call(gallery, monkeypatch, "--stale") == 0
    gallery.EXPERIMENTS[0].flags += " --warm_up 1"
    commands.clear()
    assert call(gallery, monkeypatch) == 0
    assert all("--warm_up" in command and "--resume" not in command for command in commands)
    assert len(commands) == 2


def test_the_code_of_a_model_is_of_the_classes_it_uses(gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(run_main, "__file__", str(tmp_path / "run_main.py"))
    source = (ROOT / "vae.py").read_text()
    (tmp_path / "mnist_data.py").write_text("")
    edits = {"VAE": "decoder_bias_scale = 2.0", "Ladder": "dim_z_lower=64", "": "IMPORTANCE_CHUNK = 50"}
    models = ("vae", "ladder", "stein")

    def checksums(source):
        (tmp_path / "vae.py").write_text(source)
        run_main.code_checksum.cache_clear()
        records = [gallery.Experiment("one", f"--model {model}").record() for model in models]
        return {model: record["scripts"]["vae.py"] for model, record in zip(models, records, strict=True)}

    before = checksums(source)
    assert len(set(before.values())) == 3
    for name, old in edits.items():
        found = checksums(source.replace(old, f"{old}1"))
        changed = [model for model in models if found[model] != before[model]]
        assert changed == (["ladder"] if name == "Ladder" else list(models))
    run_main.code_checksum.cache_clear()


def test_a_run_of_other_code_is_gone_before_the_new_one_starts(gallery, commands, tmp_path, monkeypatch):
    """Or an interruption at the start would leave its checkpoints beside the new record."""
    call(gallery, monkeypatch, "--only", "two")
    monkeypatch.setattr(run_main, "code_checksum", lambda name, without=(): "other")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery.subprocess, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(gallery, monkeypatch, "--only", "two")
    assert not (tmp_path / "results" / "gallery_runs" / "two_0").exists()
    commands.clear()
    call(gallery, monkeypatch, "--only", "two")
    assert ["--resume" in command for command in commands] == [False, True]


def test_a_run_that_fails_is_one_line(gallery, monkeypatch, capsys):
    def fail(command, **options):
        raise gallery.subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(gallery.subprocess, "run", fail)
    assert call(gallery, monkeypatch) == 1
    assert capsys.readouterr().err == "gallery.py: error: one ended with status 2\n"


def test_numbers_of_other_code_are_left_out(gallery, commands, tmp_path, monkeypatch):
    call(gallery, monkeypatch)
    monkeypatch.setattr(run_main, "code_checksum", lambda name, without=(): "other")
    assert call(gallery, monkeypatch, "--tables") == 0
    readme = (tmp_path / "results" / "README.md").read_text()
    assert "| [one](one) | 0 |  |" in readme
    assert "100" not in readme


def test_every_picture_and_command_of_the_readme_is_of_the_gallery():
    experiments = {experiment.name: experiment for experiment in load_gallery().EXPERIMENTS}
    readme = (ROOT / "results" / "README.md").read_text()
    for folder, name in re.findall(r"\]\((\w+)/([\w.]+)\)", readme):
        assert name in experiments[folder].published(0)
        assert (ROOT / "results" / folder / name).exists()
    for experiment in experiments.values():
        flags = "`, then `".join(experiment.commands)
        assert f"| `{flags}` | [{experiment.name}]" in readme or experiment.flags == ""


def test_the_elbos_in_the_main_readme_are_those_of_the_gallery():
    gallery = load_gallery()
    readme = (ROOT / "README.md").read_text()
    commands = {"slides": "", "dim_z_2": " --num_epochs 60", "vae_20": " --dim_z 20"}
    for experiment in gallery.EXPERIMENTS:
        if experiment.name in commands:
            runs = [experiment.folder(seed) / "metrics.json" for seed in range(3)]
            elbo = gallery.mean_and_error("test_elbo")(experiment, [run_main.read_json(run) for run in runs])
            assert re.search(rf"`python run_main.py{commands[experiment.name]}`.* \| {elbo} \|", readme)


def test_flags_of_all_experiments_are_valid_and_in_a_table():
    gallery = load_gallery()
    shown = " ".join(table.names for table in gallery.TABLES).split()
    for experiment in gallery.EXPERIMENTS:
        flags = run_main.parse_flags(shlex.split(experiment.flags))
        last = run_main.make_parser().parse_args(shlex.split(experiment.commands[-1]))
        assert last.num_epochs > flags.num_epochs or not experiment.continuation
        assert experiment.name in shown
        assert set(experiment.pictures) <= {*run_main_pictures()}


def run_main_pictures():
    run_main.import_tensorflow()
    return run_main.plot_utils.PICTURES
