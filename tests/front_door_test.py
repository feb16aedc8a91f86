"""Bad input to every command and to the API: one sentence, exit code 2, and nothing is changed."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import ROOT

import monoformer_jax
from monoformer_jax.__main__ import main
from monoformer_jax.errors import InputError
from monoformer_jax.models import monoformer
from monoformer_jax.runtime.checkpoint import Checkpoints
from monoformer_jax.runtime.workdir import claim_workdir

CONFIGS = {
    "empty": "",
    "syntax": "def get_config(:\n",
    "number": "get_config = 3\n",
    "dict": "def get_config():\n    return {}\n",
    "none": "def get_config():\n    pass\n",
    "raises": "def get_config():\n    return 1 / 0\n",
    "imports": "import no_such_module\n",
    "exits": "raise RuntimeError('x ' * 10_000)\n",
}
W, P = "--workdir=run --processes=1", "--prompt=a"

TRAIN = [
    ("", "required: --config, --workdir"),
    ("--config=digits", "required: --workdir"),
    ("--workdir=new", "required: --config"),
    ("--config=none.py --workdir=new", "--config=none.py: no such file"),
    ("--config=dir --workdir=new", "--config=dir: no such file"),
    ("--config= --workdir=new", "--config=: no such file"),
    ("--config=digit --workdir=new", "did you mean digits?"),
    ("--config=empty.py --workdir=new", "--config=empty.py has no get_config()"),
    ("--config=syntax.py --workdir=new", "syntax.py, line 1: SyntaxError"),
    ("--config=number.py --workdir=new", "--config=number.py has no get_config()"),
    ("--config=dict.py --workdir=new", "get_config() returns dict, not the ConfigDict"),
    ("--config=none_.py --workdir=new", "get_config() returns NoneType, not the ConfigDict"),
    ("--config=raises.py --workdir=new", "raises.py, line 2: ZeroDivisionError: division by zero"),
    ("--config=imports.py --workdir=new", "imports.py, line 1: ModuleNotFoundError"),
    ("--config=exits.py --workdir=new", "exits.py, line 1: RuntimeError"),
    ("--config=dict.py:a --workdir=new", "takes other arguments"),
    ("--config=digits:huge --workdir=new", "there is no size 'huge'"),
    ("--config=finetune:none --workdir=new", "none is not a workdir to start from"),
    ("--config=latin.txt --workdir=new", "latin.txt, line 1: SyntaxError"),
    ("--config=digits --workdir=", "--workdir: '' is not a path"),
    ("--config=digits --workdir=http://a/b", "neither on this machine nor on gs://"),
    ("--config=digits --workdir=ftp:/a", "neither on this machine nor on gs://"),
    ("--config=digits --workdir=s3://a/b", "needs a package: pip install s3fs"),
    ("--config=digits --workdir=new extra", "unknown argument extra"),
    ("--config=digits --workdir=new sample", "unknown argument sample"),
    ("--config=digits --wrkdir=new", "required: --workdir"),
    ("--config=digits --workdir=new --steps=3", "unknown argument --steps=3"),
    ("--config=digits --workdir=new --confg.steps=3", "unknown argument --confg.steps=3; did you"),
    ("--config=digits --workdir=new --processes=0", "--processes: 0 must be 1 or more"),
    ("--config=digits --workdir=new --processes=two", "'two' is not a whole number"),
    ("--config=digits --workdir=new --process=-1", "--process: -1 must be 0 or more"),
    ("--config=digits --workdir=new --process=0", "must be given together"),
    ("--config=digits --workdir=new --coordinator=here", "must be given together"),
    ("--config=digits --workdir=new --coordinator=a --processes=2 --process=0", "is not HOST:PORT"),
]
OVERRIDES = [
    ("steps", "write --config.steps=VALUE"),
    ("=3", "unknown config key "),
    ("stesp=3", "unknown config key stesp; did you mean steps?"),
    ("data.row_length=3", "did you mean data.max_seq_len?"),
    ("steps=0", "steps=0 must be above 0"),
    ("steps=-1", "steps=-1 must be above 0"),
    ("steps=1.5", "steps=1.5 is not of type int"),
    ("steps=many", "steps='many' is not of type int"),
    ("steps=None", "steps=None is not of type int"),
    ("steps=True", "steps=True is not of type int"),
    ("steps=[1]", "steps=[1] is not of type int"),
    ("steps=1e999", "steps=inf is not of type int"),
    (f"steps={10**30}", "has more than 63 bits"),
    ("steps.x=1", "steps is a value, not a group"),
    ("seed=-1", "seed=-1 is not between"),
    (f"seed={2**32}", "is not between 0 and 2**32 - 1"),
    ("name=3", "name=3 is not of type str"),
    ("init_from=None", "init_from=None is not of type str"),
    ("batch_size=0", "batch_size=0 must be above 0"),
    ("log_every=0", "log_every=0 must be above 0"),
    ("checkpoint_every=-5", "checkpoint_every=-5 must be above 0"),
    ("keep_period=7", "keep_period=7 is not a multiple of"),
    ("watchdog_seconds=-1", "watchdog_seconds=-1.0 must be 0 or more"),
    ("watchdog_seconds=1e999", "is not a finite number"),
    ("model=1", "config key model is a group"),
    ("model.kind=gpt", "model.kind='gpt' is not a model"),
    ("model.num_layers=0", "num_layers=0 must be above 0"),
    ("model.num_kv_heads=3", "is not a multiple of model.num_kv_heads=3"),
    ("model.head_dim=7", "must be even for RoPE"),
    ("model.patch_size=3", "is not divisible by model.patch_size=3"),
    ("model.dtype=float16", "model.dtype='float16' is none of"),
    ("model.attention=fast", "model.attention='fast' is none of"),
    (
        "model.attention=gpu --processes=1",
        "attention impl 'gpu' cannot run on platform 'cpu': use 'auto'",
    ),
    ("model.remat=all", "model.remat='all' is none of"),
    ("model.norm_eps=1e999", "is not a finite number"),
    ("model.predict_variance=True", "is derived from objective.learn_sigma"),
    ("model.original.image_head=x", "image_head='x' is none of"),
    ("data=3", "config key data is a group"),
    ("data.mixture=cats", "data.mixture='cats' is not a group of keys"),
    ("data.mixture={}", "data.mixture has no source"),
    ("data.mixture={1:2}", "is not a group of keys"),
    ("data.mixture.draw=lots", "data.mixture.draw='lots' is not of type float"),
    ("data.mixture.draw=-1", "data.mixture.draw=-1.0 must be 0 or more"),
    ("data.mixture.draw=1e999", "data.mixture.draw=inf is not a finite number"),
    ("data.records.cats=5", "data.records.cats=5 is not of type str"),
    ("data.records=5", "data.records=5 is not a group of keys"),
    ("data.max_seq_len=20", "data.max_seq_len=20 cannot hold one image"),
    ("data.prompt_dropout=2", "prompt_dropout=2.0 is not between 0 and 1"),
    ("data.streams=-1", "data.streams=-1 must be 0 or more"),
    ("data.end_of_prompt=1", "end_of_prompt=1 is not of type bool"),
    ("data.tokenizer=5", "data.tokenizer=5 is not of type str"),
    ("optimizer.learning_rate=0", "learning_rate=0.0 must be above 0"),
    ("optimizer.learning_rate=1e999", "optimizer.learning_rate=inf is not a finite number"),
    ("optimizer.learning_rate=fast", "learning_rate='fast' is not of type float"),
    ("optimizer.schedule=linear", "schedule='linear' is none of cosine, constant"),
    ("optimizer.b1=1.5", "optimizer.b1=1.5 is not between 0 and 1"),
    ("optimizer.grad_accum_steps=5", "is not a multiple of optimizer.grad_accum_steps=5"),
    ("optimizer.first_moment_dtype=int8", "is none of float32, bfloat16"),
    ("loss.text_weight=-1", "loss.text_weight=-1.0 must be 0 or more"),
    ("objective.kind=gan", "gan"),
    ("objective.shift=0", "objective.shift=0.0 must be above 0"),
    ("objective.t_sampler=x", "t_sampler='x' is none of"),
    ("lora.rank=4", "lora.rank=4 adapts a trained model"),
    ("lora.rank=-1", "lora.rank=-1 must be 0 or more"),
    ("sampling.steps=1001", "sampling.steps=1001 must be 1000 or less"),
    ("sampling.guidance=0", "sampling.guidance=0.0 must be above 0"),
    ("sampling.guidance=1e999", "sampling.guidance=inf is not a finite number"),
    ("sampling.solver=rk4", "'rk4' does not sample"),
    ("sampling.guidance_low=2", "must be ordered and between 0 and 1"),
    ("mesh.data=two", "mesh.data='two' is not of type int"),
    ("name=" + "x" * 50_000 + " --config.steps=no", "steps='no' is not of type int"),
    ("steps=" + "x" * 50_000, "is not of type int"),
]
SAMPLE = [
    ("", "required: --workdir"),
    (W, "there is no prompt: give --prompt or --prompts"),
    (f"--workdir=none --processes=1 {P}", "none holds no trained model"),
    (f"--workdir=dir --processes=1 {P}", "dir holds no trained model"),
    (f"--workdir=text.txt --processes=1 {P}", "holds no trained model"),
    (f"--workdir=damaged --processes=1 {P}", "config.json"),
    (f"{W} {P} --promt=b", "unknown argument --promt=b; did you mean --prompt?"),
    (f"{W} {P} --prompts=none.txt", "--prompts=none.txt: no such file"),
    (f"{W} {P} --prompts=dir", "--prompts=dir has no .txt files"),
    (f"{W} --prompts=latin.txt", "--prompts=latin.txt is not UTF-8 text"),
    (f"{W} --prompts=nothing.txt", "there is no prompt"),
    (f"{W} {P} --prompts=gs://a/b", "gs://a/b"),
    (f"{W} {P} --image=none.png", "there is no file none.png"),
    (f"{W} {P} --image=dir", "there is no file dir"),
    (f"{W} {P} --image=broken.png", "broken.png) cannot be read as an image"),
    (f"{W} {P} --image=bomb.png", "over 67 million"),
    (f"{W} {P} --count=0", "--count: 0 must be 1 or more"),
    (f"{W} {P} --count=1.5", "--count: '1.5' is not a whole number"),
    (f"{W} {P} --batch=-1", "--batch: -1 must be 1 or more"),
    (f"{W} {P} --seed=-1", "--seed: -1 must be 0 to 4294967295"),
    (f"{W} {P} --seed=4294967296", "must be 0 to 4294967295"),
    (f"{W} {P} --seed={'9' * 5000}", "is not a whole number"),
    (f"{W} {P} --max_tokens=0", "--max_tokens: 0 must be 1 or more"),
    (f"{W} {P} --temperature=-1", "temperature=-1.0 must be 0 (greedy) or more"),
    (f"{W} {P} --temperature=nan", "--temperature: 'nan' is not a finite number"),
    (f"{W} {P} --temperature=hot", "--temperature: 'hot' is not a finite number"),
    (f"{W} {P} --top_k=-1", "--top_k: -1 must be 0 or more"),
    (f"{W} {P} --top_p=0", "top_p=0.0 must be above 0"),
    (f"{W} {P} --top_p=2", "top_p=2.0 must be above 0 and at most 1"),
    (f"{W} {P} --repetition_penalty=0", "repetition_penalty=0.0 must be above 0"),
    (f"{W} {P} --repetition_penalty=inf", "'inf' is not a finite number"),
    (f"{W} {P} --stop=", "an empty string would end every answer at once"),
    (f"{W} {P} --steps=0", "--steps: 0 must be 1 to 1000"),
    (f"{W} {P} --steps=1001", "--steps: 1001 must be 1 to 1000"),
    (f"{W} {P} --steps=1e3", "--steps: '1e3' is not a whole number"),
    (f"{W} {P} --guidance=inf", "--guidance: 'inf' is not a finite number"),
    (f"{W} {P} --guidance=0", "guidance=0.0 must be above 0"),
    (f"{W} {P} --image_guidance=-2", "image_guidance=-2.0 must be above 0"),
    (f"{W} {P} --solver=rk4", "--solver: invalid choice: 'rk4'"),
    (f"{W} {P} --solver=ddpm --paint", "'ddpm' does not sample"),
    (
        f"{W} {P} --negative_prompt=b --guidance=1",
        "negative_prompt needs a sampling.guidance other",
    ),
    (f"{W} {P} --dtype=int8", "--dtype: invalid choice: 'int8'"),
    (f"{W} {P} --vae=none", "none is not a folder"),
    (f"{W} {P} --vae=dir", "dir has no config.json"),
    (f"{W} {P} --vision=dir", "dir has no config.json"),
    (f"{W} {P} --chat --continue_prompt", "--chat and --continue_prompt exclude each other"),
    (f"{W} {P} --labels=none.json", "the label file none.json does not exist"),
    (f"{W} {P} --labels=list.json", "list.json is not a JSON list of 1000 ImageNet names"),
    (f"{W} {P} --labels=broken.png", "broken.png is not a JSON list of 1000 ImageNet names"),
    (f"{W} {P} --out=none/a.png", "there is no folder none"),
    (f"{W} {P} --out=text.txt/a.png", "there is no folder text.txt"),
    (f"{W} {P} --out=a", "--out=a: end it in .png"),
    (f"{W} {P} --out=a.tiff", "--out=a.tiff: end it in .png"),
    (f"{W} {P} --out=", "is not a path"),
    (f"{W} {P} --out=picture.png", "picture.png exists, and this command did not write it"),
    (f"{W} {P} --out=run/config.png", "run/config.json exists, and this command did not write it"),
    (f"{W} {P} --out=text.txt/", "text.txt/ is a file, not a folder"),
    (f"{W} {P} --out=http://a/b.png", "neither on this machine nor on gs://"),
    (f"{W} {P} --out=/proc/a.png", "files cannot be written to /proc"),
    (f"{W} {P} --json=dir", "--json=dir is a folder"),
    (f"{W} {P} --json=run/config.json", "run/config.json exists, and this command did not"),
    (f"{W} {P} --npz=a.txt", "--npz=a.txt must end in .npz"),
    (f"{W} {P} --npz=none/a.npz", "there is no folder none"),
    (f"{W} {P} --total=0", "--total: 0 must be 1 or more"),
    (f"{W} {P} --total=2", "--total writes a folder of images: give it with --out=FOLDER"),
    (f"{W} {P} --total=2 --out=a.png", "--total writes a folder of images"),
    (f"{W} {P} --total=2 --out=text.txt", "--out=text.txt is a file, not a folder"),
    (f"{W} {P} --total=2 --out=new --npz=a.npz", "--total writes its own record"),
    (f"{W} {P} --total=2 --out=new --count=3", "--total writes its own record"),
    (f"{W} {P} --total=2 --out=new --process=2 --processes=2", "--process=2 is not between 0 and"),
    (f"--workdir=run {P} --process=0 --total=2 --out=new", "--process needs --processes"),
    (
        f"--workdir=run {P} --process=0 --processes=2",
        "--process without --coordinator needs --total",
    ),
]
OTHERS = [
    ("fly", "unknown command fly"),
    ("smple --workdir=a", "unknown command smple; did you mean sample?"),
    ("--verson", "unknown option --verson; did you mean --version?"),
    ("x" * 50_000, "unknown command x"),
    ("config digit", "did you mean digits?"),
    ("config digits extra", "unknown argument extra"),
    ("config digits --keys=smapling", "no key begins so"),
    ("config digits --config.steps=0", "steps=0 must be above 0"),
    ("config dict.py", "get_config() returns dict"),
    ("evaluate", "give --workdir, a trained run, or --images and --reference"),
    ("evaluate --workdir=run --reference=dir", "--reference needs --images"),
    ("evaluate --images=dir", "--images needs --reference"),
    ("evaluate --images=dir --reference=dir", "dir has no pictures"),
    ("evaluate --workdir=none", "none holds no trained model"),
    ("evaluate --workdir=run --json=none/a.json", "there is no folder none"),
    ("evaluate --workdir=run --json=list.json", "list.json exists, and this command did not"),
    ("evaluate --workdir=run --json=dir", "--json=dir is a folder"),
    ("evaluate --workdir=run --steps=3", "unknown argument --steps=3"),
    ("check --workdir=none", "--workdir=none is not a folder"),
    ("check --workdir=run --json=list.json", "list.json exists, and this command did not"),
    ("bench ssm --lengths=many", "--lengths=many is not a list of numbers"),
    ("bench input_pipeline --seconds=nan", "--seconds: 'nan' is not a finite number"),
    ("bench input_pipeline --config.steps=3", "--config.steps=3 needs --config=FILE"),
    ("demo --workdir=showcas", "no such folder, and no model of that name"),
    ("demo --workdir=none", "none holds no trained model"),
    ("demo --workdir=run --port=99999", "--port: 99999 must be 0 to 65535"),
    ("demo --workdir=run --port=http", "--port: 'http' is not a whole number"),
    ("demo --workdir=run --share=yes", "--share: invalid choice: 'yes'"),
    ("demo --workdir=run --vae=none", "none is not a folder"),
    ("convert", "required: --from, --to"),
    ("convert --from=none --to=new", "none is not a folder"),
    ("convert --from=text.txt --to=new", "text.txt is not a folder"),
    ("convert --from=dir --to=new", "dir has no config.json"),
    ("convert --from=run --to=dir", "--to=dir already exists; nothing was changed"),
    ("convert --from=run --to=text.txt", "--to=text.txt already exists; nothing was changed"),
    ("convert --from=run --to=new --dtype=int8", "--dtype: invalid choice: 'int8'"),
    ("convert --from=run --to=new --format=pickle", "--format: invalid choice: 'pickle'"),
    ("convert --from=run --to=new --format=orbax --dtype=bf16", "needs --format=safetensors"),
    ("convert --from=run --to=new --seed=-1", "--seed: -1 must be 0 to"),
    ("convert --from=run --to=gs://a/b", "gs://a/b"),
    ("convert --from=hostile --to=new", "num_hidden_layers"),
    ("prepare_data", "required: --from, --to"),
    ("prepare_data --from=none --to=new", "none"),
    ("prepare_data --from=lines.jsonl --to=new --image_size=0", "--image_size: 0 must be 1 or"),
    ("prepare_data --from=lines.jsonl --to=new --batch_size=x", "'x' is not a whole number"),
    ("prepare_data --from=lines.jsonl --to=new --per_file=-3", "--per_file: -3 must be 1 or more"),
    ("prepare_data --from=lines.jsonl --to=new --seed=1.5", "'1.5' is not a whole number"),
    ("prepare_data --from=lines.jsonl --to=new --labels=none.json", "none.json does not exist"),
    ("prepare_data --from=lines.jsonl --to=new --codec=sd_vae --vae=none --processes=1",
     "none is not a folder"),
    ("prepare_data --from=lines.jsonl --to=new --vae=none --processes=1", "give --codec=sd_vae"),
    ("prepare_data --from=lines.jsonl --to=new --codec=sd_vae --processes=1", "give --vae=DIR"),
    ("prepare_data --from=lines.jsonl --to=new --codec=jpg --processes=1", "is none of pixels, sd_vae"),
    ("prepare_data --from=lines.jsonl --to=new --channels=4", "--channels: invalid choice: 4"),
    ("encode_latents --from=lines.jsonl --to=new", "encode_latents is now prepare_data"),
    ("plan", "required: --config, --topology"),
    ("plan --config=digits", "required: --topology"),
    ("plan --config=digits --topology=v5e:1x1 --mode=fly", "--mode: invalid choice: 'fly'"),
    ("plan --config=digits --topology=v5e:1x1 --json=none/a.json", "there is no folder none"),
    ("plan --config=digits --topology=v5e:1x1 --json=list.json", "this command did not write it"),
    ("plan --config=digits --topology=v5e:1x1 --mesh=data", "write it as --config.mesh.data=VALUE"),
    ("plan --config=digits --topology=v5e:1x1 --mesh=depth=2", "unknown config key mesh.depth"),
    ("plan --config=digits --topology=v5e:1x1 --config.steps=no", "steps='no' is not of type int"),
    ("plan --config=none.py --topology=v5e:1x1", "none.py: no such file"),
    ("bench fly", "unknown bench 'fly'"),
    ("bench trainin", "did you mean training?"),
    ("bench training --steps=0", "--steps: 0 must be 1 or more"),
    ("bench training --config.steps=3", "--config.steps=3 needs --config=FILE"),
    ("bench training --config=none.py", "none.py: no such file"),
    ("bench training --compare=dir", "--compare=dir: there is no JSON file"),
    ("bench training --compare=lists", "does not have the format shown by --help"),
    ("bench training --json=list.json", "list.json exists, and this command did not write it"),
    ("bench sampling --images=0", "--images: 0 must be 1 or more"),
    ("bench sampling --prompt_tokens=2", "--prompt_tokens: 2 must be 3 or more"),
    ("bench sampling --workdir=none", "none holds no trained model"),
    ("bench sampling --repeats=x", "'x' is not a whole number"),
    ("bench attention --repeats=0", "--repeats: 0 must be 1 or more"),
    ("bench attention --tokens=none", "'none' is not a whole number"),
    ("bench attention --mixes=cats", "--mixes: unknown cats, choose from"),
    ("bench attention --heads=4", "--heads=4 is not query heads x KV heads x head dim"),
    ("bench attention --static --chips=v9", "--chips: unknown v9, choose from"),
    ("bench attention --head-dims=7", "--head-dims: invalid choice: 7"),
]  # fmt: skip
LINES = [
    *((f"train {line}", message) for line, message in TRAIN),
    *(
        (f"train --config=digits:tiny --workdir=new --config.{x}", message)
        for x, message in OVERRIDES
    ),
    *((f"sample {line}", message) for line, message in SAMPLE),
    *OTHERS,
]
MESSAGE = [{"role": "user", "content": "a"}]
API = [
    ("load(None)", "None is not a path"),
    ("load(3)", "3 is not a path"),
    ("load('')", "'' is not a path"),
    ("load('none')", "none holds no trained model"),
    ("load('damaged')", "config.json"),
    ("load('run', dtype='int8')", "dtype='int8' is not float32 or bfloat16"),
    ("load('run', vae='none')", "none is not a folder"),
    ("load('run', vae=3)", "3 is not a path"),
    ("load('run', vision='dir')", "dir has no config.json"),
    ("m.generate_text([])", "there is no prompt"),
    ("m.generate_text(None)", "is of type NoneType: an image is a path, bytes"),
    ("m.generate_text(3)", "is of type int: an image is a path"),
    ("m.generate_text(['ok', ''])", "prompt 2 is empty"),
    ("m.generate_text([['a', {}]])", "a part with type=None and the keys"),
    ("m.generate_text({'type': 'text'})", "a part with type='text' and the keys type"),
    ("m.generate_text({'type': 'audio', 'audio': b''})", "a part with type='audio'"),
    ("m.generate_text('a' * 999)", "has 1000 tokens"),
    ("m.generate_text('a', max_tokens=0)", "max_tokens=0 must be above 0"),
    ("m.generate_text('a', max_tokens='5')", "max_tokens='5' is not a whole number"),
    ("m.generate_text('a', max_tokens=2.5)", "max_tokens=2.5 is not a whole number"),
    ("m.generate_text('a', max_tokens=None)", "max_tokens=None is not a whole number"),
    ("m.generate_text('a', max_tokens=True)", "max_tokens=True is not a whole number"),
    ("m.generate_text('a', temperature='x')", "temperature='x': it must be a number"),
    ("m.generate_text('a', temperature=None)", "temperature=None: it must be a number"),
    ("m.generate_text('a', temperature=[1, [2]])", "temperature=[1, [2]]: it must be a number"),
    ("m.generate_text('a', temperature=[1, 2])", "temperature has shape (2,) for 1 rows"),
    ("m.generate_text('a', temperature=float('nan'))", "temperature=nan must be 0"),
    ("m.generate_text('a', top_k=1.5)", "top_k=1.5: it must be a number"),
    ("m.generate_text('a', top_k=2**40)", "top_k=1099511627776 must be 0 (off) or more"),
    ("m.generate_text('a', top_p='all')", "top_p='all': it must be a number"),
    ("m.generate_text('a', repetition_penalty=-1)", "repetition_penalty=-1 must be above 0"),
    ("m.generate_text('a', stop=3)", "stop=3 is neither a text nor a list of texts"),
    ("m.generate_text('a', stop=[3])", "stop=[3] is neither a text nor a list of texts"),
    ("m.generate_text('a', stop='')", "an empty string would end every answer"),
    ("m.generate_text('a', seed=None)", "seed=None is not a whole number"),
    ("m.generate_text('a', seed=-1)", "seed=-1 is not between 0 and"),
    ("m.generate_text('a', seed=1.0)", "seed=1.0 is not a whole number"),
    ("m.generate_text('a', seed=[1, 2])", "2 seeds for 1 rows"),
    ("m.generate_text('a', seed=['x'])", "seed='x' is not a whole number"),
    ("m.generate_images('a', count=0)", "count=0 must be above 0"),
    ("m.generate_images('a', count='2')", "count='2' is not a whole number"),
    ("m.generate_images('a', size=8)", "size=8 is not (height, width)"),
    ("m.generate_images('a', size='88')", "size='88' is not (height, width)"),
    ("m.generate_images('a', size=(8,))", "size=(8,) is not (height, width)"),
    ("m.generate_images('a', size=(8.0, 8))", "size=8.0 is not a whole number"),
    ("m.generate_images('a', size=(0, 8))", "size=0 must be above 0"),
    ("m.generate_images('a', size=(800, 8))", "but the model was trained up to"),
    ("m.generate_images('a', output='jpg')", "output='jpg' is not 'pil' or 'numpy'"),
    ("m.generate_images('a', output=['pil'])", "output=['pil'] is not"),
    ("m.generate_images('a', preview=3)", "preview=3 is not a function"),
    ("m.generate_images('a', every='x')", "every='x' is not a whole number"),
    ("m.generate_images('a', steps=2.5)", "steps=2.5 is not of type int"),
    ("m.generate_images('a', steps='9')", "steps='9' is not of type int"),
    ("m.generate_images('a', steps=1001)", "steps=1001 must be 1000 or less"),
    ("m.generate_images('a', step=3)", "unknown setting step: choose from solver"),
    ("m.generate_images('a', guidance=float('inf'))", "guidance=inf is not a finite number"),
    ("m.generate_images('a', guidance='2')", "guidance='2' is not of type float"),
    ("m.generate_images('a', solver=None, shift=-1)", "sampling.shift=-1.0 must be 0 or more"),
    ("m.generate_images('a', solver='rk4')", "'rk4' does not sample"),
    ("m.generate_images('a', clip=1)", "clip=1 is not of type bool"),
    ("m.generate_images('a', negative_prompt=3)", "negative_prompt=3 is not of type str"),
    ("m.generate_images('/none.png')", "the image of prompt 1: there is no file /none.png"),
    ("m.generate_images('https://a/b.png')", "is a URL, 'https://a/b.png': nothing is fetched"),
    ("m.generate_images([['text.txt.png', 'a']])", "there is no file text.txt.png"),
    ("m.edit('/nope.png', 'b')", "there is no file /nope.png"),
    ("m.edit('nope', 'b')", "there is no file nope"),
    ("m.edit('broken.png', 'b')", "broken.png) cannot be read as an image"),
    ("m.edit('bomb.png', 'b')", "over 67 million"),
    ("m.edit(None, 'b')", "is of type NoneType"),
    ("m.edit(b'', 'b')", "cannot be read as an image"),
    ("m.edit('data:image/png;base64,x', 'b')", "the data: URL is not base64"),
    ("m.edit('data:image/png,xx', 'b')", "must have the form data:image/png;base64"),
    ("m.edit('http://a/b', 'b')", "nothing is fetched"),
    ("m.edit(np.zeros((4, 4, 9)), 'b')", "has shape (4, 4, 9)"),
    ("m.edit(np.array([[None]]), 'b')", "is neither uint8 nor floats"),
    ("m.edit(PICTURE, 3)", "the instruction must be a text"),
    ("m.edit(PICTURE, '')", "prompt 1 is empty"),
    ("m.edit(PICTURE, 'b', image_guidance='x')", "image_guidance='x' is not of type float"),
    ("m.chat([])", "the last message must have the role user"),
    ("m.chat(None)", "the messages are of type NoneType"),
    ("m.chat('hello')", "the messages are of type str"),
    ("m.chat(['hello'])", "message 1 is not {'role'"),
    ("m.chat([{'role': 'user'}])", "message 1 is not {'role'"),
    ("m.chat([{'role': 'tool', 'content': 'a'}])", "message 1 is not {'role'"),
    ("m.chat([{'role': ['user'], 'content': 'a'}])", "message 1 is not {'role'"),
    ("m.chat([{'role': 'user', 'content': None}])", "the image of message 1 is of type NoneType"),
    ("m.chat([{'role': 'user', 'content': ['a.png', 'b']}])", "path of an image: give a pathlib.Path"),
    ("m.chat([{'role': 'user', 'content': ''}])", "is empty"),
    ("m.chat(MESSAGE, max_tokens=0)", "max_tokens=0 must be above 0"),
    ("m.chat(MESSAGE, seed='x')", "seed='x' is not a whole number"),
    ("m.chat(MESSAGE, temperature='x')", "temperature='x': it must be a number"),
    ("m.chat(MESSAGE, top_k=-1)", "top_k=-1 must be 0 (off) or more"),
    ("m.chat(MESSAGE, output='gif')", "output='gif' is not 'pil' or 'numpy'"),
    ("m.chat(MESSAGE, steps=0)", "steps=0 must be above 0"),
    ("m.chat(MESSAGE, preview='x')", "preview='x' is not a function"),
    ("m.chat(MESSAGE, every=-1)", "every=-1 must be 0 or more"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    """A folder with a trained model of random weights, and files that a user may name."""
    folder = tmp_path_factory.mktemp("front_door")
    claim_workdir(folder / "run", config)
    params = monoformer.init(config.model, jax.random.key(0))
    with Checkpoints(folder / "run", 1) as checkpoints:
        checkpoints.save_weights({"ema": lambda: params})
    for name, text in CONFIGS.items():
        (folder / f"{'none_' if name == 'none' else name}.py").write_text(text)
    for name in ("dir", "damaged", "lists", "hostile"):
        (folder / name).mkdir()
    (folder / "damaged" / "config.json").write_text("{")
    (folder / "text.txt").write_text("a text\n")
    (folder / "nothing.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "list.json").write_text("[1]")
    (folder / "lists" / "a.json").write_text("[1]")
    (folder / "lines.jsonl").write_text('{"messages": ["a", "b"]}\n')
    llama = json.loads((ROOT / "tests/data/reference/llama_tiny/config.json").read_text())
    (folder / "hostile" / "config.json").write_text(
        json.dumps(llama | {"num_hidden_layers": 10**12})
    )
    weights = ROOT / "tests/data/reference/llama_tiny/weights.safetensors"
    (folder / "hostile" / "model.safetensors").write_bytes(weights.read_bytes())
    PIL.Image.new("RGB", (4, 4)).save(folder / "picture.png")
    (folder / "broken.png").write_bytes(b"no picture")
    PIL.Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    return folder


def snapshot(folder):
    """Path -> time of the last change; none for folders: to check one makes a file for a moment."""
    return {
        str(p): p.is_file() and p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if "__pycache__" not in str(p)
    }


def check_message(said):
    lines = said.splitlines()
    assert said.startswith("error: ") and "Traceback" not in said, said
    assert len(lines) <= 6 and max(map(len, lines)) <= 400, said


@pytest.fixture(scope="module")
def model(folder):
    return monoformer_jax.load(folder / "run")


def test_the_tables_are_long():
    assert len(LINES) + len(API) >= 250


@pytest.mark.parametrize("command", ["train", "sample", "other"])
def test_bad_command_lines(command, folder, monkeypatch, capsys):
    """All lines of a command in this process; jax is loaded once."""
    monkeypatch.chdir(folder)
    before, wrong = snapshot(folder), []
    known = ("train", "sample")
    for line, message in LINES:
        name = line.split()[0] if line.split()[0] in known else "other"
        if name != command:
            continue
        try:
            code = main(line.split(" ") if line.startswith("x") else line.split())
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:
            wrong.append(f"{line[:200]}: {type(error).__name__}: {str(error)[:200]}")
            continue
        said = capsys.readouterr().err
        said = said[said.find("error: ") :] if "mesh of" in said else said
        try:
            assert code == 2 and message in said, f"exit code {code}: {said}"
            check_message(said)
            assert snapshot(folder) == before, "files were changed"
        except AssertionError as error:
            wrong.append(f"{line[:200]}: {error}")
            before = snapshot(folder)
    assert not wrong, "\n".join(wrong)


def test_bad_arguments_of_the_api(folder, model, monkeypatch):
    monkeypatch.chdir(folder)
    scope = {"load": monoformer_jax.load, "m": model, "np": np, "MESSAGE": MESSAGE,
             "PICTURE": PIL.Image.new("RGB", (8, 8))}  # fmt: skip
    before, wrong = snapshot(folder), []
    for call, message in API:
        try:
            eval(call, scope)
            wrong.append(f"{call}: accepted")
        except InputError as error:
            if message not in str(error) or len(str(error)) > 400:
                wrong.append(f"{call}: {error}")
        except Exception as error:
            wrong.append(f"{call}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    assert snapshot(folder) == before


PROCESSES = [LINES[i] for i in range(0, len(LINES), -(-len(LINES) // 20))]


@pytest.mark.slow
@pytest.mark.parametrize("line, message", PROCESSES)
def test_bad_command_lines_of_a_process(line, message, folder):
    """A sample of the table by subprocess: what a user sees, with nothing else on stderr."""
    before = snapshot(folder)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("JAX_PLATFORMS", None)  # jax then tries libtpu, which must be silent without a TPU
    done = subprocess.run([sys.executable, "-m", "monoformer_jax", *line.split()], cwd=folder,
                          env=env, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and message in done.stderr, done.stderr
    check_message(done.stderr)
    assert done.stdout == "" and snapshot(folder) == before
