"""Multi-turn conversations about molecules: from templates, from any endpoint, and their review."""

from edt_former.tasks.conversations.context import Context, read_contexts
from edt_former.tasks.conversations.endpoint import Endpoint, generate
from edt_former.tasks.conversations.judging import Turn, objection
from edt_former.tasks.conversations.review import RUBRIC, draw_sample, score_sample
from edt_former.tasks.conversations.templates import template_turns
from edt_former.tasks.conversations.writing import Written, write_from_templates

__all__ = [
    "RUBRIC",
    "Context",
    "Endpoint",
    "Turn",
    "Written",
    "draw_sample",
    "generate",
    "objection",
    "read_contexts",
    "score_sample",
    "template_turns",
    "write_from_templates",
]
