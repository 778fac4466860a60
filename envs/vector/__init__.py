"""Stepping many environments at once."""
