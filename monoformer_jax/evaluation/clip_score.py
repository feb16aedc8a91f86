"""CLIP score: how well pictures fit their prompts, by a CLIP with both encoders.

A picture's score is 100 · max(cosine of its embedding and its prompt's, 0), a set's the mean, as in
torchmetrics; the paper (Hessel et al., arXiv 2104.08718) multiplies by 2.5 in place of 100. Scores of
two CLIPs do not compare: patch size, image size and a hash of the weights are part of the name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import tokenizers
from jax.sharding import NamedSharding, PartitionSpec

from monoformer_jax.config import MeshConfig
from monoformer_jax.errors import InputError, require
from monoformer_jax.evaluation.image_set import ImageSet
from monoformer_jax.nn import clip
from monoformer_jax.parallel import make_mesh, padded_rows, spread_batch
from monoformer_jax.pretrained.clip import load_dual

_BATCH = 64


class ClipScore:
    """Scores of pictures and prompts, on all devices of this process.

    Attributes:
      name: of the network, which every score needs beside it.
      cut: number of prompts so far that were longer than the encoder reads.
    """

    def __init__(self, folder: Path):
        """Args:
        folder: of a complete CLIP as transformers saves it, such as openai/clip-vit-large-patch14,
          with its tokenizer.json.

        Raises:
          InputError: no such folder, a vision tower alone, weights of another model, no tokenizer.
        """
        self._config, params = load_dual(folder)
        vision, text = self._config.vision, self._config.text
        path = folder / "tokenizer.json"
        require(path.is_file(), f"{folder} has no tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exceptions
            raise InputError(f"{path} is not a tokenizer ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        size = self._tokenizer.get_vocab_size()
        require(
            size <= text.vocab_size,
            f"{path} has {size} tokens, the text encoder {text.vocab_size}: they are of two models",
        )
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(params):
            digest.update(np.ascontiguousarray(leaf))
        self.name = f"CLIP ViT/{vision.patch_size} {vision.image_size} {digest.hexdigest()[:8]}"
        self.cut = 0
        self._mesh = make_mesh(MeshConfig(), jax.local_devices())
        self._params = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))

        @jax.jit
        def cosines(params, pixels, tokens, lengths):
            model = clip.bind(self._config, params)
            pairs = model.embed_images(pixels) * model.embed_texts(tokens, lengths)
            return pairs.sum(-1)

        self._cosines = cosines

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """uint8 [n, height, width, 3] and n prompts to n scores."""
        tokens, lengths = zip(*map(self._tokenize, prompts))
        pixels = [clip.preprocess(PIL.Image.fromarray(x), self._config.vision) for x in images]
        batch = {
            "pixels": np.stack(pixels),
            "tokens": np.stack(tokens),
            "lengths": np.stack(lengths),
        }
        missing = padded_rows(len(images), self._mesh) - len(images)
        batch = {
            name: np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)], mode="edge")
            for name, x in batch.items()
        }
        found = self._cosines(self._params, **spread_batch(batch, self._mesh))
        return 100 * np.maximum(np.asarray(found)[: len(images)], 0)

    def score(self, images: ImageSet, prompts: Sequence[str]) -> float:
        """The mean of a set, a prompt for each of its pictures in their order."""
        starts = range(0, images.count, _BATCH)
        pairs = zip(images.batches(_BATCH), (prompts[i : i + _BATCH] for i in starts))
        return float(np.concatenate([self(*pair) for pair in pairs]).mean())

    def _tokenize(self, prompt: str) -> tuple[np.ndarray, int]:
        """Ids [max_tokens] and their number; what is too long is cut before <|endoftext|>."""
        most = self._config.text.max_tokens
        ids = self._tokenizer.encode(prompt).ids
        self.cut += len(ids) > most
        ids = ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
        return np.pad(np.array(ids, np.int32), (0, most - len(ids))), np.int32(len(ids))
