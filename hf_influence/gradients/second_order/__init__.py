"""What curvature is taken from the model itself: Hessian products and eigenpairs, Kronecker factors, Adam's state."""
