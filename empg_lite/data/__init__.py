"""Data sources: named data sets, local files, Reasoning Gym and the bundled problems."""
