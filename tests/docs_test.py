"""README, CONTRIBUTING and docs/: links, names of files and config keys, and every command.

A ```bash or ```python block runs word for word, beside configs/, launch/, tests/ and a trained
runs/digits. With the line `<!-- not run here: reason -->` above it, only syntax and flags are checked.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT

from monoformer_jax.__main__ import COMMANDS, command_module
from monoformer_jax.bench.__main__ import BENCHES, bench_arguments
from monoformer_jax.errors import InputError
from monoformer_jax.models import MODELS, base_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.is_file()]

TINY = "--config=configs/digits.py:tiny"
# Appended to the commands of the pages, where the last value of a flag counts: the same work, smaller.
SMALLER = {
    "train": [TINY, "--config.steps=2", "--processes=1"],
    "prepare_data": ["--processes=1"],
    "sample": ["--steps=1", "--max_tokens=2", "--processes=1"],
    # The sampler compiles faster; plan_test.py compiles the training step.
    "plan": [TINY, "--topology=v5e:1x1", "--mesh=data=1,fsdp=1", "--mode=sample"],
}
# What a model of two steps does not do by itself, and what has another size: text in the command ->
# arguments that are appended too.
ALSO = {"--out=": ["--paint"], "--total=": ["--total=2", "--batch=1"]}
# Commands whose arguments are checked, and which do not run here.
PARSED_ONLY = {
    "demo": "serves until it is stopped; demo_test.py starts it",
    "evaluate": "generates 1000 images; commands_test.py runs it",
    **{f"bench {name}": f"minutes; bench_{name}_test.py runs it" for name in BENCHES},
}
# Other commands of blocks without a mark, checked by `bash -n` alone.
ALLOWED = {
    r"bash launch/(demo|test)\.sh( .*)?": "trains for minutes; runs every test",
    r"monoformer --version": "console_test.py runs it",
    r"launch/(tpu|gpu)\.sh .*": "launch_test.py runs them with --dry-run",
    r"source \.venv/bin/activate": "the tests are in their environment already",
    r"python3? -m venv .*": "the same",
    r"(\S*/)?pip install .*": "needs a network",
    r"git clone .*": "needs a network",
    r"cd \S+": "after git clone",
    r"apt-get .*": "needs a network and root",
    r"python -m pytest.*": "these are the tests",
    r"python tests/page_load\.py.*": "minutes; demo_test.py runs it",
    r"python tests/chaos\.py .*": "minutes; chaos_test.py runs it",
}
# Small commands that write the input of others, run by bash.
SHELL = ("cat", "cp", "echo", "head", "ls", "mkdir", "printf")
# Paths that a reader makes.
EXAMPLES = {"configs/mine.py", "models/toy.py"}
SOURCES = (".py", ".sh", ".md", ".yaml", ".yml", ".ipynb", ".lock", ".toml", ".cff")
FILES = (".safetensors", ".json", ".jsonl", ".npz", ".png", ".txt", ".bin", ".html")
OURS = ("monoformer_jax/", "tests/", "configs/", "launch/", "docs/")
GROUPS = ("data", "model", "optimizer", "objective", "sampling", "loss", "lora", "mesh")


@dataclasses.dataclass(frozen=True)
class Block:
    where: str  # PAGE:LINE
    language: str
    text: str
    reason: str | None  # why it does not run here


def read(page: Path) -> tuple[str, list[Block]]:
    """The text of a page without its fenced blocks, and the blocks."""
    prose, blocks, inside = [], [], None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if inside is None and line.strip().startswith("```"):
            mark = re.fullmatch(r"<!-- not run here: (.+) -->", lines[number - 1].strip())
            where, language = f"{page.name}:{number + 1}", line.strip()[3:]
            inside = where, language, mark and mark[1], []
        elif inside is not None and line.strip() == "```":
            where, language, reason, body = inside
            blocks.append(Block(where, language, textwrap.dedent("\n".join(body)) + "\n", reason))
            inside = None
        else:
            (prose if inside is None else inside[3]).append(line)
    assert inside is None, f"{page.name}: a block is not closed"
    return "\n".join(prose), blocks


READ = {page: read(page) for page in PAGES}
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them, and explicit ones."""
    prose, found = READ[page][0], set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose, re.M):
        text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text.replace("`", "")).replace(" ", "-")
        same = [x for x in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", x)]
        found.add(f"{name}-{len(same)}" if same else name)
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', prose))


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200, f"README.md has {len(lines)} lines"


def test_figures_are_those_that_evaluate_wrote():
    """The scores in the JSON files, where README, docs/ and the configs repeat them."""
    scores, other, found = (
        *(
            json.loads((ROOT / "docs" / f"{name}_scores.json").read_text())
            for name in ("digits", "digits_diffussm")
        ),
        set(),
    )
    scores |= {f"diffussm_{name}": value for name, value in other.items()}
    mark = r"([\d.,]+)( %| s|)\s*<!-- measure: (\w+) -->"
    for page, (prose, _) in READ.items():
        for figure, unit, name in re.findall(mark, prose):
            if name in scores:
                scale, digits = {" %": (100, 1), " s": (1, 0), "": (1, 2)}[unit]
                want = f"{scale * scores[name]:.{digits}f}"
                assert figure == want, (
                    f"{page.name}: {name} is {figure}, but was measured as {want}"
                )
                found |= {name} if page.name == "README.md" else set()
    assert found == {f"{task}_accuracy" for task in ("draw", "read", "say")} | {
        "frechet", "opens_image", "train_seconds", "diffussm_draw_accuracy", "diffussm_frechet"
    }  # fmt: skip
    config = (ROOT / "configs" / "digits_diffussm.py").read_text()
    words = "{train_seconds:.0f} s for 1,000 steps; draw {draw_accuracy:.1%}, Fréchet {frechet:.2f}"
    assert words.format(**other).replace("%", " %") in config
    config = (ROOT / "configs" / "digits.py").read_text()
    for words in ("{train_seconds:.0f} s for", "draw {draw_accuracy:.1%}, Fréchet {frechet:.2f}",
                  "read {read_accuracy:.1%}, say {say_accuracy:.1%}"):  # fmt: skip
        words = words.format(**scores).replace("%", " %")
        assert words in config, words


@PAGE
def test_links(page):
    prose, broken = READ[page][0], []
    prose = re.sub(r"`[^`\n]*`", "", prose)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose)
    targets += re.findall(r"^\[[^]]+\]: *(\S+)", prose, re.M)
    targets += re.findall(r'(?:src|href)="([^"]+)"', prose)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        known = anchors(there) if there in READ else ()
        if not there.exists() or not there.is_relative_to(ROOT) or (anchor and anchor not in known):
            broken.append(target)
    assert not broken, f"{page.name}: {', '.join(broken)}"


