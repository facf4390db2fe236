"""vLLM as a rollout engine: on servers, or in this process."""
