"""Typed configuration: the schema, its ranges, and errors of one line."""
