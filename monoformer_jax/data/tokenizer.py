"""Tokenizers: `ByteTokenizer` needs no file, `FileTokenizer` loads a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import tokenizers

from monoformer_jax.config import DataConfig
from monoformer_jax.errors import InputError, require

# Special tokens that the original adds to LLaMA's vocabulary, in this order.
NEW_SPECIALS = ("<PAD>", "<image>", "<|im_start|>", "<|im_end|>")


class Tokenizer(Protocol):
    """Tokenizer interface of documents and sampling."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    image_id: int  # id at TIME and PATCH tokens
    im_start_id: int
    im_end_id: int

    def encode(self, text: str) -> list[int]:
        """Encodes plain text; names of special tokens in it are not special."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids; special tokens are skipped."""


class ByteTokenizer:
    """UTF-8 bytes after six special tokens."""

    specials = ("<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>")
    pad_id, bos_id, eos_id, image_id, im_start_id, im_end_id = range(6)
    vocab_size = 6 + 256

    def encode(self, text: str) -> list[int]:
        return [byte + 6 for byte in text.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - 6 for i in ids if i >= 6).decode("utf-8", errors="replace")


class FileTokenizer:
    """A Hugging Face tokenizer.json that has `<s>`, `</s>` and the four tokens of MonoFormer."""

    def __init__(self, path: Path):
        """Raises InputError if there is no such file or it lacks a special token."""
        self._tokenizer = _read(path)
        # Otherwise "</s>" in the text of a prompt would become the special token.
        self._tokenizer.encode_special_tokens = True
        names = {"bos_id": "<s>", "eos_id": "</s>"}
        names |= dict(zip(("pad_id", "image_id", "im_start_id", "im_end_id"), NEW_SPECIALS))
        ids = {name: self._tokenizer.token_to_id(token) for name, token in names.items()}
        missing = [names[name] for name, token_id in ids.items() if token_id is None]
        require(not missing, f"{path} lacks the special tokens {', '.join(missing)}")
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.pad_id, self.bos_id, self.eos_id = ids["pad_id"], ids["bos_id"], ids["eos_id"]
        self.image_id = ids["image_id"]
        self.im_start_id, self.im_end_id = ids["im_start_id"], ids["im_end_id"]
        self._special = set(ids.values())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._special])


def extend_tokenizer(path: Path, to: Path) -> None:
    """Copies a tokenizer.json and appends the four special tokens of MonoFormer."""
    tokenizer = _read(path)
    tokenizer.add_special_tokens(list(NEW_SPECIALS))
    tokenizer.save(str(to))


def _read(path: Path) -> tokenizers.Tokenizer:
    require(path.is_file(), f"the tokenizer {path} does not exist")
    try:
        return tokenizers.Tokenizer.from_str(path.read_text())  # the workdir may be a bucket
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{path} is not a readable tokenizer.json ({error})") from error


def open_tokenizer(c: DataConfig, workdir: Path, vocab_size: int) -> Tokenizer:
    """Opens the tokenizer of a run: data.tokenizer is "bytes", or a file in the workdir or elsewhere.

    Raises:
      InputError: no such file, a missing special token, or more tokens than model.vocab_size.
    """
    if c.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        inside = workdir / c.tokenizer
        tokenizer = FileTokenizer(inside if inside.is_file() else Path(c.tokenizer))
    require(
        tokenizer.vocab_size <= vocab_size,
        f"the tokenizer {c.tokenizer} has {tokenizer.vocab_size} tokens, but model.vocab_size is "
        f"{vocab_size}",
    )
    return tokenizer
