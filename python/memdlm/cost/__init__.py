"""What one training step costs, from shapes alone: products, memory, and what would save some."""
