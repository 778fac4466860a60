"""Layers, encoders, decoders and heads."""
