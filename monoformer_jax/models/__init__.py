"""The model interface: `MODELS` maps `model.kind` to a module; other code uses models only through it.

A module has a frozen dataclass and functions of it; parameters are a nested dict, with LoRA adapters
under "lora".

    Config                            with kind, dtype, layout (see `config.TokenLayout`) and
                                      predict_variance
    SIZES                             named sizes: {name: keys of Config}
    init(c, key) -> params            float32
    logical_axes(c)                   tree of axis names, see `parallel.RULES`
    adapters(c)                       {path of a matrix: (input axis, output axis)} that LoRA adapts
    FROZEN                            names of the parameters that are frozen with adapters
    flops(c, *, tokens, pairs, patches, text), recomputed_flops(c, tokens)
    forward(c, params, batch, x_t, times [B, I]) -> Outputs
    text_head(c, params) -> [D, V]    None for a model without text
    init_state(c, rows) -> State
    extend(c, params, state, block, slots) -> State       appends a block; prefill: empty state
    decode(c, params, state, tokens [B]) -> State         appends a token, see state.hidden
    denoise(c, params, state, grid, x_t [B, n, P], times [B]) -> prediction, variance
                                      does not change the state

A State is a pytree with lengths [B] and hidden [B, D], and has take(rows), with_room(tokens),
truncate(lengths, slots), weave(states, slots) and logical_axes(); see `nn.cache.DecodeState`. `slots`
is its capacity in tokens; a model with a state of fixed size ignores it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import ml_collections

from monoformer_jax.config import Config
from monoformer_jax.config_values import build
from monoformer_jax.diffusion.objectives import check_solver
from monoformer_jax.errors import require
from monoformer_jax.models import diffussm, monoformer

MODELS: dict[str, ModuleType] = {"monoformer": monoformer, "diffussm": diffussm}


def get_model(c: Any) -> ModuleType:
    """Returns the module of a model's config."""
    return MODELS[c.kind]


@functools.cache
def abstract_params(c: Any) -> dict:
    """The parameters of a model as ShapeDtypeStructs, in the tree of `init`; not to be changed."""
    return jax.eval_shape(lambda: get_model(c).init(c, jax.random.key(0)))


def find_model(kind: str) -> ModuleType:
    """Returns the module of that name; raises InputError if there is none."""
    known = isinstance(kind, str) and kind in MODELS
    require(known, f"model.kind={kind!r} is not a model; choose from {', '.join(MODELS)}")
    return MODELS[kind]


def make_config(values: Mapping[str, Any]) -> Config:
    """Builds a Config from nested mappings, such as a ConfigDict or config.json.

    Raises:
      InputError: an unknown key, a value of another type, a value out of range, or incompatible
        values.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    require(isinstance(values, Mapping), "the config is not a group of keys")
    model = values.get("model", {})
    require(isinstance(model, Mapping), "config key model is a group of keys")
    require("predict_variance" not in model,
            "model.predict_variance is derived from objective.learn_sigma: set the latter")  # fmt: skip
    kind = find_model(model.get("kind", "monoformer"))
    config = build(Config, {**values, "model": build(kind.Config, model, "model.")})
    check_solver(config.objective, config.sampling.solver)
    require(
        not config.lora.rank or bool(kind.adapters(config.model)),
        f"lora.rank={config.lora.rank}: a {config.model.kind} model has no matrices for adapters",
    )
    return config


def base_config(kind: str = "monoformer") -> ml_collections.ConfigDict:
    """Returns the default config, which `configs/NAME.py` overrides."""
    return ml_collections.ConfigDict(Config(find_model(kind).Config()).to_dict())


def named_size(name: str, kind: str = "monoformer") -> dict[str, Any]:
    """Returns the model config keys of a named size; raises InputError if there is none."""
    sizes = find_model(kind).SIZES
    require(name in sizes, f"there is no size {name!r}; there are {', '.join(sizes)}")
    return sizes[name]
