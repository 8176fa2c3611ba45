"""Training: pairs of frames from recordings, losses, the training loop, calibrated uncertainty."""
