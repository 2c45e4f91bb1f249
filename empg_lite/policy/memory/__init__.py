"""What a policy takes: memory before it is loaded, and where the time of a run went."""
