"""Looking at a Program: what was quantized, what was not, and why."""
