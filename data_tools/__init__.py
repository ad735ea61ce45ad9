"""Data sets for casc: sharding, checking, generating and looking at them."""
