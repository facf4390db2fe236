"""vLLM's servers over HTTP, for whoever samples or scores on them."""
