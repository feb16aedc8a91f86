"""Text to token ids. `ByteTokenizer` needs no file; others fit the same interface."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Tokenizer(Protocol):
    """What documents and generation ask of a tokenizer."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    image_id: int  # stands at TIME and PATCH tokens
    im_start_id: int
    im_end_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; a special token's name in it is text like any other."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out."""


class ByteTokenizer:
    """UTF-8 bytes after six special tokens: any text, no vocabulary file."""

    specials = ("<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>")
    pad_id, bos_id, eos_id, image_id, im_start_id, im_end_id = range(6)
    vocab_size = 6 + 256

    def encode(self, text: str) -> list[int]:
        return [byte + 6 for byte in text.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - 6 for i in ids if i >= 6).decode("utf-8", errors="replace")
