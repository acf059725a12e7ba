"""The one script behind every figure of a GPU: `python -m bench.gpu`."""
