"""Bridges to neighbours: Hugging Face's Q-Formers here, PyTorch Geometric in `compat.pyg`."""

from edt_former.compat.qformer import RaggedQFormer, accelerate_qformer

__all__ = ["RaggedQFormer", "accelerate_qformer"]
