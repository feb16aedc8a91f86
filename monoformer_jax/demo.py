"""Web page to chat with a trained model, in text and pictures; the model chooses when to draw.

  python -m monoformer_jax.demo                                           # the model of the package
  python -m monoformer_jax.demo --workdir=runs/digits
  python -m monoformer_jax.demo --workdir=runs/imagenet --vae=sd-vae-ft-mse --port=8000
  python -m monoformer_jax.demo --workdir=runs/digits --host=0.0.0.0      # for the local network

The page is served on this machine alone and makes no external requests. Messages are answered one at a
time, in the order of their arrival. --host and --share open the page to others: it then asks for a
password, which is printed. --share=true creates a public address for a week, through gradio's servers:
for Colab, where the page is not reachable otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from monoformer_jax.cli import integer, local_path, model_path, run_command
from monoformer_jax.errors import InputError, require

USER = "guest"
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


@contextlib.contextmanager
def serve(
    model,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    share: bool = False,
    password: str | None = None,
) -> Iterator[tuple[str, str | None]]:
    """Serves the page of a model in a thread until the block ends, then deletes its pictures.

    Args:
      model: see `monoformer_jax.Model`.
      name: of the model, the title of the page.
      host: address of a network interface of this machine, or its name.
      port: 0: a free one.
      share: whether to create a public address.
      password: of the user `USER`; None: the page asks for none.

    Yields the local and the public URL.

    Raises:
      InputError: the port cannot be served, or there is no public address.
    """
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(host, port))
        # Only this user can read it. Gradio reads the variables when it makes components.
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="monoformer_page_", ignore_cleanup_errors=True)
        )
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        import fastapi
        import gradio as gr
        import uvicorn

        from monoformer_jax.page.blocks import SCRIPT, STYLE, make_page
        from monoformer_jax.page.conversations import Conversations
        from monoformer_jax.page.guard import MOST_UPLOAD, Guard

        talks = Conversations(model, Path(folder), name)
        app = gr.mount_gradio_app(
            fastapi.FastAPI(openapi_url=None), make_page(talks, name), "/", ssr_mode=False,
            auth=password and (USER, password), max_file_size=MOST_UPLOAD, footer_links=[],
            run_history=False, pwa=False, show_error=False, css=STYLE, js=SCRIPT,
            theme=gr.themes.Default(primary_hue="slate", **_FONTS),
        )  # fmt: skip
        here = socket.gethostname().lower()
        names = {host.lower(), "localhost", here, f"{here}.local"}
        guard = Guard(app, names, talks.room)
        server = uvicorn.Server(uvicorn.Config(
            guard, log_level="error", ws="none", server_header=False, limit_concurrency=500,
            timeout_graceful_shutdown=1,
        ))  # fmt: skip
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        while not server.started:
            require(thread.is_alive(), "the page did not start")
            time.sleep(0.02)
        port = listening.getsockname()[1]
        public = _open_tunnel(port) if share else None
        if public:
            names.add(urlsplit(public).hostname)
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}/", public


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"--host={host} --port={port} cannot be served: {error.strerror}"
        ) from error


def _open_tunnel(port: int) -> str:
    """A public address of the port, at gradio's servers."""
    import gradio.networking

    try:
        found = gradio.networking.setup_tunnel(
            "127.0.0.1", port, secrets.token_urlsafe(32), None, None
        )
    except Exception as error:  # of the network, of a download, or of the program that it starts
        raise InputError(f"--share=true: gradio made no public address: {error}") from error
    return urlsplit(found)._replace(scheme="https").geturl()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", type=model_path, default="showcase",
        help="folder of the trained run; default: showcase, the model of the package")  # fmt: skip
    add("--vae", type=local_path, help="folder of the VAE, for a latent model")
    add("--vision", type=local_path, help="folder of the CLIP vision tower, if the model needs one")
    add("--port", type=integer(0, 65535), default=7860, help="default 7860")
    add(
        "--host", default="127.0.0.1",
        help="address to serve: 0.0.0.0 for the local network; default 127.0.0.1, this machine alone",
    )  # fmt: skip
    add(
        "--share", choices=("true", "false"), default="false",
        help="create a public address: whoever knows it and the password can use the page",
    )  # fmt: skip
    add(
        "--password", metavar="FILE",
        help="file with the password of the page, or none; default: a random one with --host or "
        "--share, which is printed, otherwise none",
    )  # fmt: skip


def _password(args: argparse.Namespace) -> str | None:
    if args.password == "none":
        return None
    if args.password:
        path = local_path(args.password)
        require(path.is_file(), f"--password={path}: there is no such file")
        text = path.read_text(encoding="utf-8").strip()
        require(len(text) >= 8, f"--password={path} holds {len(text)} characters: write 8 or more")
        return text
    alone = args.host == "localhost" or _is_loopback(args.host)
    return None if alone and args.share == "false" else secrets.token_urlsafe(12)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(args: argparse.Namespace) -> None:
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError("the demo needs gradio: pip install -e '.[demo]'") from error
    import monoformer_jax

    password = _password(args)
    model = monoformer_jax.load(args.workdir, vae=args.vae, vision=args.vision)
    model.image_processor.codec.check()
    name = model.config.name + (f", step {model.step}" if model.step else "")
    options = {"host": args.host, "port": args.port, "share": args.share == "true"}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, to delete the pictures
    with (
        contextlib.suppress(KeyboardInterrupt),
        serve(model, name, password=password, **options) as (address, public),
    ):
        print(f"serving {address}", flush=True)
        if public:
            print(f"public address for a week: {public}\nmessages and pictures pass through gradio's "
                  "servers", flush=True)  # fmt: skip
        if password and not args.password:
            print(f"user {USER}, password {password}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    run_command("demo", __doc__, add_arguments, main)
