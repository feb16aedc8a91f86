"""Golden values: results that renaming or moving code must not change.

`data/golden.json` holds: of every shipped config, shrunk, with flow and with DDPM,
hashes of the first 3 batches and losses and norms of 5 steps; images of every solver with 1 to 3
branches of guidance; a conversation in a `Session`; a `convert` round trip; the output of `plan`. Names
of the library are only in the imports and in the tables after them: a rename edits their right sides,
not the record.

    GOLDEN_RECORD=1 python -m pytest tests/golden_test.py -n 0         regenerates it
    GOLDEN_RECORD=FILE python -m pytest tests/golden_test.py -n 0      writes FILE instead, to compare

Regenerate it only if arithmetic really changes, and state by how much in the commit; `-k` regenerates
only that part.

Hashes, tokens and counts must be equal, numbers within 1e-5: losses and norms relative, image values
relative to the largest in the image. Measured on an AVX2 processor, against code for SSE4.2 and against
XLA's other fusion emitters, which round differently: at most 2e-7 in the first step and in the later
ones, 1.1e-6 in how far the EMA is from the weights, 8e-7 in images; every token of the conversation was
equal, also with noise of 1e-4 on the weights. Compiler results of `plan` may differ by a quarter, as
libtpu is not pinned.
"""

import argparse
import hashlib
import itertools
import json
import os
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from conftest import REFERENCE, ROOT
from etils import epath

# Current names of the library.
from monoformer_jax import convert, plan
from monoformer_jax.cli import load_config
from monoformer_jax.data import sources as sources_module
from monoformer_jax.data.documents import Features, Image, Prompt
from monoformer_jax.data.pipeline import Batches
from monoformer_jax.data.records import write_file
from monoformer_jax.data.sources import Source
from monoformer_jax.data.templates import chat_parts
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.parallel import make_mesh, put_batch
from monoformer_jax.runtime.weights import load_trained
from monoformer_jax.sampling.image import generate_images
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.session import Session
from monoformer_jax.sampling.text import SamplingParams
from monoformer_jax.training.loop import _start
from monoformer_jax.training.state import abstract_train_state, make_train_step

# Name in the record (never changes): current name.
FIELDS = {"tokens": "tokens", "kinds": "token_types", "segment_ids": "segment_ids",
          "positions": "positions", "image_ids": "image_ids", "denoise": "denoise",
          "patches": "patches", "patch_logvar": "patch_logvar", "grid": "patch_positions",
          "features": "features", "targets": "targets",
          "target_weights": "target_weights"}  # fmt: skip
METRICS = {"loss": "loss", "text_loss": "text_loss", "image_loss": "image_loss",
           "grad_norm": "grad_norm", "param_norm": "param_norm"}  # fmt: skip
PLAN = {"fits": "fits", "hbm_gib": "hbm_gib", "parameters": "parameters",
        "flops_per_step": "flops_per_step", "arguments_gib": "arguments_gib",
        "temporaries_gib": "temporaries_gib", "peak_gib": "peak_gib",
        "step_seconds_floor": "step_seconds_floor"}  # fmt: skip
# Renamed config keys and values that this file sets: name in this file -> current name.
KEYS = {"data.row_length": "data.max_seq_len",
        "optimizer.accumulation": "optimizer.grad_accum_steps",
        "model.learn_sigma": "objective.learn_sigma"}  # fmt: skip
VALUES: dict[str, str] = {}
OURS = "monoformer_jax"  # key of an exported config.json that holds our own config


def raw_parameters(state):
    """Trained parameters and their EMA."""
    return state.params, state.ema


RECORD = Path(__file__).parent / "data" / "golden.json"
# One forward and backward pass; four more with the optimizer between them; images. See above.
FIRST, LATER, PIXELS = 1e-5, 1e-5, 1e-5

SMALL = {"model.num_layers": 2, "model.embed_dim": 32, "model.num_heads": 4,
         "model.num_kv_heads": 2, "model.head_dim": 8, "model.mlp_dim": 64,
         "model.vocab_size": 262, "model.dtype": "float32", "data.tokenizer": "bytes",
         "data.image_size": 8, "data.row_length": 96, "batch_size": 4}  # fmt: skip
