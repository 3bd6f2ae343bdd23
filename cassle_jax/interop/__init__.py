"""Weights of other frameworks and formats, in and out."""
