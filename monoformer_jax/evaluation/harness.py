"""Tasks of the lm-evaluation-harness (the extra `eval`) for a model of this library.

Its task files say what is asked; scoring and generating is ours. It downloads the data of most tasks,
from hubs that a machine may not reach: a task file can name local data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from monoformer_jax.errors import InputError, require
from monoformer_jax.evaluation.likelihood import Likelihood
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.text import SamplingParams, generate_text

_MAX_TOKENS = 256  # of an answer, as the harness's own models
_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class HarnessModel(TemplateLM):
    """A model as the harness asks it; documents begin with <s>, as in training.

    Args:
      rows: texts of a batch.
    """

    def __init__(self, sampler: Sampler, rows: int = 16):
        super().__init__()
        self._sampler, self._rows = sampler, rows
        self._likelihood = Likelihood(sampler, rows)

    @property
    def eot_token_id(self) -> int:
        return self._sampler.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._sampler.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self._sampler.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        # The context of an empty one is the prefix, <s>, with which every text begins here.
        pairs = [
            ([] if context == [self.prefix_token_id] else context, continuation)
            for _, context, continuation in requests
        ]
        return self._likelihood(pairs)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        return self._likelihood.rolling([self.tok_encode(one.args[0]) for one in requests])

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Continues contexts greedily, or as a task asks; a batch has one setting."""
        found: list = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]),
                                                            -len(requests[i].args[0])))  # fmt: skip
        while order:
            same = [i for i in order if requests[i].args[1] == requests[order[0]].args[1]]
            same, order = same[: self._rows], [i for i in order if i not in same[: self._rows]]
            texts = [self._shortened(requests[i].args[0]) for i in same]
            for i, answer in zip(same, self._generate(texts, requests[same[0]].args[1])):
                found[i] = answer
        return found

    def _generate(self, texts: list[str], settings: dict[str, Any]) -> list[str]:
        unknown = sorted(settings.keys() - _SETTINGS)
        require(not unknown, f"generation setting {', '.join(unknown)} of a task is not supported")
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        names = {"temperature", "top_p", "top_k"} & settings.keys()
        drawn = {"temperature": 1.0} | {name: settings[name] for name in names}
        stop = tuple(x for x in until if x)
        sampling = SamplingParams(**(drawn if settings.get("do_sample") else {}), stop=stop)
        most = int(settings.get("max_gen_toks", _MAX_TOKENS))
        answers = generate_text(
            self._sampler, [[text] for text in texts], max_tokens=most, sampling=sampling,
            allow_images=False,
        )  # fmt: skip
        return [answer.text for answer in answers]

    def _shortened(self, text: str) -> str:
        """The end of a context that leaves half of the model's for an answer."""
        ids, most = self.tok_encode(text), self._likelihood.most // 2
        return text if len(ids) <= most else self._sampler.tokenizer.decode(ids[-most:])


def evaluate(
    sampler: Sampler, tasks: Sequence[str], folder: str | None, limit: int | None, rows: int = 16
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the metrics of tasks, TASK_METRIC, and what they stand on.

    Args:
      tasks: names of tasks of the harness or of files in `folder`.
      folder: folder of more task files, YAML.
      limit: examples of each task, at most.

    Raises:
      InputError: an unknown task.
    """
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if not all(map(manager.match_tasks, ([task] for task in tasks))):  # reading all takes seconds
        manager = TaskManager(include_path=folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    require(not unknown, f"--tasks: the harness has no task {', '.join(unknown)}")
    found = lm_eval.simple_evaluate(
        model=HarnessModel(sampler, rows), tasks=list(tasks), task_manager=manager, limit=limit,
        log_samples=False, bootstrap_iters=0,
    )  # fmt: skip
    if found is None:
        raise InputError("the harness measured nothing")
    scores = {
        f"{task}_{metric.partition(',')[0]}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and "," in metric
    }
    facts = {"harness": f"lm_eval {lm_eval.__version__}", "tasks": list(tasks),
             "task_versions": found["versions"], "shots": found["n-shot"], "limit": limit}  # fmt: skip
    return scores, facts
