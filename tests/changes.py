"""Applies the changes that a document shows to a copy of the package."""

import shutil
import subprocess

import pytest


def apply_change(change, folder):
    """Applies a diff below a folder; skips the test where git, which reads it, is missing."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    subprocess.run(["git", "apply", "-"], input=change, text=True, cwd=folder, check=True)
