"""What a plan will do, second by second, and the picture of it; the same picture of a recorded run."""
