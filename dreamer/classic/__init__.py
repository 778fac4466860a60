"""The agents and networks of Dreamer V1 and V2."""
