"""A stranger's machine changes nothing: the same bits in all that a run leaves, and an empty stderr."""

import json
import os
import threading

import keras
import pytest
from conftest import SMALL, one_line
from kills import differences, what_is_left

import run_main

MATPLOTLIBRC = """
image.origin: lower
savefig.dpi: 50
savefig.bbox: tight
figure.autolayout: True
text.usetex: True
font.size: 30
"""
NAME = os.fsdecode("b\\a[d*\xe9t\xe9".encode() + b"\xff")  # not even UTF-8


def test_settings_of_the_environment_and_of_keras(program, data_dir, tmp_path):
    """A program in a strange environment does what a thread does whose process has set up Keras strangely."""
    (tmp_path / ".keras").mkdir()
    settings = {"floatx": "float16", "epsilon": 0.1, "backend": "jax", "image_data_format": "channels_first"}
    (tmp_path / ".keras" / "keras.json").write_text(json.dumps(settings))
    (tmp_path / "matplotlibrc").write_text(MATPLOTLIBRC)
    env = {"HOME": str(tmp_path), "MATPLOTLIBRC": str(tmp_path)}
    env |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    env |= {"KERAS_BACKEND": "jax", "TF_USE_LEGACY_KERAS": "1"}
    env |= {"PYTHONIOENCODING": "ascii", "PYTHONSAFEPATH": "1"}
    flags = [f"--data_dir={data_dir}", *SMALL, "--num_epochs=1"]
    run = program(*flags, f"--results_path={NAME}", env=env)
    returned, folder = [], tmp_path / "thread"
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        main = threading.Thread(
            target=lambda: returned.append(run_main.main([*flags, f"--results_path={folder}"]))
        )
        main.start()
        main.join()
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    assert returned == [0]
    _, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, "")
    assert differences(what_is_left(tmp_path / NAME), what_is_left(folder)) == []


def test_the_last_words_of_tensorflow_are_shown(program, data_dir):
    run = program(f"--data_dir={data_dir}", env={"TF_XLA_FLAGS": "--no_such_flag"})
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "no_such_flag" in err
    assert "oneDNN" not in err  # a start-up message


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket", ""])
@pytest.mark.parametrize("flag", ["results_path", "data_dir", "load", "reconstruct"])
def test_paths_of_other_machines_are_refused(capsys, flag, path):
    assert run_main.main([f"--{flag}={path}"]) == 2
    assert f"--{flag}" in one_line(capsys.readouterr().err)


def test_the_home_folder_is_found():
    assert run_main.parse_flags(["--data_dir=~/mnist"]).data_dir == run_main.Path.home() / "mnist"


def test_a_name_that_is_too_long_is_a_wrong_flag(capsys, tmp_path):
    assert run_main.main([f"--results_path={tmp_path / ('x' * 300)}"]) == 2
    assert "name too long" in one_line(capsys.readouterr().err)
