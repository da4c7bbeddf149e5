"""What vLLM's own Python imports; its modules import nothing of AI-Flux."""
