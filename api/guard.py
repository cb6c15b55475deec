"""Decides which requests reach the server: the page and the API stand behind the same guard.

A web site that a visitor of this machine opens can send requests to 127.0.0.1, too. Its browser
names the site in the Origin header; a site whose name was pointed at this machine (DNS rebinding)
shows in the Host header. Both are checked, and bodies are bounded before they are read.
"""
import dataclasses
import hmac
import os
import re
import socket
from fnmatch import fnmatch

from fastapi import Request
from starlette.middleware.cors import CORSMiddleware

from api.schema import RequestError, error_answer
from common.errors import UserError

MAX_BODY_BYTES = 2 * 2**20
ADDRESS = re.compile(r"\[[\da-f:.]+\]|[\d.]+")  # as a Host header shows it
LOOPBACK = {"localhost", "127.0.0.1", "[::1]", "::1"}


@dataclasses.dataclass
class Access:
    """Who may use the server."""

    allow_host: tuple[str, ...] = ()
    """Other names of this server, such as a reverse proxy's; *.example.org allows all names below
    it. Its own name, localhost and IP addresses are always allowed."""
    allow_origin: tuple[str, ...] = ()
    """Other web sites whose pages may use the API, such as https://example.org."""
    api_key: str | None = None
    """The key that clients of /v1 and /metrics must send. Default: the environment's API_KEY."""


class TooLarge(RequestError):
    def __init__(self):
        super().__init__(f"The body must have at most {MAX_BODY_BYTES:,} bytes.", 413)


class Guard:
    """ASGI middleware that refuses requests from foreign web sites, too large ones, and those
    without the API key.

    `host` is the address on which the server listens. A Space is public, so any site may use it.
    """

    def __init__(self, app, access: Access, host: str):
        self.origins = access.allow_origin
        self.public = "SPACE_ID" in os.environ
        self.key = access.api_key or os.environ.get("API_KEY")
        name = socket.gethostname().lower()
        self.names = ["localhost", "*.localhost", host, name, f"{name}.local", *access.allow_host]
        self.app = CORSMiddleware(app, allow_origins=self.origins, allow_methods=["*"],
                                  allow_headers=["*"]) if self.origins else app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            if not self.public:
                self.check_site(request)
            self.check_body(request)
            self.check_key(request)
            await self.app(scope, bounded(receive), send)
        except RequestError as error:
            await error_answer(error)(scope, receive, send)

    def check_site(self, request: Request):
        """Refuses names that are not this server's, and pages of other sites."""
        host = request.headers.get("host", "")
        name = host_name(host)
        # rebinding needs a name, so an address is safe
        if host and not ADDRESS.fullmatch(name) and not any(fnmatch(name, own)
                                                            for own in self.names):
            raise RequestError(f"{host!r:.100} is not a name of this server: start it with "
                               "--allow-host to allow the name.", 403)
        origin = request.headers.get("origin", "")
        # a page cannot set X-Forwarded-Host without a preflight request, but a proxy can
        own = {host, request.headers.get("x-forwarded-host")}
        same = origin.partition("://")[2] in own
        if origin and not same and not {origin, "*"} & set(self.origins):
            raise RequestError(f"Pages of {origin!r:.100} may not use this server: start it with "
                               "--allow-origin to allow them.", 403)

    def check_body(self, request: Request):
        path, headers = request.scope["path"], request.headers
        if path.startswith("/gradio_api/upload"):
            raise RequestError("This page takes no files.", 403)
        if int(headers.get("content-length", 0)) > MAX_BODY_BYTES:
            raise TooLarge
        # a page of another site can send other types without asking
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if path.startswith("/v1/") and request.method == "POST" and kind != "application/json":
            raise RequestError("Send the body with the header Content-Type: application/json.", 415)

    def check_key(self, request: Request):
        private = request.scope["path"].startswith(("/v1/", "/metrics"))
        if not self.key or not private or request.method == "OPTIONS":
            return
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), self.key.encode()):
            raise RequestError("Send the server's API key with the header Authorization: Bearer "
                               "KEY.", 401, code="invalid_api_key")


def bounded(receive):
    """`receive`, which fails once a body has more than MAX_BODY_BYTES."""
    size = 0

    async def receive_bounded():
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise TooLarge
        return message

    return receive_bounded


def host_name(host: str) -> str:
    """The name or address in a Host header, without the port."""
    return re.sub(r":\d*$", "", host).lower()


def require_local(request: Request):
    """Raises UserError unless the request comes from this machine, and not through a proxy."""
    names = {host_name(request.headers.get("host", "")), request.client.host}
    if not names <= LOOPBACK or "x-forwarded-for" in request.headers:
        raise UserError("Only this machine's own browser can do this: open the page at "
                        "http://localhost, for example through an SSH tunnel.")
