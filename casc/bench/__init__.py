"""How fast each part is here, beside the usual way of doing it: `casc bench`."""
