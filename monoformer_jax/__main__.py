"""`python -m monoformer_jax COMMAND …`, also installed as `monoformer COMMAND …`."""

import importlib
import sys

from monoformer_jax.cli import run_command

COMMANDS = {
    "train": "train a model, or go on with one",
    "sample": "continue prompts with text or pictures",
    "demo": "a page to talk with a model, in texts and pictures",
    "evaluate": "measure a trained model",
    "encode_latents": "a dataset as records that training reads",
    "plan": "does a run fit a TPU slice, and how fast can it be",
    "convert": "weights of the original to a workdir of ours, and back",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        command = importlib.import_module(f"monoformer_jax.{name}")
        del sys.argv[1]
        run_command(name, command.__doc__, command.add_arguments, command.main)
    lines = [f"  {command:<15} {what}" for command, what in COMMANDS.items()]
    asked = name in ("-h", "--help")
    print("usage: monoformer COMMAND …; COMMAND --help tells more\n", *lines, sep="\n",
          file=sys.stdout if asked else sys.stderr)  # fmt: skip
    sys.exit(0 if asked else 2)


if __name__ == "__main__":
    main()
