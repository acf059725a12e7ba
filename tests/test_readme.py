"""The README's Python examples run as printed, a small language model in the place of yours."""

import doctest
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import edt_kernels
from edt_former import shipped
from edt_former.tasks.questions import FACTS
from edt_former.train.tiny.vocabulary import build_tokenizer
from edt_kernels import build_info

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SESSIONS = re.findall(r"```pycon\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def causal_lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal-lm")
    tokenizer = build_tokenizer(FACTS)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_block_runs(block, causal_lm, tmp_path, monkeypatch):
    if "edt_former" in block and not (shipped.folder() / "manifest.json").exists():
        pytest.skip("the shipped models are not in this checkout")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block.replace("path/to/any/causal-lm", causal_lm.as_posix()), names)
    if "model.answer(" in block:
        asked = re.search(r"^model\.answer\(.*\)$", block, flags=re.MULTILINE).group()
        assert repr(eval(asked, names)) in block


@pytest.mark.parametrize("number", range(len(SESSIONS)))
def test_session_gives_what_it_shows(number):
    test = doctest.DocTestParser().get_doctest(SESSIONS[number], {}, f"session {number}", None, 0)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_every_op_is_shown():
    shown = "".join(SESSIONS)
    ops = [name for name in edt_kernels.__all__ if name in build_info()["ops"]]
    assert len(ops) > 8 and all(f"ek.{name}(" in shown for name in ops)
