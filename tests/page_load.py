"""Many visitors at once, and large pictures; the page and its visitors are on this machine alone.

    python tests/page_load.py                      # 500 requests of 20 clients, a line, 300 pictures
    python tests/page_load.py --requests=100 --clients=5 --pictures=10 --json=load.json

Each client has conversations of 5 messages, whose every answer repeats what the model was shown: an
answer that is lost, mixed up or out of order is seen. Then visitors come one by one while 8 wait for
drawings. Then one visitor sends pictures of 8000 × 8000 pixels, in conversations of 50. Exits with 1
if an answer was wrong.
"""

import argparse
import concurrent.futures
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import PIL.Image

SETTINGS = [8, 2, "", 3, 1, 1, 64]  # the order of `blocks._make_settings`, but its last one
SERVER = """
import sys, threading
sys.path.insert(0, "tests")
import page_model
from monoformer_jax import demo
from monoformer_jax.cli import load_config
model = page_model.StandIn(load_config("configs/digits.py:tiny", []), seconds=0.1)
with demo.serve(model, "stand-in") as (address, _):
    print(address, flush=True)
    sys.stdin.read()
"""


def say(client, number, text, files=(), remember=True):
    """The conversation's id, what is shown at the end, and the seconds until something was shown."""
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in files]
    data = [number, {"text": text, "files": files}, *SETTINGS, remember]
    begin, first, last = time.monotonic(), None, None
    event = client.post("call/say", json={"data": data}).raise_for_status().json()["event_id"]
    with client.stream("GET", f"call/say/{event}") as answer:
        for line in answer.iter_lines():
            if line.startswith("event: error"):
                raise RuntimeError(f"the page failed at {text!r}")
            if line.startswith("data: [") and (found := json.loads(line[6:])):
                first, last = first or time.monotonic() - begin, found
    number, shown, notice, _ = last
    texts = [[p["text"] for p in m["content"] if p["type"] == "text"] for m in shown]
    if notice:
        raise RuntimeError(notice)
    return number, [text for part in texts for text in part], first


def talk(address, person, turns):
    """Errors in the answers of a conversation, and the seconds until each was seen to begin."""
    wrong, seconds = [], []
    with httpx.Client(base_url=f"{address}gradio_api/", timeout=300) as client:
        for turn in range(turns):
            if turn % 5 == 0:  # every answer is as long as all that was said before
                number, said = None, []
            number, shown, first = say(client, number, f"{person}.{turn}")
            said.append(f"{person}.{turn}")
            said.append(" | ".join(said))
            if shown != said:
                wrong.append(f"client {person}, turn {turn}: {shown} is not {said}")
            seconds.append(first)
    return wrong, seconds


def come_last(address, before=8, times=10):
    """Seconds until something is shown to each visitor who comes when `before` wait."""
    clients = [
        httpx.Client(base_url=f"{address}gradio_api/", timeout=300) for _ in range(before + 1)
    ]
    seconds = []
    with concurrent.futures.ThreadPoolExecutor(before) as pool:
        for _ in range(times):
            line = [pool.submit(say, client, None, "draw") for client in clients[1:]]
            time.sleep(1)  # all have come; the last of them waits 5 seconds more
            begin = time.monotonic()
            seconds.append(say(clients[0], None, "I come last")[2])
            assert time.monotonic() - begin > 4, "nobody waited"
            concurrent.futures.wait(line)
    return sorted(seconds)


def memory(pid):
    """MiB in memory now, and at most since the last call."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    now, peak = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024
                 for name in ("VmRSS", "VmHWM"))  # fmt: skip
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")
    return now, peak


def send_pictures(address, pid, count):
    """MiB above the start: after the pictures, after the last conversation, and at most."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8000, 8000), "navy").save(buffer, "PNG")
    begin, _ = memory(pid)
    most, number = begin, None
    with httpx.Client(base_url=f"{address}gradio_api/", timeout=300) as client:
        for sent in range(count):
            files = {"files": (f"{sent}.png", buffer.getvalue())}
            (path,) = client.post("upload", files=files).raise_for_status().json()
            number, shown, _ = say(client, None if sent % 50 == 0 else number, f"{sent}: ", [path],
                                   remember=False)  # fmt: skip
            assert shown[-1] == f"{sent}:  | picture of 128", shown
            most = max(most, memory(pid)[1])
    return memory(pid)[0] - begin, most - begin, len(buffer.getvalue())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    args = parser.parse_args()
    turns = args.requests // args.clients
    with subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as server:  # fmt: skip
        try:
            address = server.stdout.readline().strip()
            begin = time.monotonic()
            with concurrent.futures.ThreadPoolExecutor(args.clients) as pool:
                found = list(pool.map(lambda p: talk(address, p, turns), range(args.clients)))
            wrong = [error for errors, _ in found for error in errors]
            first = sorted(second for _, seconds in found for second in seconds)
            facts = {"requests": turns * args.clients, "clients": args.clients, "wrong": len(wrong),
                     "seconds": round(time.monotonic() - begin, 1),
                     "first_median_seconds": round(first[len(first) // 2], 2),
                     "first_most_seconds": round(first[-1], 2)}  # fmt: skip
            last = come_last(address)
            facts |= {"behind_8_median_seconds": round(last[len(last) // 2], 2),
                      "behind_8_most_seconds": round(last[-1], 2)}  # fmt: skip
            after, most, size = send_pictures(address, server.pid, args.pictures)
            facts |= {"pictures": args.pictures, "picture_bytes": size, "mib_after": round(after, 1),
                      "mib_most": round(most, 1)}  # fmt: skip
        finally:
            server.terminate()
    print("\n".join([*wrong[:5], *(f"{name}: {value}" for name, value in facts.items())]))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