TUNED = {"model.dtype": "float32", "data.tokenizer": "bytes", "data.row_length": 96,
         "batch_size": 4, "optimizer.warmup_steps": 2}  # fmt: skip
DIGITS = {"optimizer.warmup_steps": 2}  # of 20 steps: the learning rate rises and falls
FLOW = {"objective.kind": "rectified_flow", "sampling.solver": "heun"}
DDPM = {"objective.kind": "ddpm", "sampling.solver": "ddpm", "model.learn_sigma": True}
MESH = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 2}
FEATURES = {"model.feature_dim": 12, "optimizer.accumulation": 2} | MESH
# Name: config and overrides. Cases that differ only in data share one compiled program.
TRAINED = {
    "digits": ("digits.py:tiny", DIGITS),
    "digits ddpm": ("digits.py:tiny", DIGITS | DDPM),
    "imagenet256": ("imagenet256.py", SMALL),
    "imagenet256 ddpm": ("imagenet256.py", SMALL | DDPM),
    "journeydb_ultrachat": ("journeydb_ultrachat.py", SMALL),
    "journeydb_ultrachat ddpm": ("journeydb_ultrachat.py", SMALL | DDPM),
    "llava_journeydb features accumulation mesh": ("llava_journeydb.py", SMALL | FEATURES),
    "llava_journeydb ddpm": ("llava_journeydb.py", SMALL | DDPM),
    "finetune": ("finetune.py", TUNED | FLOW),
    "finetune ddpm": ("finetune.py", TUNED),
}
WORDS = ("red", "blue", "old", "new", "big", "cat", "dog", "sun", "sea", "tree", "house", "boat")


def settings(file, changes):
    """A shipped config with overrides; keys and values as named in the record."""
    overrides = []
    for key, value in changes.items():
        value = VALUES.get(value, value) if isinstance(value, str) else value
        overrides.append(f"--config.{KEYS.get(key, key)}={value!r}")
    return load_config(f"{ROOT / 'configs' / file}", overrides)


@pytest.fixture(scope="module")
def record():
    """The expected values; when recording, the values of the tests are written at the end."""
    target = os.environ.get("GOLDEN_RECORD")
    if not target:
        yield json.loads(RECORD.read_text())
        return
    made = json.loads(RECORD.read_text()) if target == "1" and RECORD.exists() else {}
    yield made
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(made.items())]
    path = RECORD if target == "1" else Path(target)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def check(record, name, got, **bounds):
    """Compares a value with the record, or records it. `bounds` maps a key to (relative tolerance,
    tolerance relative to the largest number).

    Keys without bounds must be equal.
    """
    if os.environ.get("GOLDEN_RECORD"):
        record[name] = json.loads(json.dumps(got, default=_plain))
        return
    got, want = json.loads(json.dumps(got, default=_plain)), record[name]
    assert got.keys() == want.keys()
    for key, value in want.items():
        if key in bounds:
            rtol, atol = bounds[key]
            atol *= np.abs(value).max()
            np.testing.assert_allclose(got[key], value, rtol, atol, err_msg=f"{name}: {key}")
        else:
            assert got[key] == value, f"{name}: {key}"


def _plain(value):
    """Converts arrays to lists of numbers with the precision of float32."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        return [_plain(x) for x in np.asarray(value).reshape(-1)]
    return float(f"{float(value):.8g}")


def digest(arrays):
    """SHA-256 of names and arrays, in the given order."""
    found = hashlib.sha256()
    for name, array in arrays:
        found.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Folders of records: captions with latents, conversations with latents, conversations only."""
    rng, made = np.random.default_rng(0), {}

    def words(count):
        return " ".join(rng.choice(WORDS, count))

    def latents():
        mean, logvar = rng.integers(-512, 512, (2, 8, 8, 4)) / 256
        return mean, logvar - 4

    def talk(*texts):
        roles = itertools.cycle(("user", "assistant"))
        return chat_parts([{"role": r, "content": t} for r, t in zip(roles, texts)])[:-1]

    def captioned():
        prompt, (mean, logvar) = Prompt((words(2), words(3))), latents()
        return [prompt, Image(mean, denoise=True, logvar=logvar)]

    def shown():
        said, (mean, logvar) = talk(words(1), words(2)), latents()
        return [Image(mean, denoise=False, logvar=logvar), *said]

    kinds = {
        "captions": captioned,
        "looks": shown,
        "talks": lambda: talk(words(1), words(1), words(1), words(1)),
    }
    for name, example in kinds.items():
        folder = epath.Path(tmp_path_factory.mktemp(name))
        write_file(folder / "records-00000-of-00001.array_record", [example() for _ in range(40)])
        shape = None if name == "talks" else [8, 8, 4]
        info = {"examples": 40, "files": 1, "shape": shape}
        (folder / "info.json").write_text(json.dumps(info))
        made[name] = str(folder)
    journey, chat, looks = made["captions"], made["talks"], made["looks"]
    return {
        "digits": {},
        "imagenet256": {"imagenet": journey},
        "journeydb_ultrachat": {"journeydb": journey, "ultrachat": chat},
        "llava_journeydb": {"llava": looks, "journeydb": journey},
        "finetune": {"pictures": journey},
    }


