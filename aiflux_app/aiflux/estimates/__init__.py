"""Estimate what a run will take from a pilot run, and measure which settings are fastest."""
