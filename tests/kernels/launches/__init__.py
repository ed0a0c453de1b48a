"""For each op, `launch(dtype)`: its launchers called with the sizes that models have.

The tensors are fake and on a GPU. Between them the calls must reach every kernel and every choice
of block sizes; see `tests/kernels/ahead_of_time.py`.
"""
