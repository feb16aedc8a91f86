"""Records with documents as long as those of the paper's data sets, to measure how full rows are.

A text is a filler of exactly as many tokens as LLaMA's tokenizer makes of the real one. Where the
lengths come from:

imagenet    counted: the four prompts of the original with torchvision's 1000 class names, by the
            vocabulary and merges of LLaMA (TinyLlama's tokenizer).
journeydb   assumed: "Please generate an image of", 7 tokens, and a log-normal prompt of Midjourney, of
            28 tokens in the median.
ultrachat   1 to 7 exchanges, 3.85 in the mean, as the data set has 7.7 turns (a copy's card); 1470
            tokens a dialogue, as a random sample of 100,000 has 6,321 bytes a dialogue (the card of
            kaitchup/ultrachat-100k-flattened), at 4.3 bytes a token. Assumed: exchanges are log-normal.
llava       the three parts of LLaVA-Instruct-158K: file sizes of LLaVA's docs/Data.md over 56,681,
            23,240 and 76,643 examples, less the keys of their JSON, at 4.3 bytes a token.

Log-normal lengths have the standard deviation SPREAD of their logarithm.
"""

from pathlib import Path

import numpy as np
from llama_tokenizer import write_llama_tokenizer

from monoformer_jax.data.documents import Image, Prompt
from monoformer_jax.data.records import write_records
from monoformer_jax.data.templates import chat_parts
from monoformer_jax.data.tokenizer import FileTokenizer

SPREAD = 0.6
# Prompts by their number of tokens, from 1 to 16.
IMAGENET = (67, 333, 350, 158, 192, 685, 773, 655, 468, 197, 70, 31, 10, 8, 2, 1)
JOURNEYDB = 28
EXCHANGES = (0.05, 0.15, 0.22, 0.25, 0.18, 0.10, 0.05)  # 1 to 7 exchanges
ULTRACHAT = 1470 / 3.85
LLAVA = {"conversation": (5, 78, 0.36), "detail": (1, 160, 0.15), "reasoning": (1, 195, 0.49)}
USER = 0.15  # of an exchange
FILLER = "one"  # one token
SOURCES = ("imagenet", "journeydb", "ultrachat", "llava")


def write_stand_in(folder: Path, names, examples: int = 1000, scale: float = 1.0) -> list[str]:
    """Writes records of these data sets and a tokenizer; returns config overrides with both.

    Args:
      scale: factor of all lengths other than ImageNet's, which are known.
    """
    write_llama_tokenizer(folder / "tokenizer.json")
    tokenizer = FileTokenizer(folder / "tokenizer.json")
    template = len(tokenizer.encode("### Human: " + FILLER + "### Assistant: ")) - 1
    rng = np.random.default_rng(0)
    moments = rng.normal(size=(2, 32, 32, 4)).astype(np.float16)

    def text(tokens):
        return " ".join([FILLER] * max(round(tokens), 1))

    def drawn(mean):
        return scale * mean * np.exp(rng.normal(-(SPREAD**2) / 2, SPREAD))

    def chat(lengths):
        turns = [(max(USER * n - template, 1), (1 - USER) * n - 1) for n in lengths]
        roles = [("user", "assistant")[i % 2] for i in range(2 * len(turns))]
        texts = [text(n) for turn in turns for n in turn]
        return chat_parts([{"role": r, "content": t} for r, t in zip(roles, texts)])[:-1]

    def image(denoise):
        return Image(moments[0], denoise, moments[1])

    def imagenet():
        counts = np.array(IMAGENET) / sum(IMAGENET)
        return [Prompt((text(1 + rng.choice(16, p=counts)),)), image(True)]

    def journeydb():
        return [Prompt((text(7 + drawn(JOURNEYDB * np.exp(SPREAD**2 / 2))),)), image(True)]

    def ultrachat():
        return chat([drawn(ULTRACHAT) for _ in range(1 + rng.choice(7, p=EXCHANGES))])

    def llava():
        kinds = list(LLAVA.values())
        exchanges, mean, _ = kinds[rng.choice(3, p=[share for *_, share in kinds])]
        return [image(False), *chat([drawn(mean) for _ in range(exchanges)])]

    make = {"imagenet": imagenet, "journeydb": journeydb, "ultrachat": ultrachat, "llava": llava}
    overrides = [f"--config.data.tokenizer={folder / 'tokenizer.json'}"]
    for name in names:
        write_records(folder / name, (make[name]() for _ in range(examples)))
        overrides.append(f"--config.data.records.{name}={folder / name}")
    return overrides
