"""What a run measures and shows every `validation.every` steps, on held-out examples and EMA weights.

WORKDIR/samples/STEP.png      the images drawn at this step, from the top in the order of the prompts
                /STEP.json    {"step", "prompts", "held_out", "questions", "answers"}
                /held_out.png the held-out images that the prompts were written for
                /read.png     the pictures that the questions are about
WORKDIR/report.html           see `evaluation.report`

In metrics.jsonl and TensorBoard the losses of `HeldOutLoss` are val_*; and base_* on the data of the
run that `init_from` names, held out there if it held some out.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import PIL.Image
from etils import epath

from monoformer_jax.data.held_out import HeldOut
from monoformer_jax.errors import InputError, require
from monoformer_jax.evaluation.held_out import HeldOutLoss, open_rows
from monoformer_jax.evaluation.samples import Samples, caption, strip
from monoformer_jax.files import atomic_write, write_json
from monoformer_jax.runtime.workdir import read_config
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.training.progress import Progress

# Share of the data of init_from that is measured if that run held out none; it was trained on them.
_BASE_SPLIT = 0.05
_SETS = {"val": "held-out", "base": "data of init_from"}
_GUARDED = {"text_loss": "text loss", "image_loss": "image loss"}


class Validation:
    """Held-out losses, samples and report of a run; see `training.loop.Validation`."""

    def __init__(self, sampler: Sampler, workdir: epath.Path):
        """Args:
        sampler: config, tokenizer and mesh of the run; its weights are not read.
        workdir: folder of the run.

        Raises:
          InputError: nothing is held out, or prompts that cannot be drawn.
        """
        self._config, self._workdir = sampler.config, workdir
        self._losses: dict[str, HeldOutLoss] = {}
        self._notes, self._warnings = [], []
        examples: dict[str, Any] = {}
        if self._config.holds_out:
            held_out = open_rows(sampler, self._config.data, self._config.validation.rows)
            examples = held_out.examples
            self._losses["val"] = HeldOutLoss(sampler, held_out.rows)
        if self._config.init_from:
            try:
                self._losses["base"] = HeldOutLoss(sampler, _open_base(sampler).rows)
            except InputError as error:
                self._notes.append(f"the data of init_from is not measured: {error}")
        self._samples = Samples(sampler, self._config.validation, examples)
        if self._samples.missing:
            self._notes.append(self._samples.missing)
        self._start: Mapping[str, float] | None = None  # the losses at step 0

    def due(self, step: int) -> bool:
        """Whether `run` is called after this step; step 0 is before the first one."""
        return step % self._config.validation.every == 0 or step == self._config.steps

    def run(self, step: int, sampler: Sampler, progress: Progress) -> dict[str, float]:
        """Measures, draws and reads; every process must call it after the same step.

        Returns:
          The losses, by their names in metrics.jsonl.
        """
        measured = {
            f"{name}_{key}": value
            for name, losses in self._losses.items()
            for key, value in losses(sampler.params).items()
        }
        images = self._samples.draw(sampler) if self._samples.drawings else None
        answers = self._samples.read(sampler) if self._samples.readings else []
        if jax.process_index() == 0:
            while self._notes:
                progress.log(f"validation: {self._notes.pop(0)}")
            self._compare(step, measured, progress)
            self._write(step, images, answers, progress)
        return measured

    def report(self) -> None:
        """Writes report.html; call it when the results of `run` are in metrics.jsonl."""
        if jax.process_index() == 0:
            # Matplotlib takes half a second to import.
            from monoformer_jax.evaluation.report import write_report

            write_report(self._workdir, self._warnings)

    def _compare(self, step: int, measured: Mapping[str, float], progress: Progress) -> None:
        """Logs the losses beside those of step 0, and warns of a model that forgets."""
        if step == 0:
            self._start = measured
        elif self._start is None:
            self._start = _first_line(self._workdir / "metrics.jsonl")
        margin, self._warnings = self._config.validation.margin, []
        said = []
        for key, value in measured.items():
            name, loss = key.split("_", 1)
            start = self._start.get(key)
            if loss not in _GUARDED:
                continue
            beside = "" if start is None or step == 0 else f" (step 0: {start:.4f})"
            said.append(f"{_SETS[name]} {_GUARDED[loss]} {value:.4f}{beside}")
            if self._config.init_from and start and value > (1 + margin) * start:
                self._warnings.append(
                    f"at step {step} the {_GUARDED[loss]} on {_SETS[name]} examples is {value:.4f}, "
                    f"{value / start - 1:.0%} above that of the weights that the run started from, "
                    f"{start:.4f} (validation.margin={margin:g})"
                )
        if said:
            progress.log(f"validation at step {step}: {', '.join(said)}")
        for warning in self._warnings:
            progress.log(f"WARNING: {warning}")

    def _write(self, step: int, images: np.ndarray | None, answers, progress: Progress) -> None:
        """Writes the samples of a step to samples/ and TensorBoard."""
        samples, folder = self._samples, self._workdir / "samples"
        pictures, texts = {}, {}
        if images is None and not answers:
            return
        folder.mkdir(exist_ok=True)
        record = {
            "step": step,
            "prompts": [],
            "held_out": False,
            "questions": [],
            "answers": answers,
        }
        if images is not None:
            targets = [drawing.target for drawing in samples.drawings]
            record["prompts"] = [caption(drawing.prompt) for drawing in samples.drawings]
            record["held_out"] = all(target is not None for target in targets)
            pictures["samples"] = strip(list(images))
            _save(folder / f"{step}.png", pictures["samples"])
            if record["held_out"]:
                _save(folder / "held_out.png", strip(samples.decode_each(targets)))
        if answers:
            shown = samples.decode_each([reading.picture for reading in samples.readings])
            record["questions"] = [(caption(r.prompt), r.answer) for r in samples.readings]
            _save(folder / "read.png", strip(shown))
            texts["readings"] = (
                "| prompt | held-out answer | answer |\n|---|---|---|\n"
                + "\n".join(
                    f"| {prompt} | {answer} | {said} |".replace("\n", " ")
                    for (prompt, answer), said in zip(record["questions"], answers)
                )
            )
        write_json(folder / f"{step}.json", record)
        progress.write(step, images=pictures, texts=texts)


def _open_base(sampler: Sampler) -> HeldOut:
    """Held-out examples of the data that the weights of `init_from` were trained on."""
    config = sampler.config
    base = read_config(config.init_from)
    data, ours = base.data, config.data
    same = (data.mixture, data.records) == (ours.mixture, ours.records)
    require(not same, "it is the data of this run")
    require(
        data.image_size == ours.image_size and base.layout.patch_dim == config.layout.patch_dim,
        "its images have another size",
    )
    if not base.holds_out:
        data = dataclasses.replace(data, validation_split=_BASE_SPLIT)
    data = dataclasses.replace(
        data, max_seq_len=ours.max_seq_len, packing_buffer=ours.packing_buffer
    )
    return open_rows(sampler, data, config.validation.rows)


def _first_line(path: epath.Path) -> Mapping[str, float]:
    """The values of step 0 in metrics.jsonl; {} if it was not measured."""
    for text in path.read_text(encoding="utf-8").splitlines()[:1]:
        line = json.loads(text)
        return line if line["step"] == 0 else {}
    return {}


def _save(path: epath.Path, picture: PIL.Image.Image) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    with atomic_write(path) as file:
        file.write_bytes(buffer.getvalue())
