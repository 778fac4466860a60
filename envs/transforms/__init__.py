"""Transforms for environments of any library: DMC-Subtle and the adversarial patch."""
