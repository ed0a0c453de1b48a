from memdlm_kernels.grouped_linear.op import grouped_linear

__all__ = ["grouped_linear"]
