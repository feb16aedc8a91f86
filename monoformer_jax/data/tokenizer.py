"""Tokenizers: `ByteTokenizer` needs no file, `FileTokenizer` loads a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import tokenizers
from etils import epath

from monoformer_jax.config import DataConfig
from monoformer_jax.errors import InputError, require

# Special tokens that the original adds to LLaMA's vocabulary, in this order.
NEW_SPECIALS = ("<PAD>", "<image>", "<|im_start|>", "<|im_end|>")


class Tokenizer(Protocol):
    """Tokenizer interface of documents and sampling.

    It need not be additive: a text encoded in pieces may give other ids than the whole text, and ids
    decoded in pieces another text.
    """

    vocab_size: int  # the highest id + 1
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

    def __init__(self, path: epath.PathLike):
        """Raises InputError if there is no such file or it lacks a special token."""
        self.path, self._tokenizer = epath.Path(path), _read(path)
        # Otherwise "</s>" in the text of a prompt would become the special token.
        self._tokenizer.encode_special_tokens = True
        names = {"bos_id": "<s>", "eos_id": "</s>"}
        names |= dict(zip(("pad_id", "image_id", "im_start_id", "im_end_id"), NEW_SPECIALS))
        ids = {name: self._tokenizer.token_to_id(token) for name, token in names.items()}
        missing = [names[name] for name, token_id in ids.items() if token_id is None]
        require(not missing, f"{path} lacks the special tokens {', '.join(missing)}")
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.pad_id, self.bos_id, self.eos_id = ids["pad_id"], ids["bos_id"], ids["eos_id"]
        self.image_id = ids["image_id"]
        self.im_start_id, self.im_end_id = ids["im_start_id"], ids["im_end_id"]
        self._special = set(ids.values())

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # which a copy in another process loses

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i not in self._special])


def encode_after(tokenizer: Tokenizer, before: Sequence[int], text: str) -> list[int]:
    """Ids of a text that continues the text of `before`, without those ids.

    Both are encoded as one text if that leaves `before` as it is, else `text` is encoded alone.
    """
    if before:
        whole = tokenizer.encode(tokenizer.decode(before) + text)
        if whole[: len(before)] == list(before):
            return whole[len(before) :]
    return tokenizer.encode(text)


def decode_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """Text of `ids`, which continue the text of `before`: decoded as one text and then cut.

    The first token of a text loses its space in LLaMA's decoder, and a character of several bytes may
    begin in `before`.
    """
    start, whole = tokenizer.decode(before), tokenizer.decode([*before, *ids])
    while not whole.startswith(start):  # it ends in the middle of a character
        start = start[:-1]
    return whole[len(start) :]


def extend_tokenizer(path: epath.PathLike, to: epath.PathLike) -> None:
    """Copies a tokenizer.json and appends the four special tokens of MonoFormer.

    Raises:
      InputError: the file cannot be read, or a new token would get the id of another one.
    """
    tokenizer = _read(path)
    tokenizer.add_special_tokens(list(NEW_SPECIALS))
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    for token, token_id in tokenizer.get_vocab().items():
        require(
            names[token_id] == token,
            f"{path} cannot be extended: {token} and {names[token_id]} would both have the id "
            f"{token_id}, since its ids have gaps",
        )
    epath.Path(to).write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def _read(path: epath.PathLike) -> tokenizers.Tokenizer:
    """The only reader of tokenizer.json; its path may be a bucket."""
    path = epath.Path(path)
    require(path.is_file(), f"the tokenizer {path} does not exist")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and a panic is none
        raise InputError(f"{path} is not a readable tokenizer.json ({error})") from error
    # Settings of the program that saved it, which would cut and pad every text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find_tokenizer(
    name: str, workdir: epath.PathLike, base: epath.PathLike | None = None
) -> epath.Path:
    """The file of `data.tokenizer`: in the workdir, in that of init_from, or in the current folder.

    Args:
      base: workdir of init_from.

    Raises:
      InputError: a new workdir and the current folder have one each, with different contents.
    """
    inside, outside = epath.Path(workdir) / name, epath.Path(name)
    if not inside.is_file():
        given = [] if base is None else [epath.Path(base) / name]
        return next((path for path in given if path.is_file()), outside)
    is_new = not inside.with_name("config.json").exists()  # else its config means its own file
    differ = is_new and outside.is_file() and inside.read_bytes() != outside.read_bytes()
    require(
        not differ,
        f"there are two different tokenizers, {inside} and {outside} in the current folder: remove "
        "or rename one",
    )
    return inside


def open_tokenizer(
    c: DataConfig, workdir: epath.PathLike, vocab_size: int, base: epath.PathLike | None = None
) -> Tokenizer:
    """Opens the tokenizer of a run: data.tokenizer is "bytes", or a file, see `find_tokenizer`.

    Raises:
      InputError: no such file, two different ones, a missing special token, or an id that
        model.vocab_size does not cover.
    """
    if c.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = FileTokenizer(find_tokenizer(c.tokenizer, workdir, base))
    require(
        tokenizer.vocab_size <= vocab_size,
        f"the tokenizer {c.tokenizer} has the id {tokenizer.vocab_size - 1}, but model.vocab_size is "
        f"{vocab_size}: ids must be below it",
    )
    return tokenizer
