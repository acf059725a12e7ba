"""What a run shows: measurements, tables, pictures."""
