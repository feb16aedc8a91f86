"""Scores of a model trained on the digits: does it draw, read and say what it should?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from monoformer_jax.config import Config
from monoformer_jax.data.documents import Image
from monoformer_jax.data.sources import NAMES, READ_PROMPT, digits, draw_prompt, sentences
from monoformer_jax.data.tokenizer import Tokenizer
from monoformer_jax.evaluation.frechet import frechet_distance
from monoformer_jax.generation.image import generate_images
from monoformer_jax.generation.interleaved import Session
from monoformer_jax.generation.text import generate_text

_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model: what every measurement needs."""

    config: Config
    params: dict
    tokenizer: Tokenizer

    def draw(self, labels: np.ndarray, guidance: float, seed: int) -> np.ndarray:
        """Digits as asked for, [n, 8, 8, 1], clipped to the range of real ones."""
        sampling = dataclasses.replace(self.config.sampling, guidance=guidance)
        images = [
            generate_images(
                self.config, self.params, self.tokenizer,
                [[draw_prompt(digit)] for digit in labels[i : i + _BATCH]],
                sampling=sampling, seed=seed, first=i,
            )
            for i in range(0, len(labels), _BATCH)
        ]  # fmt: skip
        return np.clip(np.concatenate(images), -1, 1)

    def opens_image(self) -> float:
        """Share of 100 prompts to draw that are answered, greedily, with one image and then </s>."""
        session = Session(self.config, self.params, self.tokenizer, 100)
        session.add([[draw_prompt(number % 10)] for number in range(100)])
        replies = session.reply(max_tokens=8)
        ended = [session.stream(b)["tokens"][-1] == self.tokenizer.eos_id for b in range(100)]
        one = [len(reply) == 1 and not isinstance(reply[0], str) for reply in replies]
        return float(np.logical_and(one, ended).mean())

    def exact(self, prompts: list, answers: list[str]) -> float:
        """Share of prompts that are continued, greedily, with exactly the answer and then </s>."""
        wanted = [self.tokenizer.encode(answer) for answer in answers]
        right = 0
        for i in range(0, len(prompts), _BATCH):
            got = generate_text(
                self.config, self.params, self.tokenizer, prompts[i : i + _BATCH],
                max_tokens=max(map(len, wanted)) + 1,
            )  # fmt: skip
            pairs = zip(got, wanted[i : i + _BATCH])
            right += sum(g.why == "end" and g.tokens == w for g, w in pairs)
        return right / len(prompts)


def evaluate(model: Trained, say: Callable[[str], None]) -> tuple[dict[str, float], np.ndarray]:
    """Scores, and the 500 guided drawings, 50 of each digit in turn.

    draw_accuracy: share of guided drawings that a support vector machine, trained on the real
      training digits alone, names as asked.
    frechet: distance in pixel space of 500 unguided drawings to the real test digits;
      frechet_real is that of 500 real training digits.
    read_accuracy: share of the 360 test digits that are named exactly.
    say_accuracy: share of the sentences it was trained on that it ends exactly.
    opens_image: share of prompts to draw that it answers with one image and nothing else.
    """
    from sklearn.svm import SVC

    train_x, train_y = digits("train")
    test_x, test_y = digits("test")
    labels = np.tile(np.arange(10), 50)

    say("drawing 500 digits with guidance")
    drawn = model.draw(labels, model.config.sampling.guidance, seed=0)
    named = SVC(C=10).fit(_flat(train_x), train_y).predict(_flat(drawn))
    say("drawing 500 digits without guidance")
    unguided = model.draw(labels, 1.0, seed=1)
    say("reading 360 test digits")
    shown = [[READ_PROMPT, Image(image, denoise=False)] for image in test_x]
    read = model.exact(shown, [NAMES[digit] for digit in test_y])
    say("asking 100 times for a drawing")
    opens_image = model.opens_image()
    said = sentences()
    say(f"ending {len(said)} sentences")
    scores = {
        "draw_accuracy": float((named == labels).mean()),
        "frechet": frechet_distance(_flat(unguided), _flat(test_x)),
        "frechet_real": frechet_distance(_flat(train_x[:500]), _flat(test_x)),
        "read_accuracy": read,
        "opens_image": opens_image,
        "say_accuracy": model.exact([[start] for start, _ in said], [end for _, end in said]),
    }
    return scores, drawn


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1)
