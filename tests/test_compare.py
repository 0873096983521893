"""--compare: the table and the picture of several runs."""

import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_mentions, environment, files, names, one_line, read_log
from PIL import Image

import run_main


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """A folder with three runs that differ in the seed, and two others."""
    folder = tmp_path_factory.mktemp("compare") / "results"
    no_plots = ("--PMLR=False", "--PRR=False")
    flags = {
        "run1": ["--seed=1"],
        "run2": ["--seed=2", *no_plots],
        "run10": ["--seed=3", *no_plots],
        "heavy": ["--kl_weight=4", "--n_importance=2", *no_plots],
        "wide": ["--dim_z=3"],
    }
    for name, arguments in flags.items():
        assert run("--num_epochs=2", *arguments, f"--results_path={folder / name}") == 0
    return folder


def compare(capsys, *arguments):
    """Runs --compare in this process; returns the table's rows, lists of cells by column."""
    assert run_main.main(["--compare", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, *rows = [re.split(r"  +", line) for line in lines if "  " in line]
    return [dict(zip(header, row, strict=True)) for row in rows]


def metrics(folder, name):
    return json.loads((folder / "metrics.json").read_text())[name]


def test_runs_that_differ_in_the_seed_share_a_row(runs, tmp_path, capsys):
    seeds = [runs / "run1", runs / "run2", runs / "run10"]
    heavy, shared, wide = compare(
        capsys, *seeds, runs / "heavy", runs / "wide", f"--results_path={tmp_path / 'out'}"
    )
    assert list(shared) == [
        *("runs", "dim_z", "kl_weight", "epochs", "valid ELBO"),
        *("test ELBO", "reconstruction", "KL", "log p(x)", "s/epoch"),
    ]
    assert [row["runs"] for row in (shared, heavy, wide)] == ["run1, run2, run10", "heavy", "wide"]
    assert [row["dim_z"] for row in (shared, heavy, wide)] == ["2", "2", "3"]
    assert [row["kl_weight"] for row in (shared, heavy, wide)] == ["1.0", "4.0", "1.0"]
    assert {row["epochs"] for row in (shared, heavy, wide)} == {"2/2"}
    columns = {"test ELBO": "test_elbo", "reconstruction": "test_reconstruction", "KL": "test_kl"}
    for column, name in columns.items():
        values = [metrics(folder, name) for folder in seeds]
        assert shared[column] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
        assert heavy[column] == f"{metrics(runs / 'heavy', name):.2f}"
    log_px = [metrics(runs / "heavy", f"test_log_px{suffix}") for suffix in ("", "_standard_error")]
    assert heavy["log p(x)"] == f"{log_px[0]:.2f} ± {log_px[1]:.2f} (2 samples)"
    assert shared["log p(x)"] == wide["log p(x)"] == "-"
    assert wide["valid ELBO"] == f"{read_log(runs / 'wide')[-1]['valid_elbo']:.2f}"
    assert float(wide["s/epoch"]) == pytest.approx(
        np.median([row["seconds"] for row in read_log(runs / "wide")]), abs=0.051
    )


def test_an_edited_script_makes_another_row(runs, tmp_path, capsys):
    edited = shutil.copytree(runs / "run2", tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    config["scripts"]["vae.py"] = "01234567"
    (edited / "config.json").write_text(json.dumps(config))
    rows = compare(capsys, runs / "run1", edited, f"--results_path={tmp_path / 'out'}")
    assert [row["vae.py"] for row in rows] == [run_main.code_checksum("vae.py"), "01234567"]


def test_unfinished_runs_are_shown_as_far_as_they_are(runs, tmp_path, capsys):
    """Another number of finished epochs makes another row."""
    unfinished = shutil.copytree(runs / "run2", tmp_path / "unfinished")
    for file in unfinished.glob("*.png"):
        file.unlink()
    (unfinished / "metrics.json").unlink()
    lines = (unfinished / "log.csv").read_text().splitlines()
    (unfinished / "log.csv").write_text("\n".join(lines[:2]) + "\n")
    whole, part = compare(capsys, runs / "run1", unfinished, f"--results_path={tmp_path / 'out'}")
    assert (whole["epochs"], part["epochs"]) == ("2/2", "1/2")
    assert part["test ELBO"] == part["KL"] == "-"
    assert part["valid ELBO"] == f"{read_log(runs / 'run2')[0]['valid_elbo']:.2f}"


def test_comparison_png_goes_to_the_next_free_folder(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pattern = str(runs / "run*")  # as in Windows, whose shell leaves it alone
    (row,) = compare(capsys, pattern)
    assert row["runs"] == "run1, run2, run10"
    compare(capsys, runs / "heavy", runs / "wide")
    assert names(tmp_path / "results") == {"compare1", "compare2"}
    picture = Image.open(tmp_path / "results" / "compare2" / "comparison.png")
    picture.load()
    before = files(tmp_path)
    command = ["--compare", runs / "heavy", runs / "run1", "--results_path=results/compare1"]
    assert run_main.main(command) == 2
    assert_mentions(one_line(capsys.readouterr().err), "comparison.png --overwrite")
    assert files(tmp_path) == before
    assert run_main.main([*command, "--overwrite"]) == 0
    assert names(tmp_path / "results" / "compare1") == {"comparison.png"}
    assert files(tmp_path) != before


@pytest.mark.quick
def test_a_setting_that_a_run_does_not_have_is_a_dash(tmp_path):
    run = run_main.RecordedRun(tmp_path, {"n_samples": None, "dim_z": 2}, 0, "", [], {})
    assert [run_main.setting_cell(run, name) for name in ("n_samples", "vae.py", "dim_z")] == ["-", "-", "2"]


def test_picture_has_a_curve_per_row_and_the_runs_own_pictures(runs, monkeypatch):
    import plot_utils

    figures = []
    monkeypatch.setattr(plot_utils, "file_content", lambda save, **options: figures.append(save.__self__))
    recorded = [run_main.read_run(runs / name) for name in ("run1", "run2", "wide")]
    plot_utils.draw_comparison([recorded[:2], recorded[2:]], [["two", "more"], ["one"]])
    curves, *pictures = figures[0].axes
    two, one = curves.lines
    elbos = np.array([[row["valid_elbo"] for row in run.history] for run in recorded])
    np.testing.assert_allclose(two.get_ydata(), elbos[:2].mean(axis=0))
    np.testing.assert_allclose(one.get_ydata(), elbos[2])
    band = curves.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((elbos[:2].min(), elbos[:2].max()))
    assert [text.get_text() for text in curves.get_legend().get_texts()] == ["two, more (2 seeds)", "one"]
    shown = ["run1/reconstruction.png", "wide/reconstruction.png", "run1/samples.png", "wide/samples.png"]
    shown += ["run1/manifold.png", "wide/latent_map.png"]
    assert [axes.get_title().splitlines()[-1] for axes in pictures] == shown
    assert pictures[0].get_title().splitlines()[:-1] == ["two", "more"]
    for axes, name in zip(pictures, shown, strict=True):
        expected = np.asarray(Image.open(runs / name).convert("RGB"))
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)


def test_comparing_needs_neither_tensorflow_nor_the_data(runs, tmp_path):
    script = f"""
import sys
import run_main
status = run_main.main(["--compare", r"{runs / "run1"}", r"{runs / "wide"}"])
assert "tensorflow" not in sys.modules
sys.exit(status)
"""
    command = [sys.executable, "-c", script]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)})
    assert Image.open(io.BytesIO((tmp_path / "results/compare1/comparison.png").read_bytes())).width == 800


