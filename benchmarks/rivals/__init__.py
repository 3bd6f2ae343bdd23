"""Alternatives to this project, written as their users would write them; need extra packages."""
