"""Tasks: what is asked about molecules, and how answers are judged."""
