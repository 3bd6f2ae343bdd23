"""Pretraining: state, optimiser, the sharded step, the loop, checkpoints, what is logged."""
