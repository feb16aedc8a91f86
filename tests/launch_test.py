"""launch/tpu.sh against a fake cloud: its gcloud calls, bad input, and the files of launch/."""

import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from fake_cloud import (
    DELETE,
    DESCRIBE,
    FAKE,
    LAUNCH,
    NODE_STATE,
    RUN,
    SLICE,
    WHERE,
    Cloud,
    make_checkout,
    open_cloud,
    program,
)
from packaging.requirements import Requirement

checkout = pytest.fixture(scope="module")(make_checkout)
cloud = pytest.fixture(open_cloud)


def test_babysit_makes_exactly_these_calls(cloud):
    """An undisturbed run on a slice of four machines: every call, and the files it leaves."""
    done = cloud.babysit("--spot", "--", "--config.mesh.fsdp=16")
    assert done.returncode == 0, done.stderr
    worker = "monoformer/code/launch/tpu_worker.sh"
    ssh = "compute tpus tpu-vm ssh probe --worker=all --command="
    status = (
        f"{ssh}slice=0; if [ -f {worker} ]; then bash {worker} status $slice; else "
        f"echo worker $slice:${{HOSTNAME##*-w-}} new; fi {WHERE} --quiet"
    )
    polls = [call for call in cloud.calls if call in (DESCRIBE, NODE_STATE, status)]
    rest = [call for call in cloud.calls if call not in polls]
    assert rest == [
        "config list --format=csv[no-heading](core.account,core.project)",
        "storage ls gs://bucket/run/done.json",
        "compute tpus queued-resources create probe --node-id=probe "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot "
        f"--labels=owner=me-example-org {WHERE} --quiet",
        f"compute tpus tpu-vm scp … probe:monoformer.tar.gz --worker=all {WHERE} --quiet",
        f"{ssh}rm -rf monoformer/code && mkdir -p monoformer/code && tar -xzf monoformer.tar.gz "
        f"-C monoformer/code && bash {worker} setup {WHERE} --quiet",
        f"{ssh}bash {worker} start 0 gs://bucket/run … train --config=configs/digits.py "
        f"--config.mesh.fsdp=16 {WHERE} --quiet",
        "storage ls gs://bucket/run/done.json",
        DELETE,
    ]
    # Absent, in the queue, provisioned, ready (with its node); no trainer yet; then the first poll.
    first = [DESCRIBE] * 4 + [NODE_STATE, status] + [DESCRIBE, NODE_STATE, status]
    assert polls[: len(first)] == first
    assert cloud.trained == [1, 2, 3, 4, 5]
    assert cloud.alive() == []
    logs = sorted((cloud.folder / "gs" / "bucket" / "run" / "logs").iterdir())
    assert [path.name[-7:] for path in logs] == ["0-0.log", "0-1.log", "0-2.log", "0-3.log"]
    assert "--workdir=gs://bucket/run --config=configs/digits.py --config.mesh.fsdp=16" in (
        logs[0].read_text()
    )


@pytest.mark.slow
def test_run_reuses_a_ready_slice(cloud):
    """run, status, logs, stop and run again: one slice, and every worker installs the lock."""
    (cloud.folder / "steps").write_text("100000")
    assert cloud.tpu("create", "--poll-seconds=0", *SLICE).returncode == 0
    started = cloud.tpu(*RUN, "run")
    assert started.returncode == 0, started.stderr
    assert "may cost money; delete it with: launch/tpu.sh delete --name=probe" in started.stderr
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
    end = time.monotonic() + 30
    while len(cloud.trained) <= before and time.monotonic() < end:
        time.sleep(0.01)
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


ENCODE = (*SLICE, "--command=prepare_data", "--workdir=gs://bucket/records")


