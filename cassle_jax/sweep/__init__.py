"""Pretrains one configuration with many values, and shows the runs side by side."""
