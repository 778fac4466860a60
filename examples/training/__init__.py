"""What a training run is made of, and what reads one."""
