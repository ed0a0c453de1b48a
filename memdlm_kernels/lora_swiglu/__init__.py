from memdlm_kernels.lora_swiglu.op import lora_swiglu

__all__ = ["lora_swiglu"]
