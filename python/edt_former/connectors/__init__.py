"""Connectors: atom features in, tokens of a language model or adapters for it out."""

from edt_former.connectors.bert import load_bert
from edt_former.connectors.connector import (
    Connector,
    MoleculeAdapters,
    MoleculeTokens,
    make_connector,
    register_connector,
)
from edt_former.connectors.edt_former import EDTFormer, EDTFormerConfig
from edt_former.connectors.llamo import LLaMo, LLaMoConfig
from edt_former.connectors.mora import MoRA, MoRAConfig
from edt_former.connectors.published import PublishedEDTFormer, PublishedEDTFormerConfig
from edt_former.connectors.qformer import QFormer, QFormerConfig, QueryTransformer

__all__ = [
    "Connector",
    "EDTFormer",
    "EDTFormerConfig",
    "LLaMo",
    "LLaMoConfig",
    "MoRA",
    "MoRAConfig",
    "MoleculeAdapters",
    "MoleculeTokens",
    "PublishedEDTFormer",
    "PublishedEDTFormerConfig",
    "QFormer",
    "QFormerConfig",
    "QueryTransformer",
    "load_bert",
    "make_connector",
    "register_connector",
]
