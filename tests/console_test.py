"""The console: the installed package, --help without jax, --version, near misses, `config`, outputs."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tokenize

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT

from monoformer_jax.__main__ import COMMANDS, main
from monoformer_jax.bench.__main__ import BENCHES
from monoformer_jax.cli import load_config, report, shipped_configs
from monoformer_jax.config_keys import describe
from monoformer_jax.errors import InputError
from monoformer_jax.files import expand, json_with, write_json
from monoformer_jax.sampling.outputs import Outputs


def test_help_of_every_command_does_without_jax():
    lines = [[name] for name in COMMANDS] + [["bench", name] for name in BENCHES]
    code = f"""
import sys
from monoformer_jax.__main__ import main
for line in {lines!r}:
    try:
        assert main([*line, "--help"]) == 0, line
    except SystemExit as stopped:
        assert stopped.code == 0, line
print([name for name in ("jax", "gradio") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
    for name in [*COMMANDS, *BENCHES]:
        assert name in done.stdout
    assert done.stdout.count("--json FILE") >= 2 + len(BENCHES)


def test_version_and_the_list_of_commands(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("monoformer_jax 0.1.0 (jax ") and sys.version.split()[0] in said
    assert main([]) == 0 and main(["bench"]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in [*COMMANDS.values(), *BENCHES.values()])


@pytest.mark.parametrize(
    "line, message",
    [
        (["smple"], "unknown command smple; did you mean sample? (the commands are train, sample"),
        (["--verson"], "unknown option --verson; did you mean --version?"),
        (["bench", "trainings"], "unknown bench 'trainings': choose from attention, training, "
         "input_pipeline, sampling, ssm; did you mean training?"),
        (["sample", "--workdir=a", "--promt=x"], "unknown argument --promt=x; did you mean --prompt?"),
        (["sample", "--workdir=a", "train"], "unknown argument train"),
        (["train", "--workdir=a", "--config=digits", "--config.steps", "3"],
         "write --config.steps=VALUE, with = and without spaces"),
        (["config", "digit"], "pictures, showcase, transfusion_7b; did you mean digits?"),
        (["config", "digits", "--keys=smapling"], "--keys=smapling: no key begins so"),
    ],
)  # fmt: skip
def test_a_near_miss_is_named(line, message, capsys):
    try:
        code = main(line)
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and message in said and said.count("\n") == 1


def test_config_prints_every_key_with_its_value_type_and_comment(capsys, config):
    assert main(["config", "digits:tiny", "--config.steps=7"]) == 0
    printed = capsys.readouterr().out
    keys = {key.name: key for key in describe(config)}
    flat = {}

    def visit(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict) and name not in ("mixture", "records", "validation_records"):
                visit(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    visit(config.to_dict())
    assert {name: key.value for name, key in keys.items()} == flat
    for key in keys.values():
        value = 7 if key.name == "steps" else key.value
        assert f" {key.name} = {value!r}   {key.type}" in printed, key
    assert "* steps = 7   int   default 1000\n" in printed
    # Every comment of the config's source, whether beside a key or above it, is printed.
    source = (ROOT / "monoformer_jax" / "config.py").read_text()
    source = source[source.index("class DataConfig") : source.index("class OptimizerConfig")]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT]
    flowing = " ".join(printed.split())
    assert len(comments) > 8 and all(" ".join(c.split()) in flowing for c in comments)
    assert main(["config", "digits", "--keys=data.image"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  data.image_size = 8   int"
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in "\n" + printed for name in shipped_configs())


def test_a_config_is_found_by_name_and_a_file_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("digits", []) == load_config(str(ROOT / "configs" / "digits.py"), [])
    (tmp_path / "digits").write_text((ROOT / "configs" / "digits.py").read_text()
                                     .replace('c.name = "digits"', 'c.name = "mine"'))  # fmt: skip
    assert load_config("digits", []).name == "mine"


def test_errors_are_short_and_in_colour_on_terminals_alone(capsys, monkeypatch):
    report("a" * 50_000 + " is wrong\n" + "\n".join(f"line {i}" for i in range(30)))
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert len(lines) == 6 and lines[0].endswith("is wrong") and lines[-1] == "… and 26 more lines"
    assert max(map(len, lines)) <= 400 and "\033" not in said
    report("x " * 50_000 + "end")
    assert len(capsys.readouterr().err) <= 401
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report("a")
    assert capsys.readouterr().err == "\033[31merror:\033[0m a\n"
    monkeypatch.setenv("NO_COLOR", "1")
    report("a")
    assert capsys.readouterr().err == "error: a\n"


def test_the_wheel_has_the_configs_and_the_type_marker(installed, tmp_path):
    package = installed / "monoformer_jax"
    assert (package / "py.typed").is_file()
    shipped = {file.name for file in (package / "configs").iterdir()}
    assert shipped == {file.name for file in (ROOT / "configs").glob("*.py")}
    env = os.environ | {"PYTHONPATH": str(installed)}
    code = "import monoformer_jax.cli as cli; print(cli.find_config('digits'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{package / 'configs' / 'digits.py'}\n"


PIXELS = [np.full((4, 4, 1), value, np.float32) for value in (-1.0, 0.0, 1.0)]


def test_outputs_are_a_grid_or_a_file_each(tmp_path):
    grid = Outputs.open(f"{tmp_path}/a.png", None, expand(tmp_path / "a.npz"))
    grid.write(PIXELS, 3)
    grid.write_record({"seed": 3})
    assert PIL.Image.open(tmp_path / "a.png").size == (384, 128)
    assert json.loads((tmp_path / "a.json").read_text())["seed"] == 3
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].shape == (3, 4, 4, 3)
        assert arrays["arr_0"][:, 0, 0, 0].tolist() == [0, 128, 255]
    for suffix in ("jpg", "webp"):
        Outputs.open(f"{tmp_path}/b.{suffix}", None, None).write(PIXELS, 3)
        assert PIL.Image.open(tmp_path / f"b.{suffix}").size == (384, 128)
    each = Outputs.open(f"{tmp_path}/each/", None, None)
    each.write(PIXELS, 3)
    names = sorted(file.name for file in (tmp_path / "each").iterdir())
    assert names == ["00001.png", "00002.png", "00003.png"]
    values = [int(np.asarray(PIL.Image.open(tmp_path / "each" / name))[0, 0]) for name in names]
    assert values == [0, 128, 255]
    # What `sample` wrote, it may replace.
    for out in ("a.png", "b.jpg", "b.webp", "each", "each/"):
        Outputs.open(f"{tmp_path}/{out}", None, expand(tmp_path / "a.npz")).write(PIXELS[:1], 1)


def test_outputs_do_not_replace_files_of_others(tmp_path):
    picture = PIL.Image.new("RGB", (4, 4))
    (tmp_path / "each").mkdir()
    picture.save(tmp_path / "mine.png")
    picture.save(tmp_path / "each" / "00007.png")
    write_json(tmp_path / "config.json", {"model": {}})
    np.savez(tmp_path / "mine.npz", np.zeros(3))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for out, record, arrays, message in (
        ("mine.png", None, None, "--out=.*mine.png exists, and this command did not write it"),
        ("config.png", None, None, "--out=.*config.json exists, and this command did not"),
        ("each/", None, None, "--out=.*00007.png exists, and this command did not"),
        ("new.png", "config.json", None, "--json=.*config.json exists, and this command did not"),
        ("new.png", None, "mine.npz", "--npz=.*mine.npz exists, and this command did not"),
        ("new.png", None, "new.txt", "--npz=.*new.txt must end in .npz"),
        ("new.tif", None, None, "new.tif: end it in .png, .jpg"),
        ("new", None, None, "new: end it in .png, .jpg"),
        ("none/new.png", None, None, "there is no folder .*none"),
        ("mine.png/", None, None, "--out=.*mine.png/ is a file, not a folder"),
        ("mine.png/x.png", None, None, "there is no folder .*mine.png"),
    ):
        paths = [None if name is None else expand(tmp_path / name) for name in (record, arrays)]
        with pytest.raises(InputError, match=message):
            Outputs.open(f"{tmp_path}/{out}", *paths)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_outputs_go_to_a_bucket(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    for name in ("gs", "gcs"):
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, MemoryFileSystem)
    for out in ("gs://bucket/run/a.png", "gs://bucket/each/"):
        outputs = Outputs.open(out, None, expand("gs://bucket/a.npz"))
        outputs.write(PIXELS, 3)
        outputs.write_record({"seed": 1})
        Outputs.open(out, None, expand("gs://bucket/a.npz"))
    stored = {path for path in MemoryFileSystem.store if not path.endswith("/")}
    MemoryFileSystem.store.clear()
    assert {path.removeprefix("gs://bucket/") for path in stored} == {
        "run/a.png", "run/a.json", "a.npz", "each/samples.json",
        "each/00001.png", "each/00002.png", "each/00003.png",
    }  # fmt: skip


def test_a_json_of_another_command_is_not_replaced(tmp_path):
    ours = json_with("steps", "train_seconds")
    for text, is_ours in (('{"steps": 1, "train_seconds": 2, "x": 3}', True), ("{}", False),
                          ("[1]", False), ("no", False), ("[" * 100_000, False)):  # fmt: skip
        file = tmp_path / "a.json"
        file.write_text(text)
        assert ours(expand(file)) == is_ours, text[:20]


def test_paths_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.fspath(expand("~/x")) == str(tmp_path / "x")
    for path, message in (
        ("", "'' is not a path"),
        (None, "None is not a path"),
        ("a\0b", "is not a path"),
        ("http://example.org/a", "neither on this machine nor on gs://, s3://"),
        ("gs:/bucket", "neither on this machine nor on gs://, s3://"),
        ("s3://bucket/a", "needs a package: pip install s3fs"),
    ):
        with pytest.raises(InputError, match=message):
            expand(path)


def test_a_negative_prompt_needs_guidance(config):
    with pytest.raises(
        InputError, match=r"negative_prompt needs a sampling\.guidance other than 1"
    ):
        dataclasses.replace(config.sampling, negative_prompt="a", guidance=1.0)
