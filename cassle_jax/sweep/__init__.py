"""Sweeps and tables: pretrains many variants of a configuration and compares the runs."""