def test_a_slice_encodes_a_dataset(cloud):
    """The four workers get the flags, --to is the workdir, and info.json there ends the run. The first
    slice is preempted."""
    cloud.fault("preempt", "14 SUSPENDED")
    flags = ("--from=gs://bucket/train.jsonl", "--codec=sd_vae", "--vae=gs://bucket/vae")
    done = cloud.tpu("babysit", "--poll-seconds=0", "--delete-when-done", *ENCODE, "--", *flags)
    assert done.returncode == 0, done.stderr
    assert "gs://bucket/records/info.json exists: the run is complete" in done.stderr
    folder = cloud.folder / "gs" / "bucket" / "records"
    assert sorted((folder / "encoded").read_text().split()) == ["0", "1", "2", "3"]
    logs = list((folder / "logs").iterdir())
    said = f"prepare_data --to=gs://bucket/records {' '.join(flags)}"
    assert len(logs) == 4 and all(said in log.read_text() for log in logs)
    assert len(cloud.made()) == 2 and cloud.alive() == []
    assert "the run is complete" in cloud.tpu("run", *ENCODE, "--", *flags).stderr


BAD_INPUT = [
    (["run", *ENCODE, "--command=paint"], "--command=paint must be train or prepare_data"),
    (["run", *ENCODE, "--command=encode_latents"], "is now --command=prepare_data; latents need"),
    (["run", *ENCODE, "--config=configs/digits.py"], "is for training; the flags of prepare_data"),
    (["fly", *RUN], "unknown verb 'fly'"),
    ([*SLICE], "a verb is needed: babysit run"),
    (["run", "create", *RUN], "only one verb is allowed"),
    (["run", *RUN, "--workdirr=x"], "unknown option --workdirr"),
    (["run", *RUN, "--slices"], "--slices needs a value"),
    (["run", *RUN, "--slices=08"], "--slices=08 must be a number from 1 to 256"),
    (["run", *RUN, "--slices=99999999999999999999"], "must be a number from 1 to 256"),
    (["babysit", *RUN, "--poll-seconds=08"], "--poll-seconds=08 must be a number"),
    (["babysit", *RUN, "--max-restarts=007"], "--max-restarts=007 must be a number"),
    (["babysit", *RUN, "--max-hours=01"], "--max-hours=01 must be a number"),
    (["logs", *RUN, "--worker=0:09"], "--worker=0:09 must be a number, or SLICE:WORKER"),
    (["run", *RUN, "--type=v5p-99999999999999999999"], "a number must follow v5p-"),
    (["run", *SLICE], "run needs --config="),
    (["run", *RUN, "--name=Probe"], "--name=Probe must be at most 40 lower-case"),
    (["run", *RUN, "--workdir=runs/a"], "must be gs://BUCKET/FOLDER"),
    (["run", *RUN, "--workdir=gs://other/run"], "gs://other not found"),
    (["run", *RUN, "--type=v5e-16"], "Google names it v5litepod-16"),
    (["run", *RUN, "--type=v5litepod-20"], "nearest: v5litepod-16"),
    (["run", *RUN, "--type=v5p-200", "--zone=us-east5-a"], "nearest: v5p-128"),
    (["run", *RUN, "--type=v7-8"], "unknown TPU type; nearest: v4-8"),
    (["run", *RUN, "--zone=us-centrall-a"], "has no listed v5litepod; nearest: us-central1-a"),
    (["run", *RUN, "--spot", "--reservation"], "exclude each other"),
    (["run", *RUN, "--max-hours=2"], "only supported by babysit"),
    (["run", *RUN, "--config=configs/no.py"], "--config=configs/no.py is not in commit"),
    (["run", *RUN, "--price-per-chip-hour=cheap"], "--price-per-chip-hour=cheap must be a number"),
    (["setup", *SLICE], "is ABSENT; create it with: launch/tpu.sh create"),
]  # fmt: skip


@pytest.mark.parametrize("words,said", BAD_INPUT)
def test_bad_input_is_one_sentence_before_anything_is_created(cloud, words, said):
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
        assert done.returncode == 2 and "not be shipped: configs/mine.py" in done.stderr
        assert cloud.made() == []
        assert cloud.tpu("run", "--poll-seconds=0", "--allow-dirty", *RUN).returncode == 0
        assert not list(cloud.folder.glob("vm/probe/*/monoformer/code/configs/mine.py"))
    finally:
        file.unlink()


