"""General helpers that know nothing of AI-Flux: files, lines, text, times, leases, YAML."""
