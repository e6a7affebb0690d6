"""What single units do: specialization, explanations, leakage through masks, and sparsity; tables and records."""
