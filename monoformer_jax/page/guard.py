"""What stands between the network and the page: names, origins, paths, sizes and headers.

A page on one's own machine is reachable by every web site that is open in the browser there: by a POST
to 127.0.0.1, or by a name of the site that resolves to 127.0.0.1 (DNS rebinding). The guard serves
only requests to a name of this machine, and none that another site made.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

MOST_UPLOAD = 20 << 20  # bytes of a picture
_MOST_BODY = 1 << 20  # of any other request; a full conversation of settings and texts has a tenth
_UPLOAD = "/gradio_api/upload"
# What the page and `gradio_client` use. Gradio has more, such as a proxy, monitoring and an editor.
_PATHS = re.compile(
    r"/|/(config|login|logout|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?"
    r"|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|app_id|startup-events|theme\.css|user|login_check|reset|cancel|upload"
    r"|upload_progress|queue/join|queue/data|queue/status)/?"
    r"|/gradio_api/(call|file=|heartbeat/).+"
)
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """ASGI application that answers refused requests itself and passes on all others."""

    def __init__(self, app, names: set[str], room: Callable[[], int]):
        """Args:
        app: the page.
        names: host names under which it is served; addresses, which no site can point elsewhere, are
          always good.
        room: bytes left for uploads.
        """
        self.app, self.names, self.room = app, names, room

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page uses no websockets
            return await send({"type": "websocket.close", "code": 1008})

        async def send_with(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                for name in [name for name in headers if name.startswith("access-control-")]:
                    del headers[name]  # nobody else's page is meant to read this one
                if scope["path"].startswith("/gradio_api/file="):
                    headers["Cache-Control"] = "private, no-store"
            await send(message)

        status, sentence = await self._refusal(scope)
        app = PlainTextResponse(f"{sentence}\n", status) if status else self.app
        await app(scope, receive, send_with)

    async def _refusal(self, scope) -> tuple[int, str]:
        """The status and sentence of a request that is not served; (0, "") of a good one."""
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 403, "This page is not served under that name."
        foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        opened = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if any(urlsplit(origin).netloc != hosts[0] for origin in origins) or (
            foreign and not opened
        ):
            return 403, "This page answers no requests of other sites."
        if _PATHS.fullmatch(scope["path"]) is None:
            return 404, "There is no such page."
        if scope["method"] not in ("GET", "HEAD"):
            return await self._check_body(scope, headers)
        return 0, ""

    async def _check_body(self, scope, headers) -> tuple[int, str]:
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            return 411, "The request does not say its length."
        upload = scope["path"].rstrip("/") == _UPLOAD
        if int(length) > (8 * MOST_UPLOAD if upload else _MOST_BODY):
            return 413, "The request is too large."
        if upload and int(length) > await anyio.to_thread.run_sync(self.room):
            return 507, "The pictures of all visitors fill the space of this page."
        return 0, ""

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return False
