from memdlm_kernels.fast_weight_sgd.op import fast_weight_sgd, fast_weight_sgd_

__all__ = ["fast_weight_sgd", "fast_weight_sgd_"]
