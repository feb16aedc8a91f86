"""launch/: the TPU and GPU launchers against a fake cloud (tests/fake_gcloud), no network."""

import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

LAUNCH = ROOT / "launch"
FAKE = ROOT / "tests" / "fake_gcloud"
# What the launchers call besides gcloud; nothing else is on their PATH here.
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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A small committed checkout that holds launch/ and a config."""
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
    """The fake cloud in a folder, and a user of it."""

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
                continue  # it has ended by itself


@pytest.fixture
def cloud(tmp_path, checkout):
    made = Cloud(tmp_path / "cloud", checkout)
    yield made
    made.close()


# --- the TPU launcher: what it calls ----------------------------------------------------------------


def test_babysit_calls_exactly_this(cloud):
    """A run without trouble on a slice of four machines: every call, and what it leaves."""
    done = cloud.babysit("--spot", "--", "--config.mesh.fsdp=16")
    assert done.returncode == 0, done.stderr
    worker = "monoformer/code/launch/tpu_worker.sh"
    ssh = "compute tpus tpu-vm ssh probe --worker=all --command="
    status = (
        f"{ssh}if [ -f {worker} ]; then bash {worker} status 0; else "
        f"echo worker 0:${{HOSTNAME##*-w-}} new; fi {WHERE} --quiet"
    )
    looks = [call for call in cloud.calls if call in (DESCRIBE, NODE_STATE, status)]
    rest = [call for call in cloud.calls if call not in looks]
    assert rest == [
        "config list --format=csv[no-heading](core.account,core.project)",
        "storage ls gs://bucket/run/done.json",
        "compute tpus queued-resources create probe --node-id=probe "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot "
        f"--labels=owner=me-example-org {WHERE} --quiet",
        f"compute tpus tpu-vm scp … probe:monoformer.tar.gz --worker=all {WHERE} --quiet",
        f"{ssh}rm -rf monoformer/code && mkdir -p monoformer/code && tar -xzf monoformer.tar.gz "
        f"-C monoformer/code && bash {worker} setup {WHERE} --quiet",
        f"{ssh}bash {worker} start 0 gs://bucket/run … --config=configs/digits.py "
        f"--config.mesh.fsdp=16 {WHERE} --quiet",
        "storage ls gs://bucket/run/done.json",
        DELETE,
    ]
    # Absent; then in the queue, provisioned, ready (its node too); nothing runs yet; then the watch.
    first = [DESCRIBE] * 4 + [NODE_STATE, status] + [DESCRIBE, NODE_STATE, status]
    assert looks[: len(first)] == first
    assert cloud.trained == [1, 2, 3, 4, 5]
    assert cloud.alive() == []
    logs = sorted((cloud.folder / "gs" / "bucket" / "run" / "logs").iterdir())
    assert [path.name[-7:] for path in logs] == ["0-0.log", "0-1.log", "0-2.log", "0-3.log"]
    assert "--workdir=gs://bucket/run --config=configs/digits.py --config.mesh.fsdp=16" in (
        logs[0].read_text()
    )


@pytest.mark.slow
def test_run_goes_on_with_a_ready_slice(cloud):
    """run, status, logs, stop and run again: one slice, every worker with the lock's packages."""
    (cloud.folder / "steps").write_text("100000")
    assert cloud.tpu("create", "--poll-seconds=0", *SLICE).returncode == 0
    started = cloud.tpu(*RUN, "run")
    assert started.returncode == 0, started.stderr
    assert "may cost money until: launch/tpu.sh delete --name=probe" in started.stderr
    for worker in range(4):
        lock = cloud.folder / "vm" / "probe" / str(worker) / "installed"
        assert lock.read_text() == (LAUNCH / "requirements-tpu.lock").read_text()
    twice = cloud.tpu("run", *RUN)
    assert twice.returncode == 2 and "already training" in twice.stderr
    short = ("--name", "probe", "--zone", "us-central1-a")
    status = cloud.tpu("status", *short, "--price-per-chip-hour=1.5")
    assert status.stdout.split("\n")[:4] == [f"worker 0:{i} running" for i in range(4)]
    assert "1 x v5litepod-16 (16 chips)" in status.stderr
    assert "2.00 h x 16 chips x 1.5 = 48.00" in status.stderr
    assert "training with --workdir=" in cloud.tpu("logs", "--worker=3", *short).stdout
    assert cloud.tpu("stop", *short).returncode == 0
    assert "worker 0:3 stopped" in cloud.tpu("status", *short).stdout
    before = len(cloud.trained)
    assert cloud.tpu("run", *RUN).returncode == 0
    time.sleep(0.05)
    assert cloud.tpu("delete", *short).returncode == 0 and cloud.alive() == []
    assert cloud.trained == list(range(1, len(cloud.trained) + 1)) and len(cloud.trained) > before
    assert len(cloud.made()) == 1
    assert "nothing to delete" in cloud.tpu("delete", *short).stderr


