"""The language model's side: stock and frozen models, prompts."""

from edt_former.language.frozen import (
    content_hash,
    input_scale,
    load_part,
    read_weights,
    save_part,
)
from edt_former.language.instance_adapters import InstanceAdapters
from edt_former.language.prompt import ask, plain_prompt, render
from edt_former.language.sites import connector_options, find_sites

__all__ = [
    "InstanceAdapters",
    "ask",
    "connector_options",
    "content_hash",
    "find_sites",
    "input_scale",
    "load_part",
    "plain_prompt",
    "read_weights",
    "render",
    "save_part",
]
