"""Rows -> tokens -> Ray Train + DeepSpeed -> adapter -> registry. Never imports serving: their contract is the registry."""
