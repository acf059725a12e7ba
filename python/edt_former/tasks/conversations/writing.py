"""Conversations on disk: one per line, beside those that were dropped, and again where it ended."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from edt_former.language.frozen import write_json
from edt_former.tasks.conversations.context import Context
from edt_former.tasks.conversations.judging import Turn, objection
from edt_former.tasks.conversations.templates import template_turns


@dataclass
class Written:
    """What came of a run: conversations kept, and why others were dropped.

    Attributes:
        kept: in the file, those of earlier runs among them.
        dropped: by reason, in its first words.
        failed: the endpoint gave no answer; the same call tries them again.
    """

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    failed: int = 0


class Writer:
    """Appends conversations to `out`, and to `out`.dropped.jsonl what is dropped, with reasons.

    Every line is whole or, after a kill, cut off and written again. Rows that are in either file
    are done.

    Args:
        out: ends in .jsonl.
        settings: of the run; a file with others is not gone on with.

    Raises:
        ValueError: another suffix, or `out` has conversations of another run.
    """

    def __init__(self, out: Path | str, settings: Mapping[str, Any]) -> None:
        self.out = Path(out)
        if self.out.suffix != ".jsonl":
            raise ValueError(f"out must end in .jsonl, got {self.out}")
        self.dropped = self.out.with_suffix(".dropped.jsonl")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        _same_settings(self.out.with_suffix(".settings.json"), settings, self.out)
        self.written = Written()
        self.done: set[str] = set()
        for line in _whole_lines(self.out):
            self.done.add(line["key"])
            self.written.kept += 1
        for line in _whole_lines(self.dropped):
            self.done.add(line["key"])
            self.written.dropped[_kind(line["reason"])] += 1

    def __enter__(self) -> Writer:
        self._kept, self._dropped = self._open(self.out), self._open(self.dropped)
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()
        self._dropped.close()

    def keep(self, context: Context, turns: Sequence[Turn]) -> None:
        """Appends a conversation, or the reason against it."""
        if reason := context.reason or objection(context, turns):
            self.drop(context, reason, turns)
            return
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        line = {"key": context.key, "id": context.id or context.key, "smiles": context.smiles}
        _append(self._kept, {**line, "messages": messages})
        self.written.kept += 1

    def drop(self, context: Context, reason: str, said: Any = None) -> None:
        """Appends the reason why a row has no conversation, and what was said."""
        line = {"key": context.key, "id": context.id, "reason": reason, "said": said}
        _append(self._dropped, line)
        self.written.dropped[_kind(reason)] += 1

    def _open(self, path: Path) -> TextIO:
        return path.open("a", encoding="utf-8")


def write_from_templates(
    contexts: Iterable[Context],
    out: Path | str,
    *,
    turns: int = 4,
    seed: int = 0,
    origin: Sequence[str] = (),
) -> Written:
    """Writes a conversation from templates about every molecule; see `template_turns`.

    Args:
        contexts: in order.
        out: a .jsonl file that `edt_former.data.prepare` reads.
        turns: questions of a conversation.
        seed: of what is drawn.
        origin: what the contexts were read from; `out` is not gone on with from elsewhere.

    Raises:
        ValueError: see `Writer`.
    """
    settings = {"by": "templates", "turns": turns, "seed": seed, "origin": list(origin)}
    with Writer(out, settings) as writer:
        for context in contexts:
            if context.key not in writer.done:
                told = [] if context.reason else template_turns(context, turns=turns, seed=seed)
                writer.keep(context, told)
    return writer.written


def _same_settings(file: Path, settings: Mapping[str, Any], out: Path) -> None:
    if not file.exists():
        write_json(file, dict(settings))
        return
    found = json.loads(file.read_text())
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing:
        raise ValueError(
            f"{out} has conversations of another run, which differs in {', '.join(differing)}; "
            "take another file or remove that one"
        )


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of a file; one that a kill has cut off is removed from it."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _append(file: TextIO, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def _kind(reason: str) -> str:
    """A reason without what is particular, to count by."""
    return reason.partition(":")[0]
