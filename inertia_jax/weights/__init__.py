"""Files of weights, read without what wrote them, and the weights in them."""
