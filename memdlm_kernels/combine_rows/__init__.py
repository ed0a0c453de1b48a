from memdlm_kernels.combine_rows.op import combine_rows, spread_rows

__all__ = ["combine_rows", "spread_rows"]
