"""launch/tpu.sh against a fake cloud with preemptions, errors, timeouts and no capacity."""

import random
import signal
import time

import pytest
from fake_cloud import RUN, SLICE, Cloud, make_checkout, open_cloud

checkout = pytest.fixture(scope="module")(make_checkout)
cloud = pytest.fixture(open_cloud)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_preempted_runs_finish_with_each_step_trained_once(tmp_path, checkout, seed):
    """Ten runs per seed, each preempted one to three times at random calls, in one of three ways."""
    replaced = 0
    for run in range(10):
        cloud = Cloud(tmp_path / str(run), checkout)
        rng = random.Random(10 * seed + run)
        calls = [rng.randint(4, 16)]
        while len(calls) < 3 and rng.random() < 0.4:
            calls.append(calls[-1] + rng.randint(8, 16))
        hows = [rng.choice(["SUSPENDED", "PREEMPTED", "NOTICE"]) for _ in calls]
        cloud.fault("preempt", "\n".join(f"{c} {how}" for c, how in zip(calls, hows)))
        done = cloud.babysit("--type=v5litepod-8")
        said = f"seed {seed}, run {run}: {calls} {hows}\n{done.stderr}"
        cloud.close()
        assert done.returncode == 0, said
        assert cloud.trained == [1, 2, 3, 4, 5], said
        assert cloud.alive() == [], said
        replaced += len(cloud.made()) - 1
    assert replaced >= 10  # the preemptions did happen


def test_a_failed_worker_ends_the_run_and_its_log_is_shown(cloud):
    """One worker of four fails; the others would wait forever."""
    (cloud.folder / "steps").write_text("100000")
    cloud.fault("exit", "2 4")
    done = cloud.babysit()
    assert done.returncode == 4
    assert "worker 0:2 of probe exited with code 4 (crash loop)" in done.stderr
    assert "Traceback: a bug" in done.stderr
    assert cloud.alive() == [] and len(cloud.made()) == 1


CLOUD_ERRORS = [
    # faults, exit code, slices requested, message
    pytest.param({"scp": "2", "ssh": "2"}, 0, 1, "retrying (2)", id="scp and ssh fail at first"),
    pytest.param({"unavailable": "3", "delete": "2"}, 0, 4, "", id="busy at first"),
    pytest.param({"unreachable": "6"}, 0, 1, "", id="no network at first"),
    pytest.param({"unreachable": "99"}, 1, 0, "failed 10 times: ERROR", id="no network"),
    pytest.param({"fails": "2"}, 0, 3, "probe failed: out of capacity", id="no capacity twice"),
    pytest.param({"fails": "9"}, 1, 5, "FAILED five times in a row", id="no capacity ever"),
    pytest.param({"quota": "1"}, 2, 1, "nothing was created: ERROR: (gcloud", id="quota"),
    pytest.param({"scp": "99"}, 1, 1, "could not be set up", id="scp always fails"),
    pytest.param({"unresponsive": "99"}, 1, 1, "could not be set up", id="a worker never responds"),
]


@pytest.mark.slow
@pytest.mark.parametrize("faults,code,requests,said", CLOUD_ERRORS)
def test_cloud_errors(cloud, faults, code, requests, said):
    for name, text in faults.items():
        cloud.fault(name, text)
    done = cloud.babysit()
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert cloud.alive() == [] and len(cloud.made()) == requests
    assert cloud.trained == ([1, 2, 3, 4, 5] if code == 0 else [])


@pytest.mark.slow
def test_a_slice_with_an_unresponsive_worker_is_replaced(cloud):
    cloud.fault("hold")
    process = cloud.start("babysit", "--poll-seconds=0", "--delete-when-done", *RUN)
    while not cloud.trained or "tpu_worker.sh status" not in cloud.calls[-1]:
        time.sleep(0.02)
    cloud.fault("unresponsive", "7")  # the last one or two hit the new slice and are retried
    while len(cloud.made()) < 2:
        time.sleep(0.02)
    (cloud.folder / "faults" / "hold").unlink()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "not every worker responded in 5 polls" in err
    assert cloud.trained == [1, 2, 3, 4, 5] and len(cloud.made()) == 2


@pytest.mark.slow
def test_a_partly_failed_run_is_restarted(cloud):
    """One of four trainers has failed without babysit: the other three are ended first."""
    cloud.fault("hold")
    cloud.fault("exit", "2 1")
    assert cloud.tpu("run", "--poll-seconds=0", *RUN).returncode == 0
    (cloud.folder / "faults" / "exit").unlink()
    time.sleep(1)  # log names have a resolution of one second
    process = cloud.start("babysit", "--poll-seconds=0", "--delete-when-done", *RUN)
    logs = cloud.folder / "gs" / "bucket" / "run" / "logs"
    while len(list(logs.glob("*.log"))) < 4:  # a log is copied when its trainer has ended
        time.sleep(0.02)
    (cloud.folder / "faults" / "hold").unlink()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert cloud.trained == [1, 2, 3, 4, 5] and len(cloud.made()) == 1
    ends = [path.read_text() for path in sorted(logs.glob("*.log"))]
    assert ["saved at step" in text for text in ends] == [True, True, False, True] + [False] * 4


@pytest.mark.slow
def test_a_trainer_that_exits_without_done_json(cloud):
    (cloud.folder / "steps").write_text("0")
    done = cloud.babysit()
    assert done.returncode == 1 and "there is no gs://bucket/run/done.json" in done.stderr
    assert cloud.alive() == []


@pytest.mark.slow
def test_max_hours(cloud):
    (cloud.folder / "steps").write_text("100000")
    done = cloud.babysit("--max-hours=0.0003", "--price-per-chip-hour=2")
    assert done.returncode == 1 and "--max-hours=0.0003 is reached" in done.stderr
    assert "stopped after 0.00 h x 16 chips x 2 = 0.0" in done.stderr
    assert cloud.alive() == []
    log = next((cloud.folder / "gs" / "bucket" / "run" / "logs").glob("*-0-0.log"))
    assert "saved at step" in log.read_text()


@pytest.mark.slow
def test_max_restarts(cloud):
    cloud.fault("exit", "0 75")  # every time
    done = cloud.babysit("--max-restarts=2")
    assert done.returncode == 1 and "gave up after 2 restarts" in done.stderr
    assert cloud.alive() == []


@pytest.mark.slow
@pytest.mark.parametrize("delete", [True, False])
def test_an_interrupted_babysit_deletes_or_prints_how_and_can_be_resumed(cloud, delete):
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
    assert ("monitoring" in done.stderr) is not delete  # a running training is not restarted
    assert cloud.trained == list(range(1, 101)) and cloud.alive() == []
