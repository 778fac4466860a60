"""What every environment of ours stands on: the simulator's contract, errors, OpenGL, a check."""
