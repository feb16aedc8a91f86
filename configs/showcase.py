"""One model for two datasets: it draws and reads digits, completes sums, draws and names gestures.

    python -m monoformer_jax.train --config=configs/showcase.py --workdir=runs/showcase
    python -m monoformer_jax.evaluate --workdir=runs/showcase --json=scores.json
    python -m monoformer_jax.sample --workdir=runs/showcase --prompt="draw thumbs up" --out=up.png

`bash launch/demo.sh --config=configs/showcase.py` does the same. Digits are enlarged to the 16×16
pixels of the gestures; their figures are those of digits that are reduced again.

On 2 CPU cores 78 minutes beside a second training (November 2026); alone a step took 0.55 to 0.6 s,
which makes 43. Digits: draw 99.4 %, Fréchet 1.04, read 96.9 %, say 100 %; held-out gestures: base and
skin tone right 100 %, nearer to a trained picture 0 %, named exactly 100 %. They are the weights and
the figures of the model that comes with the package, monoformer_jax/shipped/showcase. Gestures:
OpenMoji, CC BY-SA 4.0.
"""

from monoformer_jax.errors import require
from monoformer_jax.models import base_config, named_size


def get_config(size: str = "small"):
    """`size` is "small", or "tiny" for a short test."""
    require(size in ("small", "tiny"), f"there is no size {size!r}; there are small, tiny")
    c = base_config()
    c.name = "showcase"
    c.model.update(named_size(size))
    c.model.channels = 3
    c.data.emoji_subset, c.data.image_size = "gestures", 16
    c.data.end_of_prompt = False  # prompts of sums are incomplete sentences
    c.data.clean_images = 0.1  # else a drawing is named, as the pictures to read are
    # 190 drawings and 60 names of each gesture; 28 drawings and 21 readings of each digit; 160 of each
    # sum: about those of configs/emoji.py and configs/digits.py.
    c.data.mixture = {
        "draw_emoji": 0.30, "name_emoji": 0.10, "draw": 0.24, "read": 0.18, "say": 0.18,
    }  # fmt: skip
    c.data.max_seq_len, c.batch_size = 192, 16  # 98 % real tokens
    c.optimizer.learning_rate = 1.5e-3
    c.steps, c.checkpoint_every, c.validation.every = 4400, 400, 400
    c.validation.prompts = (
        "draw a seven", "draw a two", "draw OK hand, medium-light skin tone",
        "draw flexed biceps, medium skin tone", "draw waving hand, dark skin tone",
        "draw vulcan salute, dark skin tone",
    )  # fmt: skip
    if size == "tiny":
        c.data.emoji_subset, c.data.image_size, c.data.max_seq_len = "fists", 8, 160
        c.steps, c.batch_size, c.log_every, c.checkpoint_every = 20, 4, 1, 10
        c.validation.every, c.validation.prompts = 0, ()
    return c
