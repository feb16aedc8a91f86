"""What is fast and how fast: every bench prints a table and writes the same rows as JSON."""
