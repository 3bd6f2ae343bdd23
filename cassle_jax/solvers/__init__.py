"""Solvers: convex fits of frozen features, each to its one optimum."""
