"""Transforms for environments of any library: DMC-Subtle, Distracting Control and the adversarial patch."""
