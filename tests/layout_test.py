"""Package layout: layers in dependency order; a package imports only from earlier layers."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "monoformer_jax"
# A module or package imports only from those before it. Commands may use all of them.
ORDER = [
    "errors", "files", "config", "config_values", "batch", "parallel", "data", "diffusion", "attention",
    "nn", "models", "runtime", "pretrained", "codecs", "sampling", "training", "evaluation", "planning",
    "api", "cli", "bench", "page",
]  # fmt: skip
COMMANDS = {"train", "sample", "demo", "plan", "convert", "prepare_data", "evaluate", "check",
            "encode_latents", "config_keys"}  # fmt: skip
ENTRY = {"__init__", "__main__"}
MESH_AXES = {"fsdp", "tensor"}


def tree_of(path):
    return ast.parse(path.read_text())


def imports(path):
    """Modules and packages of monoformer_jax that a file imports."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("monoformer_jax"):
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            yield from [p[1] for p in parts if p[0] == "monoformer_jax" and len(p) > 1]


def top_level(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_are_from_earlier_layers():
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
    } <= seen  # the check finds imports
    assert not wrong


def names_encoding(call):
    """Whether a call names its encoding, or reads and writes no text."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name == "open":
        mode = call.args[:1] if isinstance(call.func, ast.Attribute) else call.args[1:2]
        modes = [m.value for m in [*mode, keywords.get("mode")] if isinstance(m, ast.Constant)]
        modes = [m for m in modes if isinstance(m, str)]
        is_file = isinstance(call.func, ast.Name) or any(m.strip("bt+") in "rwax" for m in modes)
        if not is_file or any("b" in m for m in modes):
            return True
    is_process = getattr(keywords.get("text"), "value", False) is True
    is_text = name in ("open", "read_text", "write_text") or is_process
    return not is_text or "encoding" in keywords


def test_text_files_are_utf_8_whatever_the_locale():
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    calls = [(p, n) for p in paths for n in ast.walk(tree_of(p)) if isinstance(n, ast.Call)]
    unnamed = [f"{p.relative_to(ROOT)}:{n.lineno}" for p, n in calls if not names_encoding(n)]
    assert not unnamed
    for bad in ("p.read_text()", "open(p)", "p.open('a')", "p.write_text(x)", "run(x, text=True)"):
        assert not names_encoding(ast.parse(bad).body[0].value)
    for good in (
        "open(p, 'rb')",
        "p.open('wb')",
        "talks.open(number)",
        "open(p, encoding='utf-8')",
    ):
        assert names_encoding(ast.parse(good).body[0].value)


def test_every_file_has_a_layer():
    assert {top_level(path) for path in PACKAGE.rglob("*.py")} == set(ORDER) | COMMANDS | ENTRY


def names_of(path):
    """Every name that a file uses, and every plain string."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Name | ast.Attribute | ast.alias):
            yield from (getattr(node, key, None) for key in ("id", "attr", "name"))
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Constant):
            yield node.value


def files_that(test, outside):
    """Files of the library, but those in `outside`, where `test` holds."""
    paths = [path for path in PACKAGE.rglob("*.py") if top_level(path) not in outside]
    return [str(path.relative_to(ROOT)) for path in paths if test(path)]


def test_models_are_used_only_through_their_registry():
    modules = {path.stem for path in (PACKAGE / "models").glob("*.py")} - {"__init__", "trainable"}
    paths = {f"monoformer_jax.models.{name}" for name in modules - {"outputs"}}

    def imports_one(path):
        return any(
            isinstance(node, ast.ImportFrom)
            and (node.module in paths or (node.module == "monoformer_jax.models"
                 and modules & {alias.name for alias in node.names}))
            for node in ast.walk(tree_of(path))
        )  # fmt: skip

    assert imports_one(PACKAGE / "models" / "__init__.py")  # the check finds imports
    assert not files_that(imports_one, outside={"models"})


def test_objectives_and_codecs_are_used_only_through_their_registries():
    def compares_kind(path):
        return any(
            isinstance(node, ast.Compare)
            and any("objective.kind" in ast.unparse(x) for x in (node.left, *node.comparators))
            for node in ast.walk(tree_of(path))
        )

    assert not files_that(compares_kind, outside={"diffusion"})
    kinds = {"ddpm", "rectified_flow"}
    named = files_that(lambda p: kinds & set(names_of(p)), outside={"diffusion", "config"})
    # A solver has the same name; released weights and a benchmark set an objective.
    assert set(named) <= {f"monoformer_jax/{name}" for name in (
        "sample.py", "pretrained/model.py", "bench/training.py", "sampling/image.py")}  # fmt: skip
    codec = files_that(lambda p: "sd_vae" in set(names_of(p)), outside={"codecs", "pretrained"})
    assert not codec


def test_few_files_take_the_whole_config():
    """Functions should take only the part of the config that they use."""

    def takes_config(path):
        return any(
            isinstance(node, ast.arg)
            and node.annotation
            and ast.unparse(node.annotation) == "Config"
            for node in ast.walk(tree_of(path))
        )

    assert len(files_that(takes_config, outside=set())) <= 10


def test_mesh_axes_are_named_only_in_parallel():
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
