"""Inference engines: the interface, the kinds, and the HTTP exchange with a server."""
