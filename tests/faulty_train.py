"""The train command with a fault in it, for tests: FAULT=KIND:STEP in the environment.

KIND is a signal that the process sends itself when it has read the batch of STEP, or `sleep`: that
batch never comes. After a signal that it outlives, its steps take long enough for all to hear of it.
"""

import os
import signal
import time

from monoformer_jax.cli import run_command
from monoformer_jax.data.pipeline import RowIterator
from monoformer_jax.train import __doc__ as doc
from monoformer_jax.train import add_arguments, main


def with_fault(kind, at):
    whole = RowIterator.__next__
    read = 0

    def faulty(self):
        nonlocal read
        read += 1  # the first batch is read twice, by the check before the run
        if read <= at:
            return whole(self)
        if kind == "sleep":
            time.sleep(3600)
        if read == at + 1:
            os.kill(os.getpid(), signal.Signals[kind])
        time.sleep(0.1)
        return whole(self)

    RowIterator.__next__ = faulty


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        kind, _, step = os.environ["FAULT"].partition(":")
        with_fault(kind, int(step))
    run_command("train", doc, add_arguments, main)
