"""Engines: what starts and describes them, and the HTTP exchange with one."""
