"""Teachers that are no model in this process: served by an endpoint, read from a cache, or several of them."""
