"""`python -m monoformer_jax COMMAND …`, also installed as `monoformer COMMAND …`."""

import importlib
import sys

from monoformer_jax.cli import run_command

COMMANDS = {
    "train": "train a model, or resume a run",
    "sample": "generate text or images from prompts",
    "demo": "serve a web page to chat with a model in text and images",
    "check": "verify the checkpoints and files of a run",
    "evaluate": "compute the metrics of a trained model",
    "encode_latents": "precompute a dataset as latents in records for training",
    "plan": "estimate whether a run fits a TPU slice, and its speed",
    "convert": "convert weights between Hugging Face folders and workdirs",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        command = importlib.import_module(f"monoformer_jax.{name}")
        del sys.argv[1]
        run_command(name, command.__doc__, command.add_arguments, command.main)
    lines = [f"  {command:<15} {what}" for command, what in COMMANDS.items()]
    asked = name in ("-h", "--help")
    print("usage: monoformer COMMAND …; COMMAND --help lists its options\n", *lines, sep="\n",
          file=sys.stdout if asked else sys.stderr)  # fmt: skip
    sys.exit(0 if asked else 2)


if __name__ == "__main__":
    main()
