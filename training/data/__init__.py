"""Rows: read, checked, split, built, grounded on the live index, and turned into tokens."""
