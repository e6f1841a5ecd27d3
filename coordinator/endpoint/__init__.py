"""The endpoint: vLLM's OpenAI front over the cluster. Stateless, so that there can be many."""
