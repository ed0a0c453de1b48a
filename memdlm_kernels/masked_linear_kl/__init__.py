from memdlm_kernels.masked_linear_kl.op import masked_linear_kl

__all__ = ["masked_linear_kl"]
