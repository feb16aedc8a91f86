"""The commands in subprocesses: --help, bad input, a complete tiny run, and a killed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import PIL.Image
import pytest
from conftest import ROOT

TINY = "--config=configs/digits.py:tiny"


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "monoformer_jax", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["train", "sample", "evaluate"])
def test_help_shows_an_example_command(name):
    done = command(name, "--help")
    assert done.returncode == 0 and f"python -m monoformer_jax.{name} --" in done.stdout


def test_the_list_of_commands_and_an_unknown_one():
    done = command("--help")
    assert done.returncode == 0 and "evaluate" in done.stdout
    done = command("paint")
    assert done.returncode == 2 and "train" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", TINY, "--config.model.depth=3"], "unknown config key model.depth"),
        (["train", TINY, "--config.mesh.tensor=3"], "tensor=3 does not fit 1 devices"),
        (["train", TINY, "--config.data.mixture.dance=1"], "mixture.dance is not a source"),
        (["train", "--config=configs/none.py"], "none.py: no such file"),
        (["sample", "--prompt=a"], "holds no trained model"),
        (["evaluate"], "holds no trained model"),
    ],
)
def test_bad_input_prints_one_line_exits_with_2_and_writes_nothing(tmp_path, arguments, message):
    done = command(*arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_sample_and_evaluate_a_tiny_model(tmp_path, installed):
    """With what the wheel installs, in an empty folder."""
    run, env = "--workdir=run", os.environ | {"PYTHONPATH": str(installed)}

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "monoformer_jax", *map(str, arguments)],
            cwd=tmp_path, env=env, capture_output=True, text=True,
        )  # fmt: skip

    done = command("train", "--config=digits:tiny", run)
    assert done.returncode == 0, done.stderr
    assert "step 20/20" in done.stdout and "Total: 56,964" in done.stdout

    done = command("evaluate", run, f"--json={tmp_path / 'scores.json'}")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {
        "draw_accuracy", "frechet", "frechet_real", "read_accuracy", "say_accuracy", "opens_image",
        "steps", "train_seconds", "workdir", "checkpoint_step", "ema", "seeds", "extractor", "solver",
        "sampling_steps", "guidance", "guidance_low", "guidance_high", "guidance_rescale",
    }  # fmt: skip
    assert scores["steps"] == 20 and scores["frechet"] > 2 * scores["frechet_real"]
    for name in ("samples.png", "loss.png"):
        assert PIL.Image.open(tmp_path / "run" / name).size[0] > 500

    # A model trained for 20 steps does not emit <|im_start|> by itself, so only text is expected.
    done = command("sample", run, "--prompt=draw a one", "--max_tokens=4", "--temperature=1")
    assert done.returncode == 0 and done.stdout.startswith("'draw a one' -> '")
    picture = tmp_path / "broken.png"
    picture.write_bytes(b"no picture")
    done = command("sample", run, "--prompt=read this: ", f"--image={picture}")
    assert done.returncode == 2 and "cannot be read as an image" in done.stderr


def losses(workdir):
    file = workdir / "metrics.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line that is still being written
        found.append((values["step"], values["loss"]))
    return found


@pytest.mark.slow
def test_a_run_killed_twice_is_bit_exact_with_an_uninterrupted_run(tmp_path):
    train = ["train", TINY, "--config.steps=120", "--config.checkpoint_every=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*train, f"--workdir={whole}").returncode == 0
    draw = random.Random(0)
    for earliest in (draw.randrange(21, 40), draw.randrange(61, 80)):
        process = subprocess.Popen(
            [sys.executable, "-m", "monoformer_jax", *train, f"--workdir={killed}"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and max([0, *dict(losses(killed))]) < earliest:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before the kill"
    done = command(*train, f"--workdir={killed}")
    assert done.returncode == 0, done.stderr
    assert "from step 0 " not in done.stdout
    assert losses(killed) == losses(whole)
    assert [step for step, _ in losses(killed)] == list(range(1, 121))