@pytest.mark.slow
def test_slices_are_set_up_together(cloud):
    done = cloud.babysit("--type=v4-16", "--zone=us-central2-b", "--slices=2", "--reservation")
    assert done.returncode == 0, done.stderr
    assert (
        "create probe --node-count=2 --node-prefix=probe --accelerator-type=v4-16 "
        "--runtime-version=tpu-ubuntu2204-base --reserved" in cloud.made()[0]
    )
    for node in ("probe-0", "probe-1"):
        assert sum(f"scp … {node}:" in call for call in cloud.calls) == 1
        assert any(
            f"ssh {node} " in call and f"start {node[-1]} gs:" in call for call in cloud.calls
        )
    assert cloud.trained == [1, 2, 3, 4, 5] and cloud.alive() == []


# --- the TPU launcher: what goes wrong --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_preempted_runs_finish_with_each_step_trained_once(tmp_path, checkout, seed):
    """Fifty runs, each preempted once to three times at random calls, shown in three ways."""
    for run in range(10):
        cloud = Cloud(tmp_path / str(run), checkout)
        rng = random.Random(10 * seed + run)
        calls = sorted(rng.sample(range(3, 60), rng.randint(1, 3)))
        hows = [rng.choice(["SUSPENDED", "PREEMPTED", "NOTICE"]) for _ in calls]
        cloud.fault("preempt", "\n".join(f"{c} {how}" for c, how in zip(calls, hows)))
        done = cloud.babysit("--type=v5litepod-8")
        said = f"seed {seed}, run {run}: {calls} {hows}\n{done.stderr}"
        cloud.close()
        assert done.returncode == 0, said
        assert cloud.trained == [1, 2, 3, 4, 5], said
        assert cloud.alive() == [], said


def test_a_bug_ends_the_run_and_shows_the_log(cloud):
    """One worker of four fails; the others would wait for ever."""
    (cloud.folder / "steps").write_text("100000")
    cloud.fault("exit", "2 4")
    done = cloud.babysit()
    assert done.returncode == 4
    assert "worker 0:2 of probe ended with code 4 (it crashes again and again)" in done.stderr
    assert "Traceback: a bug" in done.stderr
    assert cloud.alive() == [] and len(cloud.made()) == 1


TROUBLE = [
    # what goes wrong, exit code, slices requested, what is said
    pytest.param(
        {"scp": "2", "ssh": "2"}, 0, 1, "trying again (2)", id="scp and ssh fail at first"
    ),
    pytest.param({"unavailable": "3", "delete": "2"}, 0, 4, "", id="busy at first"),
    pytest.param({"away": "6"}, 0, 1, "", id="the network is away at first"),
    pytest.param({"away": "99"}, 1, 0, "failed 10 times: ERROR", id="the network is away"),
    pytest.param({"fails": "2"}, 0, 3, "probe failed: out of capacity", id="no capacity twice"),
    pytest.param({"fails": "9"}, 1, 5, "FAILED five times in a row", id="no capacity ever"),
    pytest.param({"quota": "1"}, 2, 1, "nothing was created: ERROR: (gcloud", id="quota"),
    pytest.param({"scp": "99"}, 1, 1, "could not be set up", id="scp fails for ever"),
    pytest.param({"deaf": "99"}, 1, 1, "could not be set up", id="a worker never answers"),
]


