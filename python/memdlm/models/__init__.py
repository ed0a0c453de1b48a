"""Backbones of published masked diffusion language models, known to Hugging Face's Auto classes.

Importing this package lets `AutoModelForCausalLM.from_pretrained` load their checkpoints without
code from the hub.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from memdlm.models import llada, llada2, llada_moe
from memdlm.models.dream import DreamConfig, DreamModel
from memdlm.models.llada import LLaDAConfig, LLaDAModelLM
from memdlm.models.llada2 import LLaDA2MoeConfig, LLaDA2MoeModelLM
from memdlm.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM

__all__ = [
    "DreamConfig",
    "DreamModel",
    "LLaDA2MoeConfig",
    "LLaDA2MoeModelLM",
    "LLaDAConfig",
    "LLaDAMoEConfig",
    "LLaDAMoEModelLM",
    "LLaDAModelLM",
]

for _model in (LLaDAModelLM, LLaDAMoEModelLM, LLaDA2MoeModelLM, DreamModel):
    for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        _auto.register(_model.config_class, _model, exist_ok=True)
# LLaDAConfig stands for LLaDA-MoE too, which has the same model type.
for _config in (LLaDAConfig, LLaDA2MoeConfig, DreamConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
# By the name of the class, again because a model type may belong to two.
for _name, _family in (
    ("LLaDAModelLM", llada),
    ("LLaDAMoEModelLM", llada_moe),
    ("LLaDA2MoeModelLM", llada2),
):
    register_checkpoint_conversion_mapping(_name, _family.conversions(), overwrite=True)
