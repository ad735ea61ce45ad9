"""`casc report`: one HTML page that tells how a run went."""
