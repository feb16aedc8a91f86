"""How a typed program calls the public API; `mypy` reads it, nothing runs it.

A line with `type: ignore` is a mistake that the hints must find: mypy reports an ignore without one.
"""

from typing import assert_type

import monoformer_jax

model = monoformer_jax.load("runs/digits", vae="sd-vae-ft-mse", dtype="bfloat16")
assert_type(model, monoformer_jax.Model)
assert_type(model.generate_text(["a", ["picture.png", "b"]], max_tokens=5), list[str])
model.generate_text("a", temperature=[0.5], seed=[1], stop="\n", continue_prompt=True)
model.generate_images("a", count=2, size=(8, 8), seed=1, output="numpy", steps=20, guidance=2.0)
model.edit("picture.png", "make it a one", image_guidance=1.2)
model.chat([{"role": "user", "content": "a"}], preview=lambda step, answer: print(step, answer))
assert_type(model.step, int)
try:
    monoformer_jax.load("runs/none")
except monoformer_jax.InputError as error:
    assert_type(str(error), str)

model.generate_text("a", max_tokens="5")  # type: ignore[arg-type]
model.generate_text("a", temperature="hot")  # type: ignore[arg-type]
model.generate_images("a", size=8)  # type: ignore[arg-type]
model.generate_images("a", output="jpg")  # type: ignore[arg-type]
model.edit("picture.png", 3)  # type: ignore[arg-type]
model.chat("hello")  # type: ignore[arg-type]
monoformer_jax.load(None)  # type: ignore[arg-type]
monoformer_jax.lead("runs/digits")  # type: ignore[attr-defined]
