"""Check this service's access tokens offline. Needs nothing of the server."""
