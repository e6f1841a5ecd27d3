"""Real vLLM engines under load: ours, and vLLM as it ships, on the same cores with the same client."""
