"""What a memory written from a prompt holds: its weights, whose loss it lowers, what it recalls."""
