"""Asks about passages, several at a time, until all are answered or a limit is reached."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from trainer.config import ConfigError
from trainer.queries.endpoint import Endpoint, NotAnswered
from trainer.queries.journal import Journal, Tokens
from trainer.queries.passages import Passage
from trainer.queries.prompt import Prompt
from trainer.system.progress_bar import ProgressReport

# Passages in a row without any answer, after which the endpoint is taken to be down.
IN_VAIN = 10
MILLION = 10**6


@dataclass(frozen=True)
class Limits:
    """Prices per million tokens, and what may be spent: money, tokens."""

    price_in: float | None = None
    price_out: float | None = None
    spend: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.price_in is None) != (self.price_out is None):
            raise ConfigError(
                "--price-in and --price-out belong together: the price of a million tokens, read and written"
            )
        if self.spend is not None and self.price_in is None:
            raise ConfigError("--spend needs --price-in and --price-out, the prices of a million tokens")

    def cost(self, tokens: Tokens) -> float | None:
        """What these tokens cost; None without prices, or where not all of them are known."""
        if self.price_in is None or self.price_out is None or tokens.uncounted:
            return None
        return (tokens.read * self.price_in + tokens.written * self.price_out) / MILLION

    def reached(self, tokens: Tokens) -> str | None:
        """The limit that stops further questions. ConfigError where the endpoint does not count them."""
        if self.spend is None and self.tokens is None:
            return None
        if tokens.uncounted:
            raise ConfigError(
                "the endpoint does not say how many tokens it used, so --spend and --max-tokens-total cannot be kept. "
                "Leave them out, or limit --passages"
            )
        cost = self.cost(tokens)
        if self.spend is not None and cost is not None and cost >= self.spend:
            return f"{cost:,.2f} of --spend {self.spend:,.2f} is spent"
        if self.tokens is not None and tokens.total >= self.tokens:
            return f"{tokens.total:,} tokens of --max-tokens-total {self.tokens:,} are used"
        return None


@dataclass
class Asked:
    """What became of the passages that were asked about now."""

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by reason
    stopped_by: str | None = None  # the limit


def ask_all(
    passages: list[Passage],
    prompt: Prompt,
    endpoint: Endpoint,
    journal: Journal,
    limits: Limits,
    concurrency: int,
    progress: ProgressReport,
) -> Asked:
    """Ask about each passage, at most `concurrency` at a time. Answers go into the journal.

    A passage that fails is counted. What is under way when a limit is reached, or Ctrl-C comes, is waited for: it is paid.
    """
    asked, in_vain = Asked(), 0
    waiting = iter(passages)
    running: set[Future[str | None]] = set()
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            while True:
                while len(running) < concurrency and not asked.stopped_by:
                    asked.stopped_by = limits.reached(journal.tokens)
                    if asked.stopped_by or (passage := next(waiting, None)) is None:
                        break
                    running.add(pool.submit(_ask, passage, prompt, endpoint, journal))
                if not running:
                    return asked
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    failure = future.result()
                    in_vain = in_vain + 1 if failure else 0
                    asked.answered += failure is None
                    asked.failed.update([failure] if failure else [])
                    progress.update(1)
                    if in_vain >= IN_VAIN:
                        raise ConfigError(
                            f"--llm {endpoint.host}: {in_vain} passages in a row without an answer ({failure}). What was "
                            "answered is kept. Run it again when the endpoint works"
                        )
        except BaseException:
            endpoint.stop()
            raise


def _ask(passage: Passage, prompt: Prompt, endpoint: Endpoint, journal: Journal) -> str | None:
    """Why there is no answer; None when it is in the journal, written by the thread that got it."""
    try:
        answer = endpoint.ask(prompt.fill(passage))
    except NotAnswered as error:
        return str(error)
    journal.add(prompt.key(passage, endpoint.model), passage.id, answer)
    return None


def unanswered(passages: list[Passage], key_of: Callable[[Passage], str], journal: Journal) -> list[Passage]:
    """Those that the journal has no answer for."""
    return [passage for passage in passages if key_of(passage) not in journal.answers]
