"""A stand-in for `monoformer_jax.Model` that answers at once: what tests of the page are served with.

Texts that begin with "draw" are answered with a handwritten digit of scikit-learn, picked by the seed;
others with what the model was shown.
"""

import re
import threading
import time

import numpy as np
import PIL.Image
import sklearn.datasets

from monoformer_jax.codecs.image_processor import ImageProcessor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class StandIn:
    """`chat` takes `seconds` for each preview of a drawing, or waits for `let` where it is given."""

    def __init__(self, config, seconds=0.0, let: threading.Semaphore | None = None):
        self.config, self.step, self.seconds, self.let = config, 1400, seconds, let
        self.image_processor = ImageProcessor(config.layout, config.data.image_size)
        self.seen = []  # (messages, settings) of every call
        self.at_once = 0
        digits = sklearn.datasets.load_digits()
        self._drawn = [digits.images[digits.target == n].astype(np.float32) for n in range(10)]

    def chat(self, messages, *, preview, every, **settings):
        self.at_once += 1
        assert self.at_once == 1, "two answers at once"
        try:
            self.seen.append((messages, settings))
            steps = range(every, settings["steps"] + 1, every)
            text = " ".join(self._texts(messages[-1:]))
            drawn = self._draw(text, settings["seed"]) if text.startswith("draw") else None
            for step in steps:
                if self.let is not None:
                    self.let.acquire()
                if drawn is not None:
                    time.sleep(self.seconds)
                    preview(step, [self._noisy(drawn, step / settings["steps"])])
            if drawn is not None:
                return [self._noisy(drawn, 1)]
            return [" | ".join(self._texts(messages))]
        finally:
            self.at_once -= 1

    def _texts(self, messages):
        """What was shown, pictures by their size."""
        for message in messages:
            for part in message["content"]:
                if isinstance(part, str):
                    yield part
                elif isinstance(part, dict):
                    yield part["text"]
                else:
                    self.image_processor.encode(part)  # it can be read
                    with PIL.Image.open(part) as picture:
                        yield f"picture of {picture.width}"

    def _draw(self, text, seed):
        found = re.search("|".join(WORDS), text)
        drawings = self._drawn[WORDS.index(found[0]) if found else seed % 10]
        return drawings[seed % len(drawings)]

    def _noisy(self, drawn, share):
        noise = np.random.default_rng(0).uniform(0, 16, drawn.shape)
        mixed = share * drawn + (1 - share) * noise
        return PIL.Image.fromarray((mixed * 15.9).astype(np.uint8))
