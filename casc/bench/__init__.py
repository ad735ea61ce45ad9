"""How fast this machine trains, detects and loads: `casc bench`."""