def wrong(runs, tmp_path, name):
    """Returns arguments of --compare that are wrong."""
    copy = tmp_path / "copy"
    shutil.copytree(runs / "run2", copy)
    config = json.loads((copy / "config.json").read_text())
    if name == "made by --load":
        config["flags"]["load"] = "results/run1"
    if name == "other data":
        config["digits_sha256"] = "0"
    (copy / "config.json").write_text(json.dumps(config))
    if name == "damaged log":
        (copy / "log.csv").write_text("epoch,seconds\n1,x\n")
    if name == "empty log":
        (copy / "log.csv").write_text("epoch,seconds\n")
    if name == "no log":
        (copy / "log.csv").unlink()
    if name == "no run":
        (copy / "config.json").unlink()
    return [runs / "run1", copy]


@pytest.mark.parametrize(
    "name", ["made by --load", "other data", "damaged log", "empty log", "no log", "no run"]
)
def test_wrong_folders_are_one_line(runs, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments = wrong(runs, tmp_path, name)
    assert run_main.main(["--compare", *arguments]) == 2
    assert_mentions(one_line(capsys.readouterr().err), [str(arguments[1])])
    assert names(tmp_path) == {"copy"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compare", "{runs}/run1"], "run1 two"),
        (["--compare", "{runs}/run1", "{runs}/run1"], "run1 two"),
        (["--compare", "{runs}/nothing*"], "nothing*"),
        (["--compare", "{runs}/run1", "{runs}/run2", "--seed=3"], "--compare --seed"),
        (["--compare", "{runs}/run1", "{runs}/run2", "--load={runs}/run1"], "--compare --load"),
    ],
)
def test_wrong_arguments_are_one_line(runs, capsys, arguments, words):
    assert run_main.main([argument.format(runs=runs) for argument in arguments]) == 2
    assert_mentions(one_line(capsys.readouterr().err), words)


@pytest.mark.quick
def test_code_checksum_ignores_comments_and_docstrings(tmp_path, monkeypatch):
    monkeypatch.setattr(run_main, "__file__", str(tmp_path / "run_main.py"))
    sources = {
        "one": '"""A module."""\n\ndef f(x):\n    """Doubles."""\n    return 2 * x\n',
        "same": "# A comment.\ndef f(x):\n    return 2 * x  # doubled\n",
        "other": "def f(x):\n    return 3 * x\n",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    one, same, other = (run_main.code_checksum(name) for name in sources)
    assert one == same != other


def test_a_row_has_each_seed_once(runs, tmp_path, capsys):
    again = shutil.copytree(runs / "run1", tmp_path / "run3")
    rows = compare(capsys, runs / "run1", runs / "run2", again, f"--results_path={tmp_path / 'out'}")
    assert [row["runs"] for row in rows] in (["run1, run2"], ["run3, run2"], ["run2, run3"])


@pytest.mark.quick
def test_log_px_of_different_numbers_of_samples_is_not_averaged(tmp_path):
    def row(*n_importance):
        group = []
        for i, n in enumerate(n_importance):
            metrics = {"test_log_px": -90.0 + i, "test_log_px_standard_error": 0.3, "n_importance": n}
            group.append(run_main.RecordedRun(tmp_path, {}, i, "", [], metrics if n else {}))
        return run_main.log_px_cell(group)

    assert row(5_000) == "-90.00 ± 0.30 (5,000 samples)"
    assert row(500, 500) == "-89.50 ± 0.71 (500 samples)"
    assert row(500, 5_000) == row(500, None) == row(None) == "-"
