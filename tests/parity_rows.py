"""Converts a recorded training case to our batch, as the original processes ids, images and flags.

Each `<image>` id becomes a time token and patches; flag 0 is an image to denoise, flag 1 a
conditioning image. Rows are truncated to the maximum length. Defects of the original are reproduced for
the comparison: a row with a truncated image counts as text; an image that reaches the end of the batch
loses the position of its last patch; of several images to denoise in a row all have the same content,
and only the last one is denoised: the others are causal.
"""

import dataclasses

import numpy as np
from einops import rearrange
from fixtures import channels_last, logits_of, output_of
from flax import nnx

from monoformer_jax.batch import PAD, PATCH, TEXT, TIME, patchify
from monoformer_jax.diffusion import ddpm
from monoformer_jax.models import monoformer
from monoformer_jax.training.losses import Noise

IGNORED_LABEL = -100


@dataclasses.dataclass
class Rows:
    batch: dict
    noise: Noise
    valid: np.ndarray  # bool [B, L], tokens that are not padding
    painted: list  # rows with a denoised image, in order
    steps: np.ndarray  # int [len(painted)]
    lost_positions: list  # (row, token) of patches that lost their position


def build(folder, case, model):
    """Args:
    model: the MonoFormerConfig.
    """
    special = folder.config["special_tokens"]
    make = _Maker(case, model, special, folder.config["tokenizer_max_length"])
    return make.rows()


class _Maker:
    def __init__(self, case, model, special, max_length):
        self.case, self.model, self.special = case, model, special
        self.max_length = max_length
        self.features = iter(case.get("vision_features", ()))
        self.painted = []

    def rows(self):
        made = [self.row(i) for i in range(len(self.case["input_ids"]))]
        length = max(len(row["tokens"]) for row in made)
        images = max(1, max(row["image_ids"].max(initial=0) for row in made))
        pad = {"tokens": self.special["pad"], "targets": self.special["pad"]}
        batch = {}
        for name in made[0]:
            arrays = [row[name] for row in made]
            widths = [[(0, length - len(a))] + [(0, 0)] * (a.ndim - 1) for a in arrays]
            padded = [
                np.pad(a, w, constant_values=pad.get(name, 0)) for a, w in zip(arrays, widths)
            ]
            batch[name] = np.stack(padded)
        batch["prefix_stop"] = np.zeros((len(made), length, 0), np.int32)  # no noised copies
        t = self.case["t"]
        times = np.repeat(np.asarray(ddpm.step_to_t(t))[:, None], images, 1)
        noise = Noise(times, batch.pop("noise"))
        valid = batch["token_types"] != PAD
        steps = t[self.painted]
        at_end = batch["denoise"][:, -1] & (batch["token_types"][:, -1] == PATCH)
        lost = [(int(i), length - 1) for i in np.flatnonzero(at_end)]
        return Rows(batch, noise, valid, self.painted, steps, lost)

    def row(self, i):
        case = self.case
        flags = [flag for flag in case["flags"][i] if flag >= 0]
        parts, labels, images = [], [], 0
        for token, label, mask in zip(
            case["input_ids"][i], case["labels"][i], case["attention_mask"][i]
        ):
            if not mask:
                continue
            if token != self.special["image"]:
                parts.append(self.streams([token], TEXT))
                labels.append([label])
                continue
            painted, last = flags[images] == 0, 0 not in flags[images + 1 :]
            images += 1
            parts.append(self.image(i, painted, last, images))
            labels.append([IGNORED_LABEL] * len(parts[-1]["tokens"]))
        row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        labels = np.concatenate(labels)
        is_cut = row["denoise"][self.max_length :].any()
        row = {name: stream[: self.max_length] for name, stream in row.items()}
        labels = labels[: self.max_length]
        n = len(labels)
        row["segment_ids"], row["positions"] = np.ones(n, np.int32), np.arange(n, dtype=np.int32)
        if row["denoise"].any() and not is_cut:
            self.painted.append(i)
            labels = np.full(
                n, IGNORED_LABEL
            )  # rows with a denoised image have no text loss in the original
        nxt = np.append(labels[1:], IGNORED_LABEL)
        row["target_weights"] = (nxt != IGNORED_LABEL).astype(np.float32)
        row["targets"] = np.where(nxt == IGNORED_LABEL, 0, nxt).astype(np.int32)
        return row

    def image(self, i, painted, last, number):
        first, p = self.model.layout.time_tokens, self.model.patch_size
        if painted and not last:
            seen, _ = patchify(channels_last(self.case["x_t"][i]), p)
            n = len(seen)
        elif painted:
            clean, patch_positions = patchify(channels_last(self.case["x_start"][i]), p)
            noise, _ = patchify(channels_last(self.case["noise"][i]), p)
            n = len(clean)
        else:
            features = next(self.features)
            n = len(features)
        streams = self.streams([self.special["image"]] * (first + n), PATCH)
        streams["token_types"][:first] = TIME
        streams["image_ids"][:] = number
        if painted and not last:
            streams["patches"][first:] = seen
        elif painted:
            streams["denoise"][:] = True
            streams["patches"][first:], streams["noise"][first:] = clean, noise
            streams["patch_positions"][first:] = patch_positions
        else:
            streams["features"][first:] = features
        return streams

    def streams(self, tokens, kind):
        n, P, F = len(tokens), self.model.layout.patch_dim, self.model.feature_dim
        return {
            "tokens": np.asarray(tokens, np.int32),
            "token_types": np.full(n, kind, np.int32),
            "image_ids": np.zeros(n, np.int32),
            "denoise": np.zeros(n, bool),
            "patches": np.zeros((n, P), np.float32),
            "noise": np.zeros((n, P), np.float32),
            "patch_positions": np.zeros((n, 2), np.int32),
            "features": np.zeros((n, F), np.float32),
        }


def forward(model, rows, seen):
    """Logits, image output and hidden states of a batch whose patches are `seen`."""
    inputs = rows.batch | {"patches": seen}
    hidden = model.embed(inputs, rows.noise.times)
    if rows.lost_positions:
        original = dataclasses.replace(model.config.original, position_embedding="none")
        config = dataclasses.replace(model.config, original=original)
        plain = monoformer.bind(config, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        at = tuple(np.transpose(rows.lost_positions))
        hidden = hidden.at[at].set(plain.embed(inputs, rows.noise.times)[at])
    mask = monoformer.attention_mask(model.config, inputs)
    hidden, _ = model.decoder(hidden, inputs["positions"], mask, None, model.input_bias(inputs))
    output = output_of(model, hidden, rows.batch["image_ids"], rows.noise.times)
    return logits_of(model, hidden), output


def pictures(patches, rows, model, side):
    """[B, L, n P] of the rows with a denoised image -> [rows, n C, h, w], as in the original."""
    made = []
    for row in rows.painted:
        here = np.flatnonzero(
            rows.batch["denoise"][row] & (rows.batch["token_types"][row] == PATCH)
        )
        made.append(rearrange(
            np.asarray(patches)[row, here], "(h w) (k C p q) -> (k C) (h p) (w q)",
            h=side // model.patch_size, C=model.channels, p=model.patch_size, q=model.patch_size,
        ))  # fmt: skip
    return np.stack(made) if made else np.zeros((0,))
