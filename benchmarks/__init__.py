"""Measurements of speed and memory on whatever device is there."""