@pytest.mark.slow
@pytest.mark.parametrize("faults,code,requests,said", TROUBLE)
def test_trouble_with_the_cloud(cloud, faults, code, requests, said):
    for name, text in faults.items():
        cloud.fault(name, text)
    done = cloud.babysit()
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert cloud.alive() == [] and len(cloud.made()) == requests
    assert cloud.trained == ([1, 2, 3, 4, 5] if code == 0 else [])


@pytest.mark.slow
def test_a_worker_that_falls_silent_is_replaced(cloud):
    (cloud.folder / "steps").write_text("200")
    process = cloud.start("babysit", "--poll-seconds=0", "--delete-when-done", *RUN)
    while not cloud.trained or "status 0" not in cloud.calls[-1]:
        time.sleep(0.02)
    cloud.fault("deaf", "7")  # the last one or two hit the new slice: tried again
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "5 times not every worker answered" in err
    assert cloud.trained == list(range(1, 201)) and len(cloud.made()) == 2


@pytest.mark.slow
def test_a_trainer_that_ends_without_being_done(cloud):
    (cloud.folder / "steps").write_text("0")
    done = cloud.babysit()
    assert done.returncode == 1 and "there is no gs://bucket/run/done.json" in done.stderr
    assert cloud.alive() == []


@pytest.mark.slow
def test_time_is_up(cloud):
    (cloud.folder / "steps").write_text("100000")
    done = cloud.babysit("--max-hours=0.0003", "--price-per-chip-hour=2")
    assert done.returncode == 1 and "--max-hours=0.0003 are over" in done.stderr
    assert "stopped after 0.00 h x 16 chips x 2 = 0.0" in done.stderr
    assert cloud.alive() == []
    log = next((cloud.folder / "gs" / "bucket" / "run" / "logs").glob("*-0-0.log"))
    assert "saved at step" in log.read_text()


@pytest.mark.slow
def test_restarts_are_capped(cloud):
    cloud.fault("exit", "0 75")  # every time
    done = cloud.babysit("--max-restarts=2")
    assert done.returncode == 1 and "gave up after 2 restarts" in done.stderr
    assert cloud.alive() == []


@pytest.mark.slow
@pytest.mark.parametrize("delete", [True, False])
def test_an_interrupted_babysit_deletes_or_says_how_and_can_go_on(cloud, delete):
    (cloud.folder / "steps").write_text("100")
    options = ["--delete-when-done"] if delete else []
    assert cloud.tpu("create", "--poll-seconds=0", *SLICE).returncode == 0
    process = cloud.start("babysit", "--poll-seconds=30", *options, *RUN)
    while not cloud.trained:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 143
    assert cloud.alive() == ([] if delete else ["probe"])
    assert ("probe: deleted" if delete else "delete --name=probe --zone=us-central1-a") in err
    done = cloud.babysit()
    assert done.returncode == 0, done.stderr
    assert ("watching" in done.stderr) is not delete  # what is training is left alone
    assert cloud.trained == list(range(1, 101)) and cloud.alive() == []


