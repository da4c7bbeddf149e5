"""Measure AI-Flux's share of what a real engine does on a real GPU."""
