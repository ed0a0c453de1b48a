from memdlm_kernels.lora_linear.op import lora_linear

__all__ = ["lora_linear"]
