from memdlm_kernels.masked_linear_cross_entropy.op import masked_linear_cross_entropy

__all__ = ["masked_linear_cross_entropy"]
