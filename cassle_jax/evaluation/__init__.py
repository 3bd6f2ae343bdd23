"""Measures what frozen features know: pure functions of arrays, one file per protocol."""
