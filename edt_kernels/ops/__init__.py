"""One file per op: contract, schema, registration, gradients."""
