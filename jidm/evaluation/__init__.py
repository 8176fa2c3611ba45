"""How well models decode recordings: metrics, corrupted video, ground truth, tables."""