def is_there(path: str) -> bool:
    """Whether a path, perhaps with a config's argument or a *, is in the repository."""
    path = path.partition(":")[0].rstrip("/")
    return any(path and list(root.glob(path)) for root in (ROOT, ROOT / "monoformer_jax"))


@PAGE
def test_paths(page):
    """Paths in backticks, and files of ours in commands."""
    prose, blocks = READ[page]
    spans = re.findall(r"`([^`\n]+)`", prose)
    words = [span.strip() for span in spans if re.fullmatch(r"[\w./*:-]+", span.strip())]
    named = [w for w in words if w.startswith(OURS) or ("/" in w and w.endswith(SOURCES))]
    text = "\n".join([*spans, *(b.text for b in blocks if b.language == "bash")])
    named += re.findall(
        r"(?:^|[\s=])((?:configs|launch|tests|monoformer_jax)/[\w./-]+)", text, re.M
    )
    missing = {name for name in named if not is_there(name)} - EXAMPLES
    assert not missing, f"{page.name}: {', '.join(sorted(missing))}"


def is_key(key: str) -> bool:
    """Whether the config of a model has this key."""
    return any(is_key_of(key, base_config(kind).to_dict()) for kind in MODELS)


def is_key_of(key: str, value: dict) -> bool:
    """Whether a config has this key; those of data.mixture and data.records are free."""
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
        if name in ("mixture", "records"):
            return True
    return True


@PAGE
def test_config_keys(page):
    """`--config.a.b` anywhere; `group.key` in backticks, unless it is a module, a call or a file."""
    prose, blocks = READ[page]
    everything = "\n".join([prose, *(block.text for block in blocks)])
    keys = set(re.findall(r"--config\.([A-Za-z_][\w.]*\w)", everything)) - {"a.b", "group.key"}
    for span in re.findall(r"`([^`\n]+)`", prose):
        for key in re.findall(
            rf"(?<![\w./])((?:{'|'.join(GROUPS)})\.[a-z_][\w.]*\w)(?![\w(/])", span
        ):
            module = ROOT / "monoformer_jax" / f"{key.replace('.', '/')}.py"
            if not module.is_file() and not key.endswith(FILES):
                keys.add(key)
    unknown = {key for key in keys if not is_key(key)}
    assert not unknown, f"{page.name}: {', '.join(sorted(unknown))}"


