"""The house: a room imports only from the rooms that data walked through before it."""

import ast

from conftest import ROOT

PACKAGE = ROOT / "monoformer_jax"
ROOMS = [
    "config", "cli", "batch", "attention", "nn", "models", "diffusion", "data", "parallel", "training",
    "generation", "pretrained", "evaluation", "bench",
]  # fmt: skip
ONLY_FOR_COMMANDS = ("pretrained", "evaluation", "bench")


def imports(path):
    """Rooms of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("monoformer_jax"):
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            yield from [p[1] for p in parts if p[0] == "monoformer_jax" and len(p) > 1]


def room(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_a_room_imports_only_from_rooms_above():
    wrong, seen = [], set()
    for path in PACKAGE.rglob("*.py"):
        here = room(path)
        if here not in ROOMS:
            continue  # a command: it may use every room
        for there in imports(path):
            seen.add((here, there))
            if ROOMS.index(there) > ROOMS.index(here):
                wrong.append(f"{path.relative_to(ROOT)} imports {there}")
            if there in ONLY_FOR_COMMANDS and there != here and here != "bench":
                wrong.append(f"{path.relative_to(ROOT)} imports {there}, which is for commands")
    assert ("training", "models") in seen  # the walk finds imports at all
    assert not wrong


def test_every_file_is_in_a_room_or_a_command():
    commands = {"train", "sample", "demo", "plan", "convert", "encode_latents", "evaluate", "cli",
                "api", "__init__", "__main__"}  # fmt: skip
    assert {room(path) for path in PACKAGE.rglob("*.py")} <= commands | set(ROOMS)


def test_the_import_is_light():
    """`import monoformer_jax` and the model pull in neither tensorflow nor torch."""
    import subprocess
    import sys

    code = "import sys, monoformer_jax.training.loop; print([m for m in ('torch', 'tensorflow') if m in sys.modules])"  # noqa: E501
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
