"""A trained detector, and what it finds in images."""
