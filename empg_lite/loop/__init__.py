"""Sample, score, weigh, fit, record."""
