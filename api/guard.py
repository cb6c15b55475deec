"""Decides which requests reach the server: the page and the API stand behind the same guard.

A web site that a user of this machine opens can send requests to 127.0.0.1, too. The browser
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
UPLOAD = "/gradio_api/upload"
MAX_UPLOAD_BYTES = 11_000_000  # a text of 10 MB, and what surrounds it
# endpoints of Gradio that write files, and that the page does not use
UNUSED = "/gradio_api/process_recording", "/gradio_api/deep_link"
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

    def __post_init__(self):
        if self.api_key == "":  # an unset variable in a script must not open the server
            raise UserError("--api-key must not be empty: leave it out if no key is needed.")


class TooLarge(RequestError):
    def __init__(self, limit: int):
        super().__init__(f"The body must have at most {limit:,} bytes.", 413)


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
        own = host.lower(), *map(str.lower, access.allow_host)
        self.names = ["localhost", "*.localhost", name, f"{name}.local", *own]
        self.app = app
        # pages of the allowed sites can read the errors of `admit`, too
        self.next = CORSMiddleware(self.admit, allow_origins=self.origins, allow_methods=["*"],
                                   allow_headers=["*"]) if self.origins else self.admit

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if not self.public:
                self.check_site(Request(scope))
        except RequestError as error:
            await error_answer(error)(scope, receive, send)
        else:
            await self.next(scope, receive, send)

    async def admit(self, scope, receive, send):
        """Passes on the requests whose type, size and key the server accepts."""
        request = Request(scope)
        try:
            self.check_body(request)
            self.check_key(request)
            await self.app(scope, bounded(receive, self.limit(request)), send)
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
        if is_foreign(request) and not {origin, "*"} & set(self.origins):
            raise RequestError(f"Pages of {origin!r:.100} may not use this server: start it with "
                               "--allow-origin to allow them.", 403)

    def check_body(self, request: Request):
        path, headers = route_path(request), request.headers
        if path.startswith(UNUSED):
            raise RequestError(f"{path:.100} is switched off.", 404)
        if path.startswith(UPLOAD):  # the text to train on is the only file that the page takes
            try:
                require_may_train(request)
            except UserError as error:
                raise RequestError(str(error), 403) from None
        if int(headers.get("content-length", 0)) > self.limit(request):
            raise TooLarge(self.limit(request))
        # a page of another site can send other types without asking
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if path.startswith("/v1/") and request.method == "POST" and kind != "application/json":
            raise RequestError("Send the body with the header Content-Type: application/json.", 415)

    def limit(self, request: Request) -> int:
        """Most bytes of the body."""
        is_upload = route_path(request).startswith(UPLOAD)
        return MAX_UPLOAD_BYTES if is_upload else MAX_BODY_BYTES

    def check_key(self, request: Request):
        private = route_path(request).startswith(("/v1/", "/metrics"))
        if not self.key or not private or request.method == "OPTIONS":
            return
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), self.key.encode()):
            raise RequestError("Send the server's API key with the header Authorization: Bearer "
                               "KEY.", 401, code="invalid_api_key")


def bounded(receive, limit: int):
    """`receive`, which fails once a body has more than `limit` bytes."""
    size = 0

    async def receive_bounded():
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise TooLarge(limit)
        return message

    return receive_bounded


def host_name(host: str) -> str:
    """The name or address in a Host header, without the port."""
    return re.sub(r":\d*$", "", host).lower()


def route_path(request: Request) -> str:
    """The path that the routes match: without the root path of a server behind a proxy."""
    path = request.scope["path"]
    below = path.removeprefix(request.scope.get("root_path", ""))
    return below if below.startswith("/") else path


def is_foreign(request: Request) -> bool:
    """Whether a page of another site sends the request."""
    origin = request.headers.get("origin", "")
    # a page cannot set X-Forwarded-Host without a preflight request, but a proxy can
    own = {request.headers.get("host", ""), request.headers.get("x-forwarded-host")}
    return origin != "" and origin.partition("://")[2] not in own


def may_train() -> bool:
    """Whether the page lets visitors train: not on a Space, which sets SPACE_ID, unless the
    environment's ALLOW_TRAINING is 1, and nowhere if it is 0."""
    allowed = os.environ.get("ALLOW_TRAINING")
    return allowed == "1" or (allowed != "0" and "SPACE_ID" not in os.environ)


def require_may_train(request: Request):
    """Raises UserError unless training is switched on for everyone, or the request comes from this
    machine, not through a proxy, and not from a page of another site."""
    if not may_train():
        raise UserError("Training is switched off on this page.")
    names = {host_name(request.headers.get("host", "")), request.client.host}
    forwarded = any(f"x-forwarded-{name}" in request.headers for name in ("for", "host"))
    is_local = names <= LOOPBACK and not forwarded and not is_foreign(request)
    if not is_local and os.environ.get("ALLOW_TRAINING") != "1":
        raise UserError("Only this machine's own browser can do this: open the page at "
                        "http://localhost, for example through an SSH tunnel.")
