"""What users would pick instead, written as they would write it; each needs its own packages."""
