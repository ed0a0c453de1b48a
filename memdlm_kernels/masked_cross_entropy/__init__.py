from memdlm_kernels.masked_cross_entropy.op import masked_cross_entropy

__all__ = ["masked_cross_entropy"]
