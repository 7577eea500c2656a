"""Rows of a dataset: which one a score belongs to, and what tells it from others."""
