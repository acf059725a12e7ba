"""The model layer: molecules as tokens for a frozen language model."""
