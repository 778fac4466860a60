"""One file for each representation objective; base.py holds their interface."""
