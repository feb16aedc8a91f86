"""A tokenizer.json with the parts of LLaMA's, trained on a text of our own.

As in LLaMA, spaces are written as U+2581, one is put before every text and taken away from every
decoded text, and characters outside the vocabulary become bytes. So it is not additive: a text encoded
or decoded in pieces is not the whole text.
"""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from monoformer_jax.data.digits import NAMES, READ_PROMPT, draw_prompt, sentences
from monoformer_jax.data.tokenizer import NEW_SPECIALS

SPACE = "\u2581"
TEXT = ["### Human: hello there### Assistant: hi, what is it?", "Be brief. ", "naïve café", READ_PROMPT,
        *map(draw_prompt, range(10)), *NAMES, *(a + b for a, b in sentences())]  # fmt: skip
MERGES = 80


def write_llama_tokenizer(path, specials=NEW_SPECIALS, **settings):
    """Writes the file: <unk> <s> </s>, 256 bytes, characters and words, and `specials`.

    Args:
      settings: changes of the JSON object, such as "truncation".

    Returns:
      Its number of tokens.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=MERGES + 60, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *specials])
    values = json.loads(tokenizer.to_str()) | settings
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return len(tokens) + len(specials)
