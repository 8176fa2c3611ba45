"""Training: pairs of frames out of recordings, losses, the training loop, baselines and their measures."""
