"""What attack.py and saliency.py are made of."""
