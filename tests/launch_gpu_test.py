"""launch/gpu.sh with fakes of nvidia-smi, srun and scontrol that record their calls."""

import shutil
import subprocess

import pytest
from fake_cloud import TOOLS, make_checkout, program

checkout = pytest.fixture(scope="module")(make_checkout)


@pytest.fixture
def gpu(tmp_path, checkout):
    """Runs gpu.sh with the fakes, and returns its result with their calls."""
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
    assert gpu(*GPU_RUN, CODE="3").returncode == 3  # the trainer's exit code
    dry = gpu("--dry-run", *GPU_RUN)
    assert dry.calls == [] and dry.stdout.strip() == f"python {TRAIN}"
    program(gpu.folder, "nvidia-smi", "exit 9")
    blind = gpu(*GPU_RUN)
    assert blind.returncode == 2 and blind.stderr == "error: nvidia-smi finds no GPU on this host\n"
    for words, said in [
        (
            ["--config=configs/no.py", "--workdir=a"],
            "--config=configs/no.py: no such file",
        ),
        ([*GPU_RUN, "--gpus=2"], "need --nodes=N"),
        ([*GPU_RUN, "--nodes=2"], "both must be positive numbers"),
        ([*GPU_RUN, "--node=2"], "unknown option --node"),
        (["--config=configs/digits.py"], "--workdir=DIR are needed"),
    ]:
        done = gpu(*words)
        assert done.returncode == 2 and said in done.stderr and not done.calls


def test_gpu_under_slurm(gpu):
    """One process per GPU, as jax.distributed expects from Slurm's variables."""
    srun = "srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --kill-on-bad-exit=1"
    by_hand = gpu(*GPU_RUN, "--nodes", "2", "--gpus=8", "--partition=p", "--time=60")
    assert by_hand.calls == [f"{srun} --partition=p --time=60 python {TRAIN}"]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    assert gpu(*GPU_RUN, **job).calls == [f"{srun} python {TRAIN}"]
    saved = gpu(*GPU_RUN, **job, CODE="75")  # the job reached its time limit
    assert saved.calls == [f"{srun} python {TRAIN}", "scontrol requeue 7"]
    assert gpu(*GPU_RUN, **job, CODE="3").calls == [f"{srun} python {TRAIN}"]
    (gpu.folder / "srun").unlink()
    assert "srun is not on the PATH" in gpu(*GPU_RUN, **job).stderr


def test_jax_reads_the_slurm_variables_as_expected(monkeypatch):
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
