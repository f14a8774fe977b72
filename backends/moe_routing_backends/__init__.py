"""The built-in backends, one folder each.

They are found through entry points, as other people's backends are.
"""
