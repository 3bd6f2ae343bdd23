"""Measurements of speed and memory on the available device."""
