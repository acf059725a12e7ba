"""The language model's side: stock and frozen models, prompts."""

from edt_former.language.frozen import (
    content_hash,
    input_scale,
    load_part,
    read_weights,
    save_part,
)
from edt_former.language.prompt import ask, plain_prompt, render

__all__ = [
    "ask",
    "content_hash",
    "input_scale",
    "load_part",
    "plain_prompt",
    "read_weights",
    "render",
    "save_part",
]
