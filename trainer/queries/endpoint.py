"""A language model behind an OpenAI-compatible endpoint: one question, one answer, with patience for what goes wrong."""

import contextlib
import os
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from trainer.config import ConfigError, one_line
from trainer.config.errors import printable

KEYS = ("LLM_API_KEY", "OPENAI_API_KEY")
# What every further passage would be answered with too.
REFUSALS = {
    401: "the key is not accepted. Set LLM_API_KEY",
    403: "the key may not do this. Set another LLM_API_KEY",
    404: "there is no such model, or no such address. Look at --model and --llm",
}
# What may be over in a moment: the server's own faults, too many requests, a request that it waited for too long.
MAY_PASS = (408, 409, 425, 429)


class NotAnswered(Exception):
    """A passage that no answer came for, though it was asked as often as is allowed. Others may fare better."""


class Stopped(Exception):
    """The run ends; what waits to be asked again is left."""


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it counted; None where the endpoint does not count."""

    text: str
    tokens_in: int | None
    tokens_out: int | None


@dataclass(frozen=True)
class Patience:
    """How long a request may take, and how often and how late a passage is asked again."""

    timeout: float = 300.0  # seconds; a small machine may take minutes for an answer
    retries: int = 5
    first: float = 1.0  # seconds before the second try, doubled with each further one
    longest: float = 60.0
    longest_asked_for: float = 600.0  # that an endpoint may ask for in Retry-After

    def before(self, retry: int, asked_for: float | None) -> float:
        """Seconds to wait before a retry, counted from 0. By chance up to half less, so that not all come back at once."""
        if asked_for is not None:
            return min(asked_for, self.longest_asked_for)
        return min(self.longest, self.first * 2**retry) * random.uniform(0.5, 1)


class Endpoint:
    """Asks a model at an address."""

    def __init__(self, url: str, model: str, patience: Patience | None = None) -> None:
        """url: as OpenAI's clients take it, up to /v1. ConfigError for what is none.

        The key is that of LLM_API_KEY or OPENAI_API_KEY. A local endpoint needs none.
        """
        from huggingface_hub import InferenceClient

        self.model, self.patience = model, patience or Patience()
        address = _address(url)
        self.host = urlsplit(address).netloc
        self._key = next((key for name in KEYS if (key := os.environ.get(name, "").strip())), None)
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError("LLM_API_KEY has characters that no key has. Copy it again")
        self._stopped = threading.Event()
        _let_through_offline(self.host)
        # a header of None is left out. Without it, the library would send the user's token of the hub to this endpoint
        headers: Any = {"authorization": f"Bearer {self._key}" if self._key else None}
        self._client = InferenceClient(base_url=address, headers=headers, timeout=self.patience.timeout)

    def stop(self) -> None:
        """Ask nothing again: whoever waits for a retry raises Stopped."""
        self._stopped.set()

    def ask(self, question: str) -> Answer:
        """The model's answer. Raises NotAnswered, ConfigError where asking on is in vain, Stopped."""
        retry = 0
        while True:
            if self._stopped.is_set():
                raise Stopped
            try:
                return self._ask_once(question)
            except _MayPass as error:
                if retry >= self.patience.retries:
                    raise NotAnswered(error.reason) from None
                wait = self.patience.before(retry, error.asked_for)
            retry += 1
            if self._stopped.wait(wait):
                raise Stopped

    def _ask_once(self, question: str) -> Answer:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        try:
            messages: Any = [{"role": "user", "content": question}]
            answer = self._client.chat_completion(messages, model=self.model)
            return _read(answer)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in REFUSALS:
                raise ConfigError(f"--llm {self.host}: HTTP {status}: {REFUSALS[status]}") from None
            reason = f"HTTP {status}"
            if status in MAY_PASS or status >= 500:
                raise _MayPass(reason, _retry_after(error.response.headers)) from None
            raise NotAnswered(f"{reason}: {self._without_key(error)}") from None
        except (httpx2.HTTPError, OSError) as error:
            reason = "no answer in time" if isinstance(error, TimeoutError) else "no connection"
            raise _MayPass(reason) from None
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):  # the library expects what OpenAI answers
            raise _MayPass("an answer in another form than OpenAI's") from None

    def _without_key(self, error: Any) -> str:
        """What the server said, without the key, which some of them quote."""
        said = error.server_message or ""
        with contextlib.suppress(ValueError, KeyError, TypeError):  # OpenAI's form; the library takes it for plain text
            said = error.response.json()["error"]["message"]
        said = one_line(RuntimeError(said), 120) or "no reason given"
        return printable(said.replace(self._key, "***") if self._key else said)


class _MayPass(Exception):
    def __init__(self, reason: str, asked_for: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.asked_for = reason, asked_for


def _address(url: str) -> str:
    """The address that is posted to. The library would put /v1 into a path that does not end in it."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"--llm {url}: write an address as http://localhost:11434/v1")
    if parts.username or parts.password:
        raise ConfigError("--llm: a key does not belong into the address. Set LLM_API_KEY")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    return urlunsplit(parts._replace(path=path))


def _let_through_offline(host: str) -> None:
    """HF_HUB_OFFLINE stops whatever the library asks; here it stops what is not for the endpoint."""
    import httpx2
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.errors import OfflineModeIsEnabled

    if not constants.is_offline_mode():
        return

    def guard(request: Any) -> None:
        if request.url.netloc.decode() != host:
            raise OfflineModeIsEnabled(f"{request.url.host} is not asked: HF_HUB_OFFLINE is set")

    set_client_factory(lambda: httpx2.Client(event_hooks={"request": [guard]}, follow_redirects=True, timeout=None))


def _read(answer: Any) -> Answer:
    text = answer.choices[0].message.content
    usage = answer.usage
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    counted = [count if isinstance(count, int) and count >= 0 else None for count in counts]
    return Answer(text if isinstance(text, str) else "", *counted)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, in seconds or as a date."""
    said = headers.get("retry-after")
    if not said:
        return None
    try:
        return max(float(said), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
