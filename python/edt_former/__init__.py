"""Molecules for frozen language models: encoders, connectors, prompts.

>>> import edt_former
>>> model = edt_former.load("edt_former")
>>> model.answer("c1ccccc1", "How many aromatic rings does the molecule have?")
['aromatic rings: 1']
"""

from edt_former.config import MoleculeConfig
from edt_former.model import MoleculeLM
from edt_former.processor import MoleculeProcessor
from edt_former.shipped import load

__all__ = ["MoleculeConfig", "MoleculeLM", "MoleculeProcessor", "load"]
