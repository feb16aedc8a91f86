#!/usr/bin/env bash
# Replaces the weights that come with the package by those of a run, with their figures.
#
#   bash launch/ship.sh runs/showcase      -> monoformer_jax/shipped/showcase: config.json, model.safetensors,
#                                             scores.json (README.md there, the model card, is kept);
#                                             docs/emoji.png
#
# Figures are means of three seeds, measured with the very weights that are written. Copy them to the model
# card; tests/shipped_test.py compares.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=${1:?"give the run: bash launch/ship.sh runs/showcase"}
name=$(basename "$run")
to=monoformer_jax/shipped/$name
new=$(mktemp -d)
mkdir "$new/figures"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python -m monoformer_jax.convert --from="$run" --to="$new/$name" --format=safetensors --dtype=bf16 --weights=ema --check
cd "$new" # the record of where the figures come from then has no path of this machine
python -m monoformer_jax.evaluate --workdir="$name" --seeds=3 --out=figures --json="$name/scores.json"
cd - >/dev/null
mkdir -p "$to"
cp "$new/$name/config.json" "$new/$name/model.safetensors" "$new/$name/scores.json" "$to/"
cp "$new/figures/emoji.png" docs/emoji.png
echo "$to: $(du -ch "$to"/* | tail -1 | cut -f1)"
