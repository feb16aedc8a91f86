"""The layout: packages stand in the order in which data walks through them, and import upwards only."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "monoformer_jax"
# A module or package imports only from those before it. Commands may use all of them.
ORDER = [
    "errors", "files", "config", "batch", "parallel", "data", "diffusion", "attention", "nn",
    "models", "runtime", "pretrained", "codecs", "sampling", "training", "evaluation", "planning",
    "api", "cli", "bench",
]  # fmt: skip
COMMANDS = {"train", "sample", "demo", "plan", "convert", "encode_latents", "evaluate"}
ENTRY = {"__init__", "__main__"}
MESH_AXES = {"fsdp", "tensor"}


def tree_of(path):
    return ast.parse(path.read_text())


def imports(path):
    """Modules and packages of ours that a file imports."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("monoformer_jax"):
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            yield from [p[1] for p in parts if p[0] == "monoformer_jax" and len(p) > 1]


def top_level(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_upwards():
    wrong, seen = [], set()
    for path in PACKAGE.rglob("*.py"):
        here = top_level(path)
        if here not in ORDER:
            continue
        for there in imports(path):
            seen.add((here, there))
            if there not in ORDER or ORDER.index(there) > ORDER.index(here):
                wrong.append(f"{path.relative_to(ROOT)} imports {there}")
    assert {
        ("training", "models"),
        ("api", "codecs"),
        ("bench", "planning"),
    } <= seen  # it finds any
    assert not wrong


def test_every_file_has_its_place():
    assert {top_level(path) for path in PACKAGE.rglob("*.py")} == set(ORDER) | COMMANDS | ENTRY


def test_mesh_axes_are_named_in_parallel_alone():
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and node.value in MESH_AXES
    }
    assert named == {"parallel.py"}


def test_files_and_functions_stay_small_enough_to_read():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 90
    ]
    long += [str(p) for p in PACKAGE.rglob("*.py") if p.read_text().count("\n") > 500]
    assert not long


@pytest.mark.parametrize("module", ["monoformer_jax", "monoformer_jax.training.loop"])
def test_the_import_is_light(module):
    """Neither tensorflow nor torch is loaded, and `import monoformer_jax` does not load jax either."""
    heavy = ["torch", "tensorflow", *(["jax"] if module == "monoformer_jax" else [])]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
