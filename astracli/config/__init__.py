"""Recipes: schema, tables, loading."""
