"""Grids of short training runs, and what each option changes."""
