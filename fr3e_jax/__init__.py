"""FR3E (First Return, Entropy-Eliciting Explore, arXiv 2507.07017) in JAX, for Qwen2.5."""
