from memdlm_kernels.grouped_lora_linear.op import grouped_lora_linear

__all__ = ["grouped_lora_linear"]
