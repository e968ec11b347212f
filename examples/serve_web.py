# SPDX-License-Identifier: Apache-2.0
"""What stands between strangers and the models of `serve_tasks.py`: headers, hosts, uploads."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from email.message import Message
from typing import Any

import anyio
from fastapi import FastAPI, HTTPException, Request
from starlette.middleware.trustedhost import TrustedHostMiddleware

UPLOAD_SECONDS = 30.0  # a picture that takes longer to arrive is given up
#: Of `uvicorn.run`: what it takes from strangers, and what it tells them of itself.
LIMITS = {
    "limit_concurrency": 32,
    "backlog": 64,
    "timeout_keep_alive": 5,
    "h11_max_incomplete_event_size": 16_384,
    "server_header": False,
}


def make_guarded_app(title: str, page: str, hosts: Sequence[str]) -> FastAPI:
    """Return an app without a description of itself, which answers to its own names only.

    Args:
        title: Its title.
        page: Its page; scripts and styles that are not in it do not run.
        hosts: Names that it is reached by. Another site's name that was made to lead here
            (DNS rebinding) is refused.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(_Headers, headers=_headers(page))
    return app


def _headers(page: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script", page),
        "style-src": _hashes("style", page),
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def _hashes(tag: str, page: str) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


class _Headers:
    """Adds headers to every answer, also to refusals."""

    def __init__(self, app: Any, headers: dict[str, str]) -> None:
        self.app = app
        self.headers = [(n.lower().encode(), v.encode()) for n, v in headers.items()]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self.headers]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


async def read_upload(request: Request, max_bytes: int) -> bytes:
    """Return what was uploaded: the body, or of a form its first file.

    Raises:
        HTTPException: If it is empty, too large, or too slow.
    """
    too_large = HTTPException(413, f"the picture is larger than {max_bytes:,} bytes")
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated[:20]) > max_bytes:
        raise too_large
    data = bytearray()
    try:
        with anyio.fail_after(UPLOAD_SECONDS):
            async for chunk in request.stream():  # counted as it comes: a header may lie
                data += chunk
                if len(data) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(408, f"no picture within {UPLOAD_SECONDS:.0f} s") from error
    found = _file_of_form(request.headers.get("content-type", ""), bytes(data))
    if not found:
        raise HTTPException(400, "no picture: send its bytes as the body, or a form with a file")
    return found


def _file_of_form(content_type: str, body: bytes) -> bytes:
    """Return the first file of a multipart form; any other body as it is."""
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/form-data" or not boundary:
        return body
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        if b"filename=" in head.lower():
            return content
    return b""