def commands(block: Block) -> list[str]:
    """One line per command; continued lines are joined, comments and blank lines are dropped."""
    lines = [line.strip() for line in re.sub(r"\\\n\s*", " ", block.text).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    return [x for line in lines for x in ([line] if '"' in line else line.split(" && "))]


def of_ours(line: str) -> tuple[str, list[str]] | None:
    """Name and arguments of a `python -m monoformer_jax.NAME` or `monoformer NAME`; None of others."""
    match = re.match(r"(?:\S*python3? -m monoformer_jax[. ]|monoformer )(\w+)(?: |$)(.*)", line)
    if not match:
        return None
    name, arguments = match[1], shlex.split(match[2], comments=True)
    if name == "bench":
        name, arguments = f"bench {arguments[0]}", arguments[1:]
    assert name in COMMANDS or name.removeprefix("bench ") in BENCHES, line
    return name, [x for x in arguments if x not in ("…", "...", "&")]


def parse(name: str, arguments: list[str]):
    """The command's module and its parsed arguments; AssertionError for an unknown flag."""
    bench = name.startswith("bench ")
    command = None if bench else command_module(name)
    parser = argparse.ArgumentParser()
    (bench_arguments(name[6:]) if bench else command.add_arguments)(parser)
    try:
        args, args.overrides = parser.parse_known_args(arguments)
    except SystemExit:
        raise AssertionError(f"{name} refuses {shlex.join(arguments)}") from None
    unknown = [x for x in args.overrides if not x.startswith("--config.")]
    assert not unknown and (hasattr(args, "config") or not args.overrides), (
        f"{name}: {args.overrides}"
    )
    return command, args


@PAGE
def test_syntax_and_flags(page):
    """Of every bash block, those that do not run here included."""
    for block in READ[page][1]:
        if block.language not in ("bash", "sh"):
            continue
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.where}: {done.stderr}"
        for line in commands(block):
            found = of_ours(line)
            if found and "--help" not in found[1]:
                try:
                    parse(*found)
                except AssertionError as error:
                    raise AssertionError(f"{block.where}: {error}") from None


def run(name: str, arguments: list[str], planned: set[str]) -> None:
    """Runs a command in this process, with the appended arguments of the tables above.

    Args:
      planned: what `plan` has compiled already: without its own config, most of it is the same.
    """
    if name in PARSED_ONLY or "--help" in arguments:
        return
    extra = [*SMALLER.get(name, [])]
    if name == "train" and "pictures.py" in arguments[0]:  # what follows is of its records
        extra[extra.index(TINY)] = "--config.model.num_layers=1"
    if any(x.startswith("--process=") for x in arguments):  # one of several, started apart
        extra.remove("--processes=1")
    for text, more in ALSO.items():
        extra += more if name == "sample" and any(x.startswith(text) for x in arguments) else []
    command, args = parse(name, [*arguments, *extra])
    if name == "plan":
        work = str(args.overrides)
        if work in planned or importlib.util.find_spec("libtpu") is None:
            return
        planned.add(work)
    code = command.main(args)
    assert not code, f"exit code {code}"


def run_line(line: str, folder: Path, planned: set[str]) -> None:
    if found := of_ours(line):
        run(*found, planned)
    elif line.split()[0] in SHELL:
        subprocess.run(["bash", "-c", line], cwd=folder, check=True, capture_output=True)
    else:
        allowed = any(re.fullmatch(pattern, line.split("  #")[0]) for pattern in ALLOWED)
        assert allowed, "neither a command of ours nor in ALLOWED: mark its block, or add it"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder like the repository after the demo, its model tiny and trained for two steps."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "launch", "tests", "docs"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("train", [TINY, "--workdir=runs/digits"], set())
    return folder


@pytest.fixture(scope="module")
def planned():
    return set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "extending.md"],  # extending_test.py runs that page
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_and_examples_run(page, trained, planned, tmp_path, monkeypatch):
    """In the order of the page: a reader goes from top to bottom."""
    folder, scope = tmp_path / "checkout", {"__name__": page.stem}
    shutil.copytree(trained, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for block in READ[page][1]:
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile(block.text, block.where, "exec"), scope)
        for line in commands(block) if block.language in ("bash", "sh") else ():
            try:
                run_line(line, folder, planned)
            except (AssertionError, InputError, OSError, subprocess.SubprocessError) as error:
                raise AssertionError(f"{block.where}: {line}\n{error}") from error
