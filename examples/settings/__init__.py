"""What each setting may be."""
