"""OpenMoji on a laptop CPU: one model draws an emoji from its caption, and names one.

    python -m monoformer_jax.train --config=configs/emoji.py --workdir=runs/emoji
    python -m monoformer_jax.evaluate --workdir=runs/emoji --json=scores.json
    python -m monoformer_jax.sample --workdir=runs/emoji --paint --prompt="draw thumbs up" --out=up.png

`bash launch/demo.sh --config=configs/emoji.py` does the same.

`:gestures`, the default, has hands and other parts of the body in yellow and five skin tones,
`:people` all drawings that exist in them, `:all` every drawing with a name, at 16×16 pixels;
`:diffussm` draws the gestures without attention, and names none (docs/backbones.md). 10 % of those
with an attribute are never trained: RUN/report.html shows what six of their captions draw.

`:gestures` took 64 minutes on 2 CPU cores beside other trainings (November 2026); alone a step took
0.5 to 0.85 s, which makes 18 to 31. Of 24 held-out captions base and skin tone are right for 95.8 %,
4.2 % are nearer to a trained picture; pixel error 0.052; 91.7 % of the held-out pictures are named
exactly (one run; a second one and those with data.emoji_split=1 and 2 reach 100 %, 0 %, 0.052 to
0.056 and 95.8 %, docs/emoji.md). `:people` took 130 minutes, with pauses for other work, at 0.87 s a
step when alone, and 1.2 GiB: 83.7 % of 166 held-out captions, 16.3 %, 0.048 and 91.0 %. Drawings:
OpenMoji, CC BY-SA 4.0.
"""

from monoformer_jax.errors import require
from monoformer_jax.models import base_config, named_size

# Held out of the gestures with data.emoji_split=0.
PROMPTS = (
    "draw ear, light skin tone",
    "draw OK hand, medium-light skin tone",
    "draw backhand index pointing down, medium skin tone",
    "draw flexed biceps, medium skin tone",
    "draw waving hand, dark skin tone",
    "draw vulcan salute, dark skin tone",
)


def get_config(subset: str = "gestures"):
    """`subset` is "gestures", "people" or "all", "tiny" for a short test, or "diffussm": gestures that
    are only drawn, by the model without attention."""
    known = ("gestures", "people", "all", "tiny", "diffussm")
    require(subset in known, f"there is no subset {subset!r}; there are {', '.join(known)}")
    if subset == "diffussm":
        return _diffussm()
    c = base_config()
    c.name = "emoji"
    c.model.update(named_size("tiny" if subset == "tiny" else "small"))
    c.model.channels = 3
    c.data.emoji_subset, c.data.image_size = subset, 16
    # A picture needs more visits to be drawn than to be named.
    c.data.mixture = {"draw_emoji": 0.75, "name_emoji": 0.25}
    c.data.clean_images = 0.1  # else a drawing is named, as the pictures to name are
    # Rows that two documents fill: without a kernel, attention takes time for all pairs of a row.
    c.data.max_seq_len, c.batch_size = 224, 14
    c.optimizer.learning_rate = 1.5e-3
    c.steps, c.checkpoint_every = 2200, 200
    if subset == "gestures":
        c.validation.every = 200
        c.validation.prompts = PROMPTS
    if subset == "people":
        c.steps, c.checkpoint_every = 8000, 500
    elif subset == "all":  # for an accelerator
        c.data.max_seq_len, c.batch_size = 512, 32
        c.steps, c.checkpoint_every = 8000, 1000
    elif subset == "tiny":
        c.data.emoji_subset, c.data.image_size, c.data.max_seq_len = "fists", 8, 160
        c.steps, c.batch_size, c.log_every, c.checkpoint_every = 20, 4, 1, 10
    return c


def _diffussm():
    """DiffuSSM on the same drawings: as many visits of each, one drawing a row."""
    c = base_config("diffussm")
    c.name = "emoji_diffussm"
    c.model.update(named_size("small", "diffussm"), channels=3, max_patches=16 * 16)
    c.data.update(emoji_subset="gestures", image_size=16, max_seq_len=352)
    c.data.mixture = {"draw_emoji": 1.0}
    c.optimizer.update(learning_rate=1.5e-3, weight_decay=0.0)
    c.batch_size, c.steps, c.checkpoint_every = 16, 3200, 200
    c.validation.update(every=200, prompts=PROMPTS)
    return c