def test_a_slice_of_another_user_is_not_touched(cloud):
    assert cloud.tpu("create", "--poll-seconds=0", *SLICE).returncode == 0
    other = cloud.tpu("run", *RUN, "--type=v5litepod-4")
    assert other.returncode == 2 and "'probe' is 1 x v5litepod-16, not" in other.stderr
    (cloud.folder / "qr" / "probe" / "owner").write_text("you")
    for verb in ("run", "delete"):
        done = cloud.tpu(verb, *RUN)
        assert done.returncode == 2 and "belongs to 'you', not to 'me-example-org'" in done.stderr
    assert cloud.alive() == ["probe"] and DELETE not in cloud.calls


def test_a_dry_run_calls_nothing_and_can_be_pasted(tmp_path, checkout):
    """Its lines, run by a shell, are the calls of a real run on a new slice."""
    cloud = Cloud(tmp_path / "cloud", checkout)
    (cloud.folder / "bin" / "git").unlink()  # not even git
    for verb in ("babysit", "create", "setup", "status", "logs", "stop", "delete"):
        assert cloud.tpu("--dry-run", verb, *RUN).returncode == 0
    name = "'a @SLICE@ b'"  # tpu.sh replaces that word, but not in a value of the user
    dry = cloud.tpu("--dry-run", "run", *RUN, "--", f"--config.name={name}")
    assert dry.returncode == 0 and cloud.calls == []
    assert all(line.startswith("# ") for line in dry.stderr.splitlines())
    for line in dry.stdout.splitlines():
        if line.startswith("gcloud"):
            subprocess.run(["bash", "-c", line], env=cloud.env, capture_output=True)
    assert "--accelerator-type=v5litepod-16" in cloud.made()[0]
    assert cloud.calls[-1].endswith(
        "start 0 gs://bucket/run … train --config=configs/digits.py "
        "'--config.name='\\''a @SLICE@ b'\\''' "
        "--project=your-project --zone=us-central1-a --quiet"
    )


def documented_commands(program: str) -> list[str]:
    """The commands in code blocks of README and docs/ that call this program, each on one line."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(program)]


@pytest.mark.parametrize("program, page", [("launch/tpu.sh", "tpu"), ("launch/gpu.sh", "gpu")])
def test_the_commands_of_the_pages(tmp_path, checkout, program, page):
    cloud = Cloud(tmp_path / "cloud", checkout)
    commands = documented_commands(program)
    assert program in (ROOT / "docs" / f"{page}.md").read_text() and commands
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


def test_the_lock_satisfies_setup_py(monkeypatch):
    """For every requirement of setup.py and its extras tpu, gcs and digits."""
    asked = {}
    setuptools = SimpleNamespace(setup=asked.update, find_packages=lambda include: [])
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    runpy.run_path(str(ROOT / "setup.py"))
    lines = (LAUNCH / "requirements-tpu.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    on_a_worker = {"python_version": "3.11", "sys_platform": "linux", "platform_machine": "x86_64"}
    extras = asked["extras_require"]
    chosen = [need for name in ("tpu", "gcs", "digits") for need in extras[name]]
    for text in [*asked["install_requires"], *chosen, "jaxlib", "libtpu"]:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate(on_a_worker):
            assert locked[need.name] in need.specifier, f"{text}: locked is {locked[need.name]}"


def test_the_skypilot_task(tmp_path):
    """Runs its two scripts with fake programs: they match the setup and command of tpu.sh."""
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
    assert f"uv=={uv} " in (ROOT / "docs" / "tpu.md").read_text()
    assert task["resources"]["accelerator_args"]["runtime_version"] in (
        (LAUNCH / "tpu_checks.sh").read_text()
    )
