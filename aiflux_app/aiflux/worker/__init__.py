"""What runs beside the engine: engines, client, pool of requests in flight, main."""
