"""Which launch serves how many tokens: launch tables, shipped, derived and measured on the user's device."""
