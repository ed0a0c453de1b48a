"""What the first-order short cut changes in the outer gradient, beside the exact one."""
