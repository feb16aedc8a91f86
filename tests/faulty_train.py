"""The train command with fault injection, for tests: FAULT=SIGNAL:BATCH in the environment.

The process sends itself this signal when it reads this batch after its start, counted from 1. If it
survives, later steps are slowed down so that the signal reaches all processes in time.
"""

import os
import signal
import time

from monoformer_jax.cli import run_command
from monoformer_jax.data.pipeline import RowIterator
from monoformer_jax.train import __doc__ as doc
from monoformer_jax.train import add_arguments, main


def with_fault(name, at):
    whole = RowIterator.__next__
    read = 0

    def faulty(self):
        nonlocal read
        read += 1  # counts the batch that is checked before the run too
        if read <= at:
            return whole(self)
        if read == at + 1:
            os.kill(os.getpid(), signal.Signals[name])
        time.sleep(0.1)
        return whole(self)

    RowIterator.__next__ = faulty


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        name, _, batch = os.environ["FAULT"].partition(":")
        with_fault(name, int(batch))
    run_command("train", doc, add_arguments, main)
