"""Tasks of the lm-evaluation-harness, from a local task file and local data."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from etils import epath
from fixtures import random_params, run
from lm_eval.api.instance import Instance

import monoformer_jax
from monoformer_jax import evaluate
from monoformer_jax.data.tokenizer import ByteTokenizer
from monoformer_jax.errors import InputError
from monoformer_jax.evaluation import harness, record
from monoformer_jax.evaluation.likelihood import Likelihood
from monoformer_jax.sampling.sampler import Sampler
from monoformer_jax.sampling.text import SamplingParams, generate_text

QUESTIONS = [{"question": f"count to {i}:", "choices": ["one", "two", "three"], "answer": i % 3}
             for i in range(7)]  # fmt: skip
CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ANSWERS = """
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
generation_kwargs: {{until: ["{stop}"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
WORDS = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}]
"""


def test_local_tasks(config, tmp_path, monkeypatch, capsys):
    """Figures against those computed from the functions; the record of the run."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub" / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = ByteTokenizer()
    sampler = Sampler(
        dataclasses.replace(config, data=dataclasses.replace(config.data, max_seq_len=64)),
        random_params(config), tokenizer,
    )  # fmt: skip
    sampler.step = 7
    (tmp_path / "data.json").write_text("\n".join(json.dumps(x) for x in QUESTIONS))
    prompts = [[x["question"]] for x in QUESTIONS]
    said = [x.text for x in generate_text(sampler, prompts, max_tokens=6, allow_images=False)]
    stop = next(x for x in "abcdefghijklmnopqrstuvwxyz" if all(x not in text for text in said))
    values = {"data": tmp_path / "data.json", "stop": stop, "target": "no"}
    (tmp_path / "tasks").mkdir()
    for name, text in (("choices", CHOICES), ("answers", ANSWERS), ("words", WORDS)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(**values))
    monkeypatch.setattr(monoformer_jax, "load", lambda *a, **k: sampler)
    (tmp_path / "run").mkdir()
    options = [f"--workdir={tmp_path / 'run'}", f"--task_folder={tmp_path / 'tasks'}"]
    run(evaluate, *options, "--tasks=local_choices,local_words,local_answers",
        f"--json={tmp_path / 'scores.json'}")  # fmt: skip
    scores = json.loads((tmp_path / "scores.json").read_text())
    likelihood = Likelihood(sampler)
    found = [
        np.argmax([
            likelihood([(tokenizer.encode(x["question"]), tokenizer.encode(f" {choice}"))])[0][0]
            for choice in x["choices"]
        ])
        for x in QUESTIONS
    ]  # fmt: skip
    right = np.mean([a == x["answer"] for a, x in zip(found, QUESTIONS)])
    assert scores["local_choices_acc"] == pytest.approx(right)
    texts = [tokenizer.encode(x["question"]) for x in QUESTIONS]
    want = np.exp(-sum(likelihood.rolling(texts)) / sum(map(len, texts)))
    assert scores["local_words_byte_perplexity"] == pytest.approx(want, rel=1e-5)
    assert scores["local_answers_exact_match"] == np.mean([text == "no" for text in said])
    assert scores["tasks"][0] == "local_choices" and "lm_eval" in scores["harness"]
    (line,) = record.read(epath.Path(tmp_path / "run"))
    assert (
        line["provenance"]["checkpoint_step"] == 7
        and "local_choices_acc" in capsys.readouterr().out
    )
    # Without its own tasks, whose files take many seconds to read.
    own = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", own)
    with pytest.raises(InputError, match="the harness has no task fly"):
        run(evaluate, *options, "--tasks=fly")


def test_answers_are_those_of_the_sampler(config):
    """In order, whatever the order of the batches; a long context keeps its end."""
    sampler = Sampler(config, random_params(config), ByteTokenizer())
    model = harness.HarnessModel(sampler, rows=2)
    contexts = ["a", "count to nine:", "draw a", "x" * 3]
    settings = [{"until": ["e"], "max_gen_toks": 5}, {"until": [], "max_gen_toks": 3}]
    asked = [(text, settings[i % 2]) for i, text in enumerate(contexts)]
    got = model.generate_until([Instance("generate_until", {}, x, i) for i, x in enumerate(asked)])
    for answer, (text, setting) in zip(got, asked):
        (want,) = generate_text(
            sampler, [[text]], max_tokens=setting["max_gen_toks"], allow_images=False,
            sampling=SamplingParams(stop=tuple(setting["until"])),
        )  # fmt: skip
        assert answer == want.text
    long = "".join(map(str, range(1000)))
    assert long.endswith(model._shortened(long)) and len(model._shortened(long)) == 80
    with pytest.raises(InputError, match="generation setting num_beams of a task"):
        model._generate(["a"], {"num_beams": 4})
