"""Curves and intervals."""
