"""Pretraining: state, optimiser, the sharded step, the loop, checkpoints, and logs."""
