"""The worker: it runs next to the engines, sends the requests and records the results."""
