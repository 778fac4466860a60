"""What the timings are compared with."""
