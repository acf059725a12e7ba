"""The `edt` command."""
