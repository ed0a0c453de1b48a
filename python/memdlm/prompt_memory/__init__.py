"""A memory of the prompt: the inner loop run over prompts, one set of fast weights for each."""

from memdlm.prompt_memory.memory import PromptMemory
from memdlm.prompt_memory.trace import PromptTrace

__all__ = ["PromptMemory", "PromptTrace"]
