"""What everything else may import: carriers, errors, text that is safe to print, statistics."""
