"""Makes the folders of results/ from the commands in EXPERIMENTS, and the tables in results/README.md.

    python results/gallery.py                 makes the folders that are missing or out of date
    python results/gallery.py --only NAME ... makes only these
    python results/gallery.py --stale         lists folders that are to be made; exits with 1 if there are any
    python results/gallery.py --tables        only writes the tables

It takes hours. It can be interrupted: finished runs are kept, and an interrupted one is resumed. Runs are in
results/gallery_runs; the files to publish are copied from there, without networks and checkpoints. A folder
is out of date if its command, mnist_data.py or vae.py has changed; docstrings, comments and the classes of
other models in vae.py do not count. Changes to run_main.py, such as to the training recipe, are not noticed.
"""

import argparse
import ast
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))

import run_main  # noqa: E402
from mnist_data import write_atomically  # noqa: E402

RECORD = "gallery.json"
BEGIN = "<!-- gallery.py writes what follows, up to the end mark -->"
END = "<!-- end -->"


@dataclass
class Experiment:
    """A folder of results/ and the commands that make it."""

    name: str
    flags: str  # of python run_main.py
    pictures: tuple[str, ...] = ()  # that are published, of seed 0
    n_seeds: int = 3
    continuation: str = ""  # flags with which a second command resumes the run

    @property
    def commands(self):
        """The flags of each command, without --seed and --results_path."""
        return [self.flags, f"--resume {self.continuation}"] if self.continuation else [self.flags]

    def record(self):
        """Returns what determines the results besides the seed: the commands and the code."""
        model = run_main.parse_flags(shlex.split(self.flags)).model
        scripts = {
            "mnist_data.py": run_main.code_checksum("mnist_data.py"),
            "vae.py": run_main.code_checksum("vae.py", other_models(model)),
        }
        return {"commands": self.commands, "scripts": scripts}

    def folder(self, seed):
        """Returns the folder of a run's published files."""
        return RESULTS / self.name if seed == 0 else RESULTS / self.name / f"seed_{seed}"

    def run_folder(self, seed):
        """Returns the folder of a run, relative to the repository."""
        return Path("results", "gallery_runs", f"{self.name}_{seed}")

    def published(self, seed):
        """Returns the names of a run's published files."""
        pictures = self.pictures if seed == 0 else ()
        return ["config.json", "log.csv", "metrics.json", *pictures]

    def is_current(self, seed):
        """Returns whether everything is published, and was made by these commands and this code."""
        folder = self.folder(seed)
        is_complete = all((folder / name).exists() for name in self.published(seed))
        return is_complete and run_main.read_json(folder / RECORD) == self.record()


def other_models(model):
    """Returns the class names of all models except a model's own and those that it is derived from."""
    bases = {}
    for node in ast.parse(Path(run_main.__file__).with_name("vae.py").read_bytes()).body:
        if isinstance(node, ast.ClassDef) and node.bases:
            bases[node.name] = ast.unparse(node.bases[0])
    others = {row.class_name for row in run_main.MODELS.values()}
    used = run_main.MODELS[model].class_name
    while used in others:
        others.remove(used)
        used = bases[used]
    return frozenset(others)


PLANE = ("latent_map.png", "manifold.png", "posterior.png")
DIGITS = ("input.png", "reconstruction.png", "samples.png", "interpolation.png")
SAMPLES = ("reconstruction.png", "samples.png")
LONG = "--num_epochs 60 --n_importance 1000"
BINARIZED = "--binarize --keep_prob 1"
LOG_PX_FLAGS = "--n_importance 5000"
LABELS = "--model labels --optimizer adam --augment"
CONDITIONAL = "--model conditional --dim_z 5 --augment --num_epochs 3"

