"""The built-in backends, one folder each, found through the same entry points as everybody else's."""
