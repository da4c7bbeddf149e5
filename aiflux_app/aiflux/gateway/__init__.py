"""OpenAI's Files and Batches API over runs: a small server for one user, whose state is files."""
