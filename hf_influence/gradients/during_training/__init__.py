"""Rows out of the passes that a training loop makes: whose they are, and by how much the loop has scaled them."""
