"""A fake of Google Cloud (tests/fake_gcloud) in a folder, to run launch/tpu.sh without a network."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

from conftest import ROOT

LAUNCH = ROOT / "launch"
FAKE = ROOT / "tests" / "fake_gcloud"
# The programs that the launchers need besides gcloud; their PATH has nothing else.
TOOLS = (
    "awk bash cat cp cut date dirname env git grep gzip head ln mkdir mktemp mv nohup paste rm "
    "sed setsid sleep tail tar timeout touch"
)
SLICE = ("--name=probe", "--type=v5litepod-16", "--zone=us-central1-a")
RUN = (*SLICE, "--config=configs/digits.py", "--workdir=gs://bucket/run")
WHERE = "--project=my-project --zone=us-central1-a"
NODE_STATE = f"compute tpus tpu-vm describe probe {WHERE} --format=value(state)"
DESCRIBE = (
    f"compute tpus queued-resources describe probe {WHERE} --format=csv[no-heading](state.state,"
    "tpu.nodeSpec[0].node.labels.owner,tpu.nodeSpec[0].node.acceleratorType,"
    "tpu.nodeSpec[0].multisliceParams.nodeCount)"
)
DELETE = f"compute tpus queued-resources delete probe --force {WHERE} --quiet"


def make_checkout(tmp_path_factory):
    """A small git checkout with launch/ and a config, committed."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("pictures"))
    (folder / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "digits.py", folder / "configs")
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    return folder


class Cloud:
    """A fake cloud in a folder; runs launch/tpu.sh against it."""

    def __init__(self, folder: Path, checkout: Path, gcloud: bool = True):
        self.folder, self.checkout = folder, checkout
        for name in ("bin", "vmbin", "faults", "qr", "vm", "gs/bucket"):
            (folder / name).mkdir(parents=True)
        for name in TOOLS.split():
            (folder / "bin" / name).symlink_to(shutil.which(name))
        if gcloud:
            (folder / "bin" / "gcloud").symlink_to(FAKE)
        for name in ("gcloud", "python3", "sudo", "fuser"):
            (folder / "vmbin" / name).symlink_to(FAKE)
        (folder / "steps").write_text("5")
        self.env = {"PATH": str(folder / "bin"), "FAKE": str(folder), "HOME": str(folder)}

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.checkout / "launch" / "tpu.sh", *words],
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def tpu(self, *words: str) -> subprocess.CompletedProcess:
        process = self.start(*words)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def babysit(self, *words: str) -> subprocess.CompletedProcess:
        return self.tpu("babysit", "--poll-seconds=0", "--delete-when-done", *RUN, *words)

    def fault(self, name: str, text: str = "1"):
        (self.folder / "faults" / name).write_text(text + "\n")

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [re.sub(r"\d{8}T\d{6}Z-\w+|/\S+/monoformer.tar.gz", "…", line) for line in lines]

    def made(self) -> list[str]:
        return [call for call in self.calls if "queued-resources create" in call]

    def alive(self) -> list[str]:
        return [path.name for path in (self.folder / "qr").iterdir()]

    @property
    def trained(self) -> list[int]:
        """The steps in the order in which they were trained."""
        file = self.folder / "gs" / "bucket" / "run" / "trained"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def close(self):
        """Ends the trainers of slices that a test left alive."""
        for pid in self.folder.glob("vm/*/*/monoformer/run/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has already exited


def open_cloud(tmp_path, checkout):
    """A cloud for one test, whose processes are ended afterwards."""
    made = Cloud(tmp_path / "cloud", checkout)
    yield made
    made.close()


def program(folder: Path, name: str, text: str):
    file = folder / name
    file.unlink(missing_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(0o755)
