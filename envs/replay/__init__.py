"""Records of experience, and what keeps them."""
