#!/usr/bin/env bash
# Trains a model on this machine and samples from it. Needs only python3 >= 3.11 with pip.
#
#   bash launch/demo.sh                                      digits: train, sample, evaluate
#   bash launch/demo.sh --config=configs/digits_diffussm.py  digits that are only drawn: the same
#   bash launch/demo.sh --config=configs/emoji.py            emoji: the same
#   bash launch/demo.sh --config=configs/showcase.py         digits and emoji in one model: the same
#   bash launch/demo.sh --config=configs/NAME.py[:ARG]       another config: train, sample
#
# Safe to run again: it resumes an interrupted training and skips a completed one.
# PYTHON is the interpreter for a new .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' launch/demo.sh; }

config=configs/digits.py
for word; do
  case $word in
    --config=?*) config=${word#*=} ;;
    -h | --help) usage && exit 0 ;;
    *) printf "error: unknown argument '%s'\n\n%s\n" "$word" "$(usage)" >&2 && exit 2 ;;
  esac
done
file=${config%%:*}
[[ -f $file ]] || { echo "error: --config=$file: no such file in $PWD" >&2 && exit 2; }

# configs/digits.py -> runs/digits, configs/digits.py:tiny -> runs/digits-tiny
workdir=runs/$(basename "$file" .py)
if [[ $config == *:* ]]; then
  argument=${config#*:}
  workdir+=-${argument//\//-}
fi
extra=digits prompt=a scored=no
case $file in
  configs/digits*) prompt="draw a seven" scored=yes ;;
  configs/emoji.py) extra=emoji prompt="draw thumbs up, dark skin tone" scored=yes ;;
  configs/showcase.py) extra=digits,emoji prompt="draw thumbs up, dark skin tone" scored=yes ;;
esac
if [[ $config == configs/digits.py ]]; then
  what="train $config, sample, evaluate; 5 to 15 minutes on 2 CPU cores, installation included"
else
  what="train $config, sample one prompt; for time and data, see the first lines of that file"
fi
echo "What:    $what
Disk:    about 1 GB in .venv on Linux, and the checkpoints
Results: $PWD/$workdir"

# shellcheck source-path=SCRIPTDIR source=venv.sh
source launch/venv.sh "$extra"

python -m monoformer_jax.train --config="$config" --workdir="$workdir"
if [[ $config != configs/digits.py ]]; then
  python -m monoformer_jax.sample --workdir="$workdir" --prompt="$prompt" --paint \
    --out="$workdir/sample.png" ||
    echo "No sample (a model of latents needs --vae=DIR): python -m monoformer_jax.sample --help"
  [[ $scored == yes ]] &&
    python -m monoformer_jax.evaluate --workdir="$workdir" --json="$workdir/scores.json"
  exit 0
fi
python -m monoformer_jax.sample --workdir="$workdir" --out="$workdir/seven.png" \
  --prompt="draw a seven" --prompt="two plus three is" --prompt="count from nine to four:"
python -m monoformer_jax.sample --workdir="$workdir" --prompt="read this: " --image="$workdir/seven.png"
python -m monoformer_jax.evaluate --workdir="$workdir" --json="$workdir/scores.json"