EXPERIMENTS = [
    Experiment("slides", "", (*PLANE, *DIGITS, "worst.png", "elbo.png")),
    Experiment("vae_20", "--dim_z 20", ("reconstruction.png",)),
    Experiment("no_dropout_2", "--keep_prob 1"),
    Experiment("no_dropout_20", "--dim_z 20 --keep_prob 1"),
    Experiment("dim_z_2", f"--dim_z 2 {LONG} --animate", (*PLANE, *DIGITS, "manifold.gif")),
    Experiment("dim_z_5", f"--dim_z 5 {LONG}", DIGITS),
    Experiment("dim_z_10", f"--dim_z 10 {LONG}", DIGITS),
    Experiment("dim_z_20", f"--dim_z 20 {LONG}", DIGITS),
    Experiment("denoising", "--dim_z 20 --add_noise True --num_epochs 40", ("denoising.png",)),
    Experiment("convolutional_2", "--model convolutional --learn_rate 0.005", (*PLANE, "reconstruction.png")),
    Experiment("convolutional_20", "--model convolutional --dim_z 20 --learn_rate 0.005", SAMPLES),
    Experiment("least_squares_2", "--model least_squares", ("reconstruction.png",)),
    Experiment("least_squares_20", "--model least_squares --dim_z 20", ("reconstruction.png",)),
    Experiment("vae_2", "--n_importance 1"),
    Experiment("iwae_2", "--model iwae --n_importance 1", ("posterior.png",)),
    Experiment("stein_2", "--model stein --n_samples 10 --num_epochs 10", ("posterior.png",)),
    Experiment("stick_breaking_2", "--model stick_breaking", ("simplex.png",)),
    Experiment("labels_2", "--model labels", ("latent_map.png",)),
    Experiment("conditional_2", "--model conditional", ("manifold.png", "classes.png", "analogies.png")),
    Experiment("labels_10", f"{LABELS} --dim_z 5 --num_epochs 20 --n_labels 10"),
    Experiment("labels_300", f"{LABELS} --dim_z 20 --num_epochs 5 --n_labels 300"),
    Experiment("conditional_10", f"{CONDITIONAL} --n_labels 10", ("classes.png", "analogies.png")),
    Experiment("conditional_300", f"{CONDITIONAL} --n_labels 300"),
    Experiment("binarized", f"{BINARIZED} --dim_z 50 --num_epochs 100 {LOG_PX_FLAGS}", SAMPLES, n_seeds=1),
    Experiment(
        "binarized_adam",
        f"{BINARIZED} --dim_z 50 --num_epochs 100 --optimizer adam {LOG_PX_FLAGS}",
        n_seeds=1,
    ),
    Experiment(
        "iwae", f"{BINARIZED} --model iwae --dim_z 50 --num_epochs 150 {LOG_PX_FLAGS}", SAMPLES, n_seeds=1
    ),
    Experiment(
        "iwae_50",
        f"{BINARIZED} --model iwae --dim_z 50 --num_epochs 150",
        SAMPLES,
        n_seeds=1,
        continuation=f"--n_samples 50 --num_epochs 190 {LOG_PX_FLAGS}",
    ),
    Experiment(
        "ladder",
        f"{BINARIZED} --model ladder --dim_z 32 --optimizer adam --warm_up 100 --num_epochs 200",
        ("layers.png", "samples.png"),
        n_seeds=1,
        continuation=f"--n_samples 5 --num_epochs 250 {LOG_PX_FLAGS}",
    ),
    Experiment(
        "stick_breaking",
        f"{BINARIZED} --model stick_breaking --dim_z 50 --num_epochs 100 {LOG_PX_FLAGS}",
        ("samples.png",),
        n_seeds=1,
    ),
]


# --- Runs ---------------------------------------------------------------------------------------------


def make(experiment, seed):
    """Runs the unfinished commands of an experiment, and publishes the run."""
    folder = experiment.run_folder(seed)
    record_file = ROOT / folder.with_suffix(".json")  # beside the folder, which must be empty at the start
    if run_main.read_json(record_file) != experiment.record():
        shutil.rmtree(ROOT / folder, ignore_errors=True)  # a run of other code or commands
        write_json(record_file, experiment.record())
    for command in experiment.commands:
        # A finished last command is run again: it may have been interrupted while it evaluated or drew.
        n_trained = max(run_main.checkpoint_files(ROOT / folder), default=0)
        flags = shlex.split(command)
        is_last = command == experiment.commands[-1]
        if n_trained >= run_main.make_parser().parse_args(flags).num_epochs and not is_last:
            continue
        flags += ["--seed", str(seed), "--results_path", str(folder)]
        if n_trained and "--resume" not in flags:
            flags.append("--resume")
        print("python run_main.py", shlex.join(flags), flush=True)
        subprocess.run([sys.executable, "run_main.py", *flags], cwd=ROOT, check=True)
    publish(experiment, seed)


def publish(experiment, seed):
    """Copies a run's published files and the record of what made it, in place of all earlier files."""
    folder = experiment.folder(seed)
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.is_file():  # not the folder of another seed
            file.unlink()
    for name in experiment.published(seed):
        write_atomically(folder / name, (ROOT / experiment.run_folder(seed) / name).read_bytes())
    write_json(folder / RECORD, experiment.record())


def write_json(path, content):
    """Writes a JSON file."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


# --- Tables -------------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table of results/README.md: a row per experiment."""

    title: str
    columns: dict[str, Callable]  # by heading: from an experiment and its runs' metrics to a cell
    names: str  # of the experiments


def flags_cell(experiment, metrics):
    """The flags of the commands."""
    flags = "`, then `".join(experiment.commands)
    return f"`{flags}`" if flags else "(default)"


def folder_cell(experiment, metrics):
    """The folder."""
    return f"[{experiment.name}]({experiment.name})"


def seeds_cell(experiment, metrics):
    """How many seeds are up to date."""
    return str(len(metrics))


