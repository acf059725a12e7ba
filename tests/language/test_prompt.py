from __future__ import annotations

from types import SimpleNamespace

import pytest

from edt_former.language import ask, plain_prompt, render


class Tokenizer(SimpleNamespace):
    """A tokenizer with a chat template, as far as prompts go."""

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        turns = [f"[{m['role']}] {m['content']}" for m in messages]
        return "\n".join(turns + ["[assistant]"] * add_generation_prompt)


PLAIN, CHAT = Tokenizer(chat_template=None), Tokenizer(chat_template="...")


def test_the_plain_prompt_puts_molecules_first():
    assert plain_prompt("How many?") == "<mol> question: How many? answer:"
    assert plain_prompt("How many?", molecules=2) == "<mol> <mol> question: How many? answer:"
    assert plain_prompt("How many?", molecules=0) == "question: How many? answer:"


def test_a_question_goes_into_the_chat_template_where_there_is_one():
    assert ask(PLAIN, "How many?") == plain_prompt("How many?")
    assert ask(CHAT, "How many?") == "[user] <mol> How many?\n[assistant]"


def test_a_question_may_place_its_molecules_itself():
    question = "Is <mol> larger than <mol>?"
    assert ask(CHAT, question, molecules=2) == f"[user] {question}\n[assistant]"
    assert ask(PLAIN, question, molecules=2) == f"question: {question} answer:"
    with pytest.raises(ValueError, match=r"must hold <mol> 3 times.*got 2 times"):
        ask(CHAT, question, molecules=3)


def test_molecules_of_a_conversation_come_in_their_order():
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "molecule", "molecule": "CCO"},
                {"type": "text", "text": "or"},
                {"type": "molecule", "molecule": "C"},
            ],
        },
    ]
    text, molecules = render(CHAT, messages, add_generation_prompt=False)
    assert text == "[system] Be brief.\n[user] <mol> or <mol>"
    assert molecules == ["CCO", "C"]
    assert render(PLAIN, messages)[0] == "Be brief. <mol> or <mol>"


def test_a_bare_molecule_item_is_a_mark_and_other_items_are_errors():
    bare = [{"role": "user", "content": [{"type": "molecule"}]}]
    assert render(PLAIN, bare) == ("<mol>", [])
    with pytest.raises(ValueError, match="type must be 'text' or 'molecule', got 'image'"):
        render(PLAIN, [{"role": "user", "content": [{"type": "image"}]}])
