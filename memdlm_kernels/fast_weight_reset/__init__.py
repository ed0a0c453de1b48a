from memdlm_kernels.fast_weight_reset.op import fast_weight_reset_

__all__ = ["fast_weight_reset_"]
