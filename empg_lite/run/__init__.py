"""A run on disk: the only package that writes."""
