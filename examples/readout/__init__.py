"""What latents.py is made of."""