def mean_and_error(name, digits=2, factor=1):
    """Returns a column: the mean of a metric over the seeds, and its standard error.

    For an experiment with one seed, the standard error is that over the test digits, if it was recorded.
    """

    def cell(experiment, metrics):
        values = [factor * run[name] for run in metrics if name in run]
        if not values:
            return ""
        if len(values) > 1:
            error = np.std(values, ddof=1) / math.sqrt(len(values))
        elif experiment.n_seeds == 1:
            error = factor * metrics[0].get(f"{name}_standard_error", math.nan)
        else:
            error = math.nan  # the other seeds are yet to be run
        mean = f"{np.mean(values):.{digits}f}".replace("-", "\N{MINUS SIGN}")
        return mean if math.isnan(error) else f"{mean} ± {error:.{digits}f}"

    return cell


def units_cell(experiment, metrics):
    """Active units (Burda et al. 2016) with the first seed; for a ladder, of the upper and the lower z."""
    names = ("active_units", "active_units_lower")
    return " and ".join(str(metrics[0][name]) for name in names if metrics and name in metrics[0])


FIRST_COLUMNS = {"flags": flags_cell, "folder": folder_cell, "seeds": seeds_cell}
ELBO = {"test ELBO": mean_and_error("test_elbo")}
LOG_PX = {"log p(x)": mean_and_error("test_log_px")}
QUADRATURE = {"log p(x) by quadrature": mean_and_error("test_log_px_grid")}
TERMS = {"reconstruction error": mean_and_error("test_reconstruction"), "KL": mean_and_error("test_kl")}
PSNR = {"PSNR of the reconstructions, dB": mean_and_error("psnr_reconstruction")}
NOISE = {
    "PSNR of noisy digits, dB": mean_and_error("psnr_noisy"),
    "PSNR of restored ones, dB": mean_and_error("psnr_restored"),
}
ERROR = {"test error, %": mean_and_error("test_error", factor=100)}
UNITS = {"active units": units_cell}

TABLES = [
    Table(
        "Grey levels, the lecture's network",
        FIRST_COLUMNS | ELBO | LOG_PX | QUADRATURE | PSNR,
        "slides no_dropout_2 dim_z_2 dim_z_5 dim_z_10 dim_z_20 vae_20 no_dropout_20",
    ),
    Table("Noise", FIRST_COLUMNS | ELBO | NOISE, "denoising"),
    Table(
        "Grey levels, other models",
        FIRST_COLUMNS | ELBO | TERMS | QUADRATURE | PSNR,
        "vae_2 convolutional_2 iwae_2 least_squares_2 stick_breaking_2 stein_2"
        " vae_20 convolutional_20 least_squares_20",
    ),
    Table(
        "Labels",
        FIRST_COLUMNS | ELBO | ERROR,
        "labels_10 conditional_10 labels_300 conditional_300 labels_2 conditional_2",
    ),
    Table(
        "Binarized digits",
        FIRST_COLUMNS | ELBO | LOG_PX | UNITS,
        "binarized binarized_adam iwae iwae_50 ladder stick_breaking",
    ),
]


def tables():
    """Returns all tables as Markdown."""
    experiments = {experiment.name: experiment for experiment in EXPERIMENTS}
    lines = []
    for table in TABLES:
        lines += [f"### {table.title}", "", row(table.columns), row("---" for _ in table.columns)]
        for name in table.names.split():
            experiment = experiments[name]
            current = [seed for seed in range(experiment.n_seeds) if experiment.is_current(seed)]
            metrics = [run_main.read_json(experiment.folder(seed) / "metrics.json") for seed in current]
            lines.append(row(column(experiment, metrics) for column in table.columns.values()))
        lines.append("")
    return "\n".join(lines)


def row(cells):
    """Returns a row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def write_tables():
    """Writes the tables into README.md, in place of the older ones."""
    file = RESULTS / "README.md"
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_atomically(file, f"{before}{BEGIN}\n\n{tables()}\n{END}{after}")


# --- The program --------------------------------------------------------------------------------------


def main():
    """Does what the flags ask for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", default=names, help="make only these folders"
    )
    parser.add_argument("--stale", action="store_true", help="list folders that are missing or out of date")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    stale = []
    for experiment in EXPERIMENTS:
        if experiment.name in arguments.only:
            stale += [
                (experiment, seed) for seed in range(experiment.n_seeds) if not experiment.is_current(seed)
            ]
    if arguments.stale:
        for experiment, seed in stale:
            print(experiment.folder(seed).relative_to(ROOT))
        return 1 if stale else 0
    to_make = [] if arguments.tables else stale
    try:
        for experiment, seed in to_make:
            make(experiment, seed)
    except subprocess.CalledProcessError as error:
        print(f"gallery.py: error: {experiment.name} ended with status {error.returncode}", file=sys.stderr)
        return 1
    finally:
        write_tables()
    return 0


if __name__ == "__main__":
    sys.exit(main())