BAD_INPUT = [
    (["fly", *RUN], "there is no verb 'fly'"),
    ([*SLICE], "which of: babysit run"),
    (["run", "create", *RUN], "one verb at a time"),
    (["run", *RUN, "--workdirr=x"], "no option --workdirr"),
    (["run", *RUN, "--slices"], "--slices needs a value"),
    (["run", *SLICE], "run needs --config="),
    (["run", *RUN, "--name=Probe"], "--name=Probe: at most 40 lower-case"),
    (["run", *RUN, "--workdir=runs/a"], "must be gs://BUCKET/FOLDER"),
    (["run", *RUN, "--workdir=gs://other/run"], "gs://other not found"),
    (["run", *RUN, "--type=v5e-16"], "Google names it v5litepod-16"),
    (["run", *RUN, "--type=v5litepod-20"], "nearest: v5litepod-16"),
    (["run", *RUN, "--type=v5p-200", "--zone=us-east5-a"], "nearest: v5p-128"),
    (["run", *RUN, "--type=v7-8"], "no such TPU; nearest: v4-8"),
    (["run", *RUN, "--zone=us-centrall-a"], "has no listed v5litepod; nearest: us-central1-a"),
    (["run", *RUN, "--spot", "--reservation"], "exclude each other"),
    (["run", *RUN, "--max-hours=2"], "use babysit"),
    (["run", *RUN, "--config=configs/no.py"], "--config=configs/no.py is not in commit"),
    (["run", *RUN, "--price-per-chip-hour=cheap"], "PRICE=cheap: a number"),
    (["setup", *SLICE], "is ABSENT; make it with: launch/tpu.sh create"),
]  # fmt: skip


@pytest.mark.parametrize("words,said", BAD_INPUT)
def test_bad_input_is_one_sentence_before_anything_is_made(cloud, words, said):
    done = cloud.tpu(*words)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert cloud.made() == []


@pytest.mark.parametrize(
    "fault,said",
    [
        ("logged_out", "gcloud auth login"),
        ("expired", "Reauthentication failed"),
        ("no_project", "gcloud config set project"),
    ],
)
def test_an_account_and_a_project_are_needed(cloud, fault, said):
    cloud.fault(fault)
    done = cloud.tpu("run", *RUN)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert cloud.made() == []


def test_gcloud_is_needed(tmp_path, checkout):
    done = Cloud(tmp_path / "cloud", checkout, gcloud=False).tpu("run", *RUN)
    assert done.returncode == 2 and "gcloud is not installed" in done.stderr


def test_uncommitted_changes_are_not_shipped_silently(cloud, checkout):
    file = checkout / "configs" / "mine.py"
    file.write_text("# not committed\n")
    try:
        done = cloud.tpu("run", *RUN)
        assert done.returncode == 2 and "not shipped: configs/mine.py" in done.stderr
        assert cloud.made() == []
        assert cloud.tpu("run", "--poll-seconds=0", "--allow-dirty", *RUN).returncode == 0
        assert not list(cloud.folder.glob("vm/probe/*/monoformer/code/configs/mine.py"))
    finally:
        file.unlink()


def test_a_slice_of_somebody_else_is_left_alone(cloud):
    assert cloud.tpu("create", "--poll-seconds=0", *SLICE).returncode == 0
    other = cloud.tpu("run", *RUN, "--type=v5litepod-4")
    assert other.returncode == 2 and "'probe' is 1 x v5litepod-16, not" in other.stderr
    (cloud.folder / "qr" / "probe" / "owner").write_text("you")
    for verb in ("run", "delete"):
        done = cloud.tpu(verb, *RUN)
        assert done.returncode == 2 and "belongs to 'you', not to 'me-example-org'" in done.stderr
    assert cloud.alive() == ["probe"] and DELETE not in cloud.calls


# --- dry runs, and the files themselves -------------------------------------------------------------


def test_a_dry_run_calls_nothing_and_can_be_pasted(tmp_path, checkout):
    """Its lines, run by a shell, are the calls of the real thing on a new slice."""
    cloud = Cloud(tmp_path / "cloud", checkout)
    (cloud.folder / "bin" / "git").unlink()  # not even git
    for verb in ("babysit", "create", "setup", "status", "logs", "stop", "delete"):
        assert cloud.tpu("--dry-run", verb, *RUN).returncode == 0
    dry = cloud.tpu("--dry-run", "run", *RUN, "--", "--config.name='a b'")
    assert dry.returncode == 0 and cloud.calls == []
    assert all(line.startswith("# ") for line in dry.stderr.splitlines())
    for line in dry.stdout.splitlines():
        if line.startswith("gcloud"):
            subprocess.run(["bash", "-c", line], env=cloud.env, capture_output=True)
    assert "--accelerator-type=v5litepod-16" in cloud.made()[0]
    assert cloud.calls[-1].endswith(
        "start 0 gs://bucket/run … --config=configs/digits.py '--config.name='\\''a b'\\''' "
        "--project=your-project --zone=us-central1-a --quiet"
    )


