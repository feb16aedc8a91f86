#!/usr/bin/env bash
# Trains the digits model and shows what it can do. Needs python3 >= 3.11 with pip, nothing else.
#
#   bash launch/demo.sh
#
# Safe to run again: it continues an interrupted training and skips a finished one.
# PYTHON chooses the interpreter for a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh digits

workdir=runs/digits
python -m monoformer_jax.train --config=configs/digits.py --workdir="$workdir"
python -m monoformer_jax.sample --workdir="$workdir" --out="$workdir/seven.png" \
  --prompt="draw a seven" --prompt="two plus three is" --prompt="count from nine to four:"
python -m monoformer_jax.sample --workdir="$workdir" --prompt="read this: " --image="$workdir/seven.png"
python -m monoformer_jax.evaluate --workdir="$workdir" --json="$workdir/scores.json"