def seen(_, channels):
    """A source of vision encoder features, which records do not support."""
    rng = np.random.default_rng(1)
    features = rng.integers(-512, 512, (20, 5, 12)) / 256
    return Source(list(features), lambda x, rng: ["what is it? ", Features(x), rng.choice(WORDS)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three folders, each converted from the one before: the original's, a workdir, the original's.

    The first is the recorded tiny model of the original, with the vocabulary of the byte tokenizer
    and a head that emits <|im_start|> and </s> often.
    """
    folders = [tmp_path_factory.mktemp("base") / name for name in ("theirs", "ours", "again")]
    theirs = REFERENCE / "tiny_a"
    tensors = safetensors.numpy.load_file(theirs / "weights.safetensors")
    rng = np.random.default_rng(2)
    # Standard deviations of the recorded ones, as constants: computing them depends on the processor.
    scales = {"model.embed_tokens.weight": 0.49829173, "lm_head.weight": 0.07945232}
    for name, scale in scales.items():
        size = (ByteTokenizer.vocab_size, tensors[name].shape[1])
        tensors[name] = (scale * (rng.random(size, np.float32) - 0.5) * 3.5).astype(np.float32)
    tensors["lm_head.weight"][[ByteTokenizer.im_start_id, ByteTokenizer.eos_id]] *= 4
    values = json.loads((theirs / "config.json").read_text())
    folders[0].mkdir()
    values |= {"vocab_size": ByteTokenizer.vocab_size}
    (folders[0] / "config.json").write_text(json.dumps(values))
    safetensors.numpy.save_file(tensors, folders[0] / "model.safetensors")
    for source, to in itertools.pairwise(folders):
        command(convert, f"--from={source}", f"--to={to}")
    return folders


def command(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args, args.overrides = parser.parse_known_args(arguments)
    return module.main(args)


@pytest.fixture(scope="module")
def programs():
    """Cache of compiled train steps."""
    return {}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "digits" else pytest.mark.slow) for n in TRAINED],
)
def test_training(name, record, records, programs, request, monkeypatch):
    """Bit-exact first batches; losses and norms of the first step and of the next four."""
    file, changes = TRAINED[name]
    folders = records[file.partition(".")[0]]
    if file == "finetune.py":
        file = f"finetune.py:{request.getfixturevalue('base')[1]}"
    if "features" in name:
        monkeypatch.setitem(sources_module.SOURCES, "llava", seen)
        folders = {"journeydb": folders["journeydb"]}
    config = settings(
        file, changes | {"data.records": folders} | json.loads(os.environ.get("GX", "{}"))
    )
    mesh = make_mesh(config.mesh, jax.devices()[: 4 if "mesh" in name else 1])
    batches = Batches(config, ByteTokenizer()).iterator
    plain = changes | {"name": "", "data.mixture": {"any": 1.0}, "data.records": {}}
    key = f"{mesh} {settings(file, plain)}"
    step = programs.setdefault(key, make_train_step(config, mesh))
    nothing = types.SimpleNamespace(latest=None)  # no checkpoint to resume from
    state, _ = _start(config, mesh, abstract_train_state(config, mesh), None, nothing)
    hashes, steps = [], []
    for _ in range(5):
        batch = next(batches)
        hashes.append(digest((golden, batch[today]) for golden, today in FIELDS.items()))
        state, metrics = step(state, put_batch(batch, mesh))
        values = metrics.compute()
        steps.append([values[METRICS[n]] for n in METRICS])
    weights, average = raw_parameters(state)
    apart = optax.global_norm(jax.tree.map(lambda a, b: a - b, weights, average))
    check(
        record, f"train {name}", {"batches": hashes[:3], "first": np.array(steps[0]),
                                  "later": np.array(steps[1:]), "average_apart": apart},
        first=(FIRST, 0), later=(LATER, 0), average_apart=(LATER, 0),
    )  # fmt: skip


def sampling_model(base, records, **changes):
    """Config and weights of the converted workdir, with sampling keys changed."""
    plain = {"lora.rank": 0, "data.row_length": 256, "data.records": records["finetune"]}
    config = settings(f"finetune.py:{base[1]}", TUNED | plain | changes)
    return config, load_trained(base[1])[1], ByteTokenizer()


PICTURE = Image((np.arange(64, dtype=np.float32).reshape(4, 4, 4) / 32 - 1), denoise=False)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "heun", "ddpm", "ddim"])
def test_images(solver, record, base, records):
    """Three steps of each solver with one, two and three branches of guidance."""
    kind = FLOW if solver in ("euler", "heun") else DDPM
    kind = kind | {"sampling.solver": solver, "sampling.steps": 3, "sampling.guidance_rescale": 0.3}
    found = {}
    for branches in (1, 2, 3):
        guided = {"sampling.guidance": 1.0 if branches == 1 else 3.0,
                  "sampling.image_guidance": 1.5}  # fmt: skip
        config, params, tokenizer = sampling_model(base, records, **kind | guided)
        prompt = ["a red boat", PICTURE][: 2 if branches == 3 else 1]
        found[str(branches)] = generate_images(
            Sampler(config, params, tokenizer), [prompt], size=(4, 4), seed=5
        )
    check(record, f"images {solver}", found, **dict.fromkeys(found, (0, PIXELS)))


@pytest.mark.slow
def test_session(record, base, records):
    """Two rows with text, generated images, an input image and more turns; one of them greedy."""
    changes = FLOW | {"sampling.solver": "euler", "sampling.steps": 2, "sampling.guidance": 2.0,
                      "data.image_size": 4}  # fmt: skip
    config, params, tokenizer = sampling_model(base, records, **changes)
    text = SamplingParams(temperature=[0.8, 0.0])
    session = Session(Sampler(config, params, tokenizer), 2, seed=[4, 5], text=text)
    said, images = [], []
    for turn in ([["draw"], ["read ", PICTURE]], [["again"], None], [None, ["b", PICTURE, "c"]]):
        session.append(turn)
        for row, reply in enumerate(session.generate(max_tokens=8)):
            images += [x for x in reply if not isinstance(x, str)]
            said.append([row, *(x if isinstance(x, str) else "<image>" for x in reply)])
    streams = [session.document(row)[FIELDS["tokens"]].tolist() for row in range(2)]
    check(record, "session", {"said": said, "streams": streams, "images": np.array(images)},
          images=(0, PIXELS))  # fmt: skip


def test_convert(record, base):
    """Bit-exact round trip of the original's weights through a workdir; and config.json."""
    first, again = (safetensors.numpy.load_file(base[i] / "model.safetensors") for i in (0, 2))
    assert digest(sorted(first.items())) == digest(sorted(again.items()))
    written = json.loads((base[2] / "config.json").read_text())
    written.pop(OURS)
    check(record, "convert", {"weights": digest(sorted(again.items())), "config": written})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "sample"])
def test_plan(mode, record, tmp_path):
    """Exact counts; compiler results within the tolerance for other libtpu versions."""
    pytest.importorskip("libtpu", reason="libtpu is for Linux only")
    file, axes = tmp_path / "plan.json", "data=1,fsdp=2,tensor=2"
    command(plan, f"--config={ROOT / 'configs' / 'digits.py:tiny'}", "--topology=v5e:2x2",
            f"--mesh={axes}", f"--mode={mode}", f"--json={file}")  # fmt: skip
    found = json.loads(file.read_text())
    compilers = dict.fromkeys(("temporaries_gib", "peak_gib", "step_seconds_floor"), (0.25, 0))
    check(record, f"plan {mode}", {n: found[today] for n, today in PLAN.items()}, **compilers)
