"""The fallback's special forms on a CPU: the MLP, the loss's logits, and one row at a time."""
