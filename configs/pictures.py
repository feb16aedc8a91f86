"""Your own pictures: one small model, trained from random weights on the records that it is given.

python -m monoformer_jax.prepare_data --from=pictures --to=records/pictures --image_size=32
python -m monoformer_jax.train --config=configs/pictures.py:records/pictures --workdir=runs/pictures
python -m monoformer_jax.sample --workdir=runs/pictures --prompt="a cat" --paint --out=cat.png

Size and channels of the images, mixture, length of a row, patch size, rows and steps are derived from
the records. RUN/report.html shows what six of the prompts draw at each checkpoint; to hold examples
out, add --config.data.validation_split=0.1. A picture is drawn about VISITS times: of 16×16 drawings
in patches of 2×2 a model of this size drew 80 of 80 after 190 visits, and none after 27.
"""

import math
import statistics

from monoformer_jax.config import TokenLayout
from monoformer_jax.data.documents import EndOfTurn, Image, Prompt, build_document
from monoformer_jax.data.records import Records
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import BadExample, require
from monoformer_jax.models import base_config, named_size

VISITS = 220  # of each picture
TOKENS = 1280  # of a step, in all of its rows
SHOWN = 6  # prompts that are drawn at each checkpoint
PROBED = 1000  # examples of each folder whose length is measured


def get_config(folders: str = ""):
    """`folders` are the records that `prepare_data` wrote: a folder, or several with commas between.

    Default: the config of 200 pictures of 32×32 in records/pictures, which need not exist.
    """
    c = base_config()
    c.name = "pictures"
    c.model.update(named_size("small"))
    c.optimizer.learning_rate = 1.5e-3
    c.data.records, c.data.mixture = {"pictures": "records/pictures"}, {"pictures": 1.0}
    shape, images, examples = [32, 32, 3], 200, []
    if folders:
        shape, images, examples = _open(c.data, folders)
    side, c.model.channels = shape[1], shape[2]
    c.data.image_size, c.model.patch_size = side, _patch_size(side, pixels=shape[2] in (1, 3))
    layout = TokenLayout(c.model.vocab_size, c.model.channels, c.model.patch_size)
    lengths = [_length(example, layout) for example in examples] or [90]
    # Two documents a row or more, in rows of a multiple of 32.
    longest = max(max(lengths), 2 * math.ceil(statistics.median(lengths)))
    c.data.max_seq_len = -(-longest // 32) * 32
    c.batch_size = max(4, 4 * round(TOKENS / c.data.max_seq_len / 4))
    documents = c.batch_size * c.data.max_seq_len / statistics.mean(lengths)  # of a step
    c.steps = max(500, round(VISITS * images / documents / 100) * 100)
    c.checkpoint_every = c.steps // 5
    prompts = _prompts(examples)
    if prompts and shape[2] in (1, 3):  # latents need --config.validation.vae
        c.validation.update(every=c.checkpoint_every, prompts=prompts)
    return c


def _open(data, folders: str) -> tuple[list[int], int, list]:
    """Shape of the images, number of examples, and the first of them; sets the sources of `data`."""
    opened = {folder.rstrip("/").rpartition("/")[2]: folder for folder in folders.split(",")}
    require(len(opened) == folders.count(",") + 1, f"{folders}: two folders have one name")
    records = {name: Records(folder) for name, folder in opened.items()}
    shapes = [r.info["shape"] for r in records.values() if r.info["shape"]]
    require(bool(shapes), f"{folders} holds no images; configs/digits.py is of text, too")
    data.records = opened
    data.mixture = {name: float(len(examples)) for name, examples in records.items()}
    examples = [example for r in records.values() for example in _first(r)]
    data.sample_latents = any(getattr(p, "logvar", None) is not None for e in examples for p in e)
    return shapes[0], sum(map(len, records.values())), examples


def _first(records: Records) -> list:
    """The first examples that can be read."""
    found = []
    for number in range(min(len(records), PROBED)):
        try:
            found.append(records[number])
        except BadExample:  # which training skips and counts
            continue
    return found


def _prompts(examples: list) -> tuple[str, ...]:
    """The first prompts, whose samples report.html shows at each checkpoint."""
    texts = [p.texts[0] for e in examples for p in e if isinstance(p, Prompt) and p.texts[0]]
    return tuple(dict.fromkeys(texts))[:SHOWN]


def _patch_size(side: int, pixels: bool) -> int:
    """Patches of 2×2; larger ones for pixels, so that an image is about 64 to 144 tokens."""
    patch = 1 if side % 2 else 2
    while pixels and side // patch > 12 and side % (2 * patch) == 0:
        patch *= 2
    return patch


def _length(example: list, layout: TokenLayout) -> int:
    """Tokens of an example with the longest wording of its prompts."""
    parts = []
    for part in example:
        if isinstance(part, Prompt):
            parts += [max(part.texts, key=len), EndOfTurn()]
        else:
            parts.append(Image(part.pixels, part.denoise) if isinstance(part, Image) else part)
    return len(build_document(parts, ByteTokenizer(), layout)["tokens"])
