"""Which launch serves how many tokens.

Launch tables, shipped, derived and measured on the user's device.
"""
