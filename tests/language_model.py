"""A language model's endpoint of the tests' own: it answers as it is told, counts, and keeps what it was sent."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Reply:
    """What the endpoint sends back."""

    content: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 20})
    delay: float = 0.0
    body: bytes | None = None  # in place of OpenAI's JSON
    cut: bool = False  # the connection, in the middle of the body


@dataclass
class Endpoint:
    """`answer` makes the reply to a prompt. `most` is the largest number of requests that were there at once."""

    answer: Callable[[str], Reply]
    prompts: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    now: int = 0
    most: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextlib.contextmanager
def serving(answer: Callable[[str], Reply]) -> Iterator[Endpoint]:
    """An endpoint on 127.0.0.1, as long as the block lasts."""
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            (message,) = request["messages"]
            with endpoint.lock:
                endpoint.now += 1
                endpoint.most = max(endpoint.most, endpoint.now)
                endpoint.prompts.append(message["content"])
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                endpoint.paths.append(self.path)
                endpoint.models.append(request["model"])
                endpoint.times.append(time.monotonic())
            try:
                reply = endpoint.answer(message["content"])
                time.sleep(reply.delay)
                with contextlib.suppress(OSError):
                    self.send(reply)
            finally:
                with endpoint.lock:
                    endpoint.now -= 1

        def send(self, reply):
            choices = [
                {"index": 0, "message": {"role": "assistant", "content": reply.content}, "finish_reason": "stop"}
            ]
            body = reply.body
            if body is None:
                body = json.dumps(
                    {"choices": choices, "model": "m"} | ({"usage": reply.usage} if reply.usage else {})
                ).encode()
            self.send_response(reply.status)
            for name, value in {
                "content-type": "application/json",
                "content-length": str(len(body)),
                **reply.headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if reply.cut else body)
            self.close_connection = True

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
