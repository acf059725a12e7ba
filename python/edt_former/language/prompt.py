"""Prompts: where a molecule stands in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


def plain_prompt(question: str, *, molecules: int = 1, mol_token: str = "<mol>") -> str:
    """The prompt of a model without a chat template: molecules first, then the question.

    >>> plain_prompt("How many rings does it have?")
    '<mol> question: How many rings does it have? answer:'
    """
    return " ".join([mol_token] * molecules + [f"question: {question} answer:"])


def ask(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    molecules: int = 1,
    mol_token: str = "<mol>",
) -> str:
    """The prompt that asks one question: a user's turn where the tokenizer has a chat template.

    A question that holds `<mol>` itself keeps its molecules where they are; else they stand first.

    Raises:
        ValueError: the question holds `<mol>`, but not `molecules` times.

    >>> from tokenizers import Tokenizer
    >>> from tokenizers.models import WordLevel
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))
    >>> ask(tokenizer, "Is <mol> larger than <mol>?", molecules=2)
    'question: Is <mol> larger than <mol>? answer:'
    >>> tokenizer.chat_template = "User: {{ messages[0].content }} Assistant:"
    >>> ask(tokenizer, "Is it a drug?")
    'User: <mol> Is it a drug? Assistant:'
    """
    marked = question.count(mol_token)
    if marked not in (0, molecules):
        raise ValueError(
            f"question must hold {mol_token} {molecules} times, once per molecule, or never, "
            f"got {marked} times"
        )
    if tokenizer.chat_template is None:
        return plain_prompt(question, molecules=molecules - marked, mol_token=mol_token)
    content = " ".join([mol_token] * (molecules - marked) + [question])
    return render(tokenizer, [{"role": "user", "content": content}], mol_token=mol_token)[0]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    mol_token: str = "<mol>",
    add_generation_prompt: bool = True,
) -> tuple[str, list[Any]]:
    """The text of a conversation, and its molecules in their order.

    Without a chat template the contents are joined by a space, and roles are left out.

    Args:
        tokenizer: its chat template is used.
        messages: `{"role": ..., "content": ...}` each, the content a text with `<mol>` in it, or a
            list of `{"type": "text", "text": ...}` and `{"type": "molecule", "molecule": ...}`
            items. A molecule item without "molecule" is a bare mark.
        add_generation_prompt: end where the model's answer begins.

    Raises:
        ValueError: an item of another type.

    >>> from tokenizers import Tokenizer
    >>> from tokenizers.models import WordLevel
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))
    >>> tokenizer.chat_template = "User: {{ messages[0].content }} Assistant:"
    >>> ethanol = {"type": "molecule", "molecule": "CCO"}
    >>> question = {"type": "text", "text": "Is it a drug?"}
    >>> render(tokenizer, [{"role": "user", "content": [ethanol, question]}])
    ('User: <mol> Is it a drug? Assistant:', ['CCO'])
    """
    molecules: list[Any] = []
    flat = [
        {**message, "content": _flatten(message["content"], mol_token, molecules)}
        for message in messages
    ]
    if tokenizer.chat_template is None:
        return " ".join(message["content"] for message in flat), molecules
    text = tokenizer.apply_chat_template(
        flat, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text, molecules


def conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    molecules: int = 0,
    mol_token: str = "<mol>",
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a whole conversation, and the characters in it that the model is to say.

    What the assistant says is learned with what ends its turn. Without a chat template turns stand
    one after another as `plain_prompt` has them, an end-of-sequence token behind every answer. A
    conversation that never mentions its molecules has them before its first question.

    Args:
        tokenizer: its chat template is used.
        messages: see `render`.
        molecules: how many there are.
        mol_token: marks one.

    Raises:
        ValueError: the messages hold `mol_token`, but not `molecules` times; or the chat template
            writes a turn otherwise once another follows, so that it cannot be told apart.

    >>> from tokenizers import Tokenizer
    >>> from tokenizers.models import WordLevel
    >>> from transformers import PreTrainedTokenizerFast
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()), eos_token="#")
    >>> asked = {"role": "user", "content": "Rings?"}, {"role": "assistant", "content": "two"}
    >>> text, spans = conversation(tokenizer, asked, molecules=1)
    >>> text, [text[start:stop] for start, stop in spans]
    ('<mol> question: Rings? answer: two#', [' two#'])
    """
    turns = [{**m, "content": _flatten(m["content"], mol_token, [])} for m in messages]
    marks = sum(turn["content"].count(mol_token) for turn in turns)
    if marks not in (0, molecules):
        raise ValueError(
            f"messages must hold {mol_token} {molecules} times, once per molecule, or never, "
            f"got {marks} times"
        )
    lead = [mol_token] * (molecules - marks)
    if tokenizer.chat_template is None:
        return _plain_conversation(turns, lead, tokenizer.eos_token or "")
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if lead and first is not None:
        first["content"] = " ".join([*lead, first["content"]])
    text, spans = "", []
    for count, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _templated(tokenizer, turns[:count], True)
        after = _templated(tokenizer, turns[: count + 1], False)
        if not (before.startswith(text) and after.startswith(before)):
            raise ValueError(
                "the tokenizer's chat template must write a turn alike whatever follows, it does "
                f"not: {before[-40:]!r} and {after[len(before) - 40 : len(before)]!r}"
            )
        spans.append((len(before), len(after)))
        text = after
    return text, spans


def _templated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], generate: bool) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate)


def _plain_conversation(
    turns: Sequence[Message], lead: Sequence[str], end: str
) -> tuple[str, list[tuple[int, int]]]:
    text, spans = " ".join(lead), []
    for turn in turns:
        content, apart = turn["content"], " " if text else ""
        if turn["role"] == "assistant":
            spans.append((len(text), len(text) + len(apart) + len(content) + len(end)))
            text += f"{apart}{content}{end}"
        else:
            asked = f"question: {content} answer:" if turn["role"] == "user" else content
            text += f"{apart}{asked}"
    return text, spans


def _flatten(content: str | Sequence[dict[str, Any]], mol_token: str, molecules: list[Any]) -> str:
    """Text of one message's content; its molecules are appended to `molecules`."""
    if isinstance(content, str):
        return content
    pieces = []
    for item in content:
        if item["type"] == "text":
            pieces.append(item["text"])
        elif item["type"] == "molecule":
            pieces.append(mol_token)
            if "molecule" in item:
                molecules.append(item["molecule"])
        else:
            raise ValueError(f"type must be 'text' or 'molecule', got {item['type']!r}")
    return " ".join(pieces)