def readme_commands(program: str) -> list[str]:
    """The commands of README's code blocks that call this program, each as one line."""
    blocks = re.findall(
        r"^```(?:bash|sh)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(program)]


@pytest.mark.parametrize("program", ["launch/tpu.sh", "launch/gpu.sh"])
def test_the_commands_in_readme(tmp_path, checkout, program):
    cloud = Cloud(tmp_path / "cloud", checkout)
    commands = readme_commands(program)
    assert commands
    for command in commands:
        config = re.search(r"--config=([\w/.]+)", command)
        assert config is None or (ROOT / config[1]).is_file(), command
        shutil.copytree(ROOT / "configs", checkout / "configs", dirs_exist_ok=True)
        dry = command.replace(program, f"{program} --dry-run", 1)
        done = subprocess.run(
            ["bash", "-c", dry], cwd=checkout, env=cloud.env, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout, f"{dry}\n{done.stderr}"
    assert cloud.calls == []


@pytest.mark.slow
def test_shellcheck_finds_nothing():
    files = [LAUNCH / f"{name}.sh" for name in ("tpu", "tpu_worker", "gpu", "demo", "test")]
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "-x", "--check-sourced", *files, FAKE],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_lock_satisfies_setup(monkeypatch):
    """Every requirement of setup.py and its extras tpu and demo has one version, in its range."""
    asked = {}
    setuptools = SimpleNamespace(setup=asked.update, find_packages=lambda include: [])
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    runpy.run_path(str(ROOT / "setup.py"))
    lines = (LAUNCH / "requirements-tpu.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    on_a_worker = {"python_version": "3.11", "sys_platform": "linux", "platform_machine": "x86_64"}
    extras = asked["extras_require"]
    for text in [*asked["install_requires"], *extras["tpu"], *extras["demo"], "jaxlib", "libtpu"]:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate(on_a_worker):
            assert locked[need.name] in need.specifier, f"{text}: locked is {locked[need.name]}"


def test_the_skypilot_task(tmp_path):
    """Its two scripts, run on a machine of the fake cloud: the same set-up and command as tpu.sh's."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    home = tmp_path / "home"
    shutil.copytree(LAUNCH, home / "launch", ignore=shutil.ignore_patterns("pictures"))
    for name in ("python3", "sudo", "rm"):
        program(home, name, f'echo "${{0##*/}} $*" >>{tmp_path}/calls')
    for name in (".local/bin/uv", ".venv/bin/python"):
        (home / name).parent.mkdir(parents=True)
        program(home, name, f'echo "${{0##*/}} $*" >>{tmp_path}/calls')
    env = {"HOME": str(home), "PATH": f"{home}:/usr/bin:/bin", **task["envs"]}
    env |= {"WORKDIR": "gs://bucket/run", "FLAGS": "--config.steps=3 --config.seed=1"}
    for script in ("setup", "run"):
        subprocess.run(["bash", "-c", task[script]], cwd=home, env=env, check=True)
    worker = (LAUNCH / "tpu_worker.sh").read_text()
    uv = re.search(r"^UV=(\S+)", worker, re.M)[1]
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"python3 -m pip install --user --quiet uv=={uv}",
        "uv pip sync --quiet --python .venv/bin/python launch/requirements-tpu.lock",
        "sudo rm -f /tmp/libtpu_lockfile",
        "python -m monoformer_jax.train --config=configs/digits.py --workdir=gs://bucket/run "
        "--config.steps=3 --config.seed=1",
    ]
    assert f"uv=={uv} " in (ROOT / "README.md").read_text()
    assert task["resources"]["accelerator_args"]["runtime_version"] in (
        (LAUNCH / "tpu_checks.sh").read_text()
    )


# --- the GPU launcher -------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str):
    file = folder / name
    file.unlink(missing_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def gpu(tmp_path, checkout):
    """Runs gpu.sh where nvidia-smi, srun and scontrol are fakes that note how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS.split():
        (folder / name).symlink_to(shutil.which(name))
    note = f'echo "${{0##*/}} $*" >>{tmp_path}/calls; '
    program(folder, "python", note + "exit ${CODE:-0}")
    program(folder, "srun", note + "exit ${CODE:-0}")
    program(folder, "scontrol", note)
    program(folder, "nvidia-smi", "echo GPU 0")

    def run(*words, **env):
        base = {"PATH": str(folder), "PYTHON": "python"}
        done = subprocess.run(
            [checkout / "launch" / "gpu.sh", *words],
            env=base | env, cwd=checkout, capture_output=True, text=True,
        )  # fmt: skip
        calls = tmp_path / "calls"
        done.calls = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return done

    run.folder = folder
    return run


GPU_RUN = ("--config=configs/digits.py", "--workdir=runs/a")
TRAIN = "-m monoformer_jax.train --config=configs/digits.py --workdir=runs/a"


def test_gpu_on_this_host(gpu):
    assert gpu(*GPU_RUN, "--", "--config.mesh.fsdp=8").calls == [
        f"python {TRAIN} --config.mesh.fsdp=8"
    ]
    assert gpu(*GPU_RUN, CODE="3").returncode == 3  # the trainer's own
    dry = gpu("--dry-run", *GPU_RUN)
    assert dry.calls == [] and dry.stdout.strip() == f"python {TRAIN}"
    program(gpu.folder, "nvidia-smi", "exit 9")
    blind = gpu(*GPU_RUN)
    assert blind.returncode == 2 and blind.stderr == "error: nvidia-smi finds no GPU here\n"
    for words, said in [
        (
            ["--config=configs/no.py", "--workdir=a"],
            "--config=configs/no.py: there is no such file",
        ),
        ([*GPU_RUN, "--gpus=2"], "belong to --nodes=N"),
        ([*GPU_RUN, "--nodes=2"], "how many GPUs on each?"),
        ([*GPU_RUN, "--node=2"], "there is no option --node"),
        (["--config=configs/digits.py"], "--workdir=DIR are needed"),
    ]:
        done = gpu(*words)
        assert done.returncode == 2 and said in done.stderr and not done.calls


def test_gpu_under_slurm(gpu):
    """One process a GPU, which is what jax.distributed makes of Slurm's variables."""
    srun = "srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --kill-on-bad-exit=1"
    by_hand = gpu(*GPU_RUN, "--nodes", "2", "--gpus=8", "--partition=p", "--time=60")
    assert by_hand.calls == [f"{srun} --partition=p --time=60 python {TRAIN}"]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    assert gpu(*GPU_RUN, **job).calls == [f"{srun} python {TRAIN}"]
    saved = gpu(*GPU_RUN, **job, CODE="75")  # the job's time was up
    assert saved.calls == [f"{srun} python {TRAIN}", "scontrol requeue 7"]
    assert gpu(*GPU_RUN, **job, CODE="3").calls == [f"{srun} python {TRAIN}"]
    (gpu.folder / "srun").unlink()
    assert "there is no srun here" in gpu(*GPU_RUN, **job).stderr


def test_jax_reads_slurm_as_the_launcher_means_it(monkeypatch):
    """Second node, fourth GPU of 2 x 8: process 11 of 16, seeing GPU 3 alone."""
    from jax._src.clusters.slurm_cluster import SlurmCluster

    variables = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "16",
        "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_NODES": "2",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present()
    assert SlurmCluster.get_process_count() == 16 and SlurmCluster.get_process_id() == 11
    assert SlurmCluster.get_local_process_id() == 3
