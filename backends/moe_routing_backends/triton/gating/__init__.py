"""``gate``: the products of slices, and what adds and routes them."""
