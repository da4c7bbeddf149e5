"""Chains (`aiflux chain`): steps over the rows of a table, each about the answers before it."""
