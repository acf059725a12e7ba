"""Conversations by a language model behind any OpenAI-compatible endpoint that the user runs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edt_former.extras import need
from edt_former.tasks.conversations.context import Context
from edt_former.tasks.conversations.judging import Turn
from edt_former.tasks.conversations.writing import Writer, Written

EXTRA, PURPOSE = "conversations", "conversations by an endpoint"
SECONDS_OF_A_MINUTE = 60.0

SYSTEM = (
    "You write conversations between a person who looks at a molecule and an assistant who sees "
    "it. You are told what is known of the molecule; the person is not. Questions are diverse: "
    "class of compound, functional groups, rings, role, use, origin, properties. Ask only what can "
    "be answered with certainty from what you are told. Answers are sentences of a chemist who "
    "sees the molecule: they never mention that something was told, and never give the SMILES. "
    'Reply with one JSON object and nothing else: {"turns": [{"question": "...", "answer": "..."}]}'
)


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked, and how hard.

    Args:
        url: of the API, as "http://localhost:8000/v1".
        model: its name there.
        api_key: what the server asks for; local ones mostly take anything.
        concurrency: requests at a time.
        per_minute: most requests begun in a minute; None for no limit.
        retries: of a request that is refused for now (429) or fails (5xx, the network), after the
            pause that the server names or one that doubles.
        timeout: seconds of a request.
        temperature: of sampling.
        max_tokens: of a reply.
    """

    url: str
    model: str
    api_key: str = "none"
    concurrency: int = 8
    per_minute: float | None = None
    retries: int = 5
    timeout: float = 120.0
    temperature: float = 0.7
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {self.concurrency}")
        if self.per_minute is not None and self.per_minute <= 0:
            raise ValueError(f"per_minute must be positive, got {self.per_minute}")


def generate(
    contexts: Iterable[Context],
    out: Path | str,
    endpoint: Endpoint,
    *,
    turns: int = 4,
    origin: Sequence[str] = (),
    progress: Callable[[], None] = lambda: None,
) -> Written:
    """Has a model write a conversation about every molecule; goes on where it was stopped.

    Replies are checked against the schema and by `objection`; what fails goes to
    `out`.dropped.jsonl with the reason. A request that fails after its retries is asked again by
    the next call.

    Args:
        contexts: read as requests are free, so they may be more than memory holds.
        out: a .jsonl file that `edt_former.data.prepare` reads.
        endpoint: the model.
        turns: questions that are asked for.
        origin: what the contexts were read from; `out` is not gone on with from elsewhere.
        progress: called after every molecule.

    Raises:
        ImportError: the extra is not installed.
        RuntimeError: the endpoint refuses all requests: a wrong key, model or URL.
        ValueError: see `Writer`.
    """
    need("openai", extra=EXTRA, purpose=PURPOSE)
    settings = {
        "by": endpoint.model,
        "turns": turns,
        "origin": list(origin),
        "temperature": endpoint.temperature,
        "system": SYSTEM,
    }
    with Writer(out, settings) as writer:
        asyncio.run(_Run(writer, endpoint, turns, progress).all(iter(contexts)))
    return writer.written


def prompt(context: Context, turns: int) -> str:
    """What a model is told of a molecule.

    >>> print(prompt(Context("0:0", smiles="CCO", caption="An alcohol."), 3))
    SMILES: CCO
    Description: An alcohol.
    Write 3 turns.
    """
    lines = [f"SMILES: {context.smiles}"]
    if context.caption:
        lines.append(f"Description: {context.caption}")
    if context.iupac:
        lines.append(f"IUPAC name: {context.iupac}")
    if context.facts:
        lines.append("Computed: " + "; ".join(f"{k}: {v}" for k, v in context.facts.items()))
    return "\n".join([*lines, f"Write {turns} turns."])


def parse_reply(text: str) -> list[Turn]:
    """The turns of a reply, checked against the schema; a code fence around it is forgiven.

    Raises:
        ValueError: it is no JSON, or of another schema.

    >>> parse_reply('{"turns": [{"question": "What is it?", "answer": "An alcohol."}]}')
    [Turn(question='What is it?', answer='An alcohol.')]
    """
    pydantic = need("pydantic", extra=EXTRA, purpose=PURPOSE)
    bare = re.sub(r"^\s*```(?:json)?\s*|\s*```\s*$", "", text)
    try:
        found = _schema(pydantic).model_validate_json(bare)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "reply"
        raise ValueError(f"another schema: {where}: {first['msg']}") from error
    return [Turn(turn.question.strip(), turn.answer.strip()) for turn in found.turns]


def _schema(pydantic: Any) -> Any:
    strict = pydantic.ConfigDict(extra="forbid", strict=True)
    turn = pydantic.create_model("Turn", question=(str, ...), answer=(str, ...), __config__=strict)
    return pydantic.create_model("Reply", turns=(list[turn], ...), __config__=strict)


class _Run:
    """Some workers that share one iterator of molecules, one writer and one pace."""

    def __init__(
        self, writer: Writer, endpoint: Endpoint, turns: int, progress: Callable[[], None]
    ) -> None:
        self.openai = need("openai", extra=EXTRA, purpose=PURPOSE)
        self.writer, self.endpoint, self.turns, self.progress = writer, endpoint, turns, progress
        self.next_start = 0.0

    async def all(self, contexts: Iterator[Context]) -> None:
        """Ask about every molecule that is not done."""
        options = {"max_retries": self.endpoint.retries, "timeout": self.endpoint.timeout}
        async with self.openai.AsyncOpenAI(
            base_url=self.endpoint.url, api_key=self.endpoint.api_key, **options
        ) as client:
            workers = [self._work(client, contexts) for _ in range(self.endpoint.concurrency)]
            tasks = [asyncio.ensure_future(worker) for worker in workers]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    async def _work(self, client: Any, contexts: Iterator[Context]) -> None:
        for context in contexts:
            if context.key not in self.writer.done:
                await self._one(client, context)
            self.progress()

    async def _one(self, client: Any, context: Context) -> None:
        if context.reason:
            self.writer.drop(context, context.reason)
            return
        await self._pace()
        try:
            reply = await client.chat.completions.create(
                model=self.endpoint.model,
                messages=[
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": prompt(context, self.turns)},
                ],
                temperature=self.endpoint.temperature,
                max_tokens=self.endpoint.max_tokens,
            )
        except (
            self.openai.AuthenticationError,
            self.openai.PermissionDeniedError,
            self.openai.NotFoundError,
        ) as error:
            raise RuntimeError(
                f"{self.endpoint.url} refuses {self.endpoint.model}: {error}"
            ) from error
        except self.openai.OpenAIError:
            self.writer.written.failed += 1
            return
        self._judge(context, reply)

    def _judge(self, context: Context, reply: Any) -> None:
        choice = reply.choices[0] if reply.choices else None
        text = (choice.message.content or "") if choice is not None else ""
        if choice is not None and choice.finish_reason == "length":
            self.writer.drop(context, "cut off", text)
            return
        try:
            turns = parse_reply(text)
        except ValueError as error:
            self.writer.drop(context, str(error), text)
            return
        self.writer.keep(context, turns)

    async def _pace(self) -> None:
        """Waits until this request may begin: they begin at equal distances."""
        if self.endpoint.per_minute is None:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self.next_start)
        self.next_start = start + SECONDS_OF_A_MINUTE / self.endpoint.per_minute
        await asyncio.sleep(start - now)
