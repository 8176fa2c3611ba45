"""What other people's software calls."""
