"""One file per kind of reward; ``registry.py`` lists them."""
