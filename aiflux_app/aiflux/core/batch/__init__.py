"""The batch format: request lines, whole input files and results files."""
