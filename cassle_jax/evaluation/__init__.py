"""Measures what frozen features know: pure functions of arrays, one file for each protocol."""
