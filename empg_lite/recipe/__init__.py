"""Recipes: the schema, and the YAML files they are read from."""
