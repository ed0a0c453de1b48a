"""A masked language model of Hugging Face around the decoder."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.utils.generic import can_return_tuple

from memdlm.models.checkpoint import load_complete
from memdlm.models.config import DecoderConfig
from memdlm.models.decoder import Decoder, DenseFFN, Router


class MaskedLM(PreTrainedModel):
    """Logits for every position from tokens on both sides of it.

    Checkpoints are read and written under the published names of their tensors. New weights are
    drawn from a normal distribution with the config's standard deviation, whatever initialisation
    the config names.

    Raises:
        ValueError: the config asks for something that the model does not compute.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        config.check()
        self.model = Decoder(config, self.make_ffn)
        self.lm_head = nn.Linear(config.hidden_size, config.vocabulary_rows, bias=config.logit_bias)
        self.post_init()

    def make_ffn(self, layer: int) -> nn.Module:
        """The FFN of a layer; a dense one, where a family does not say otherwise."""
        config: Any = self.config
        return DenseFFN(config.hidden_size, config.intermediate_size, config.ffn_bias)

    def get_decoder(self) -> Decoder:
        return self.model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        is_causal: bool = False,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Compute logits.

        Args:
            input_ids: [B, L] int64, or give `inputs_embeds`.
            attention_mask: None, which is fastest; [B, L], 0 for padding; or [B, 1, L, L], True
                where query sees key, or additive.
            inputs_embeds: [B, L, D].
            position_ids: [1 or B, L] int64; None counts from 0.
            is_causal: must be false.
            use_cache: accepted and ignored: there is no cache.
            kwargs: other arguments that Hugging Face's callers pass, if None or false.

        Returns:
            Its `logits` are [B, L, V] in the model's dtype.

        Raises:
            ValueError: both or none of the inputs, `is_causal`, an argument that would be ignored.
        """
        for name, value in kwargs.items():
            if value is not None and value is not False:
                shape = getattr(value, "shape", None)
                got = repr(value) if shape is None else f"shape {tuple(shape)}"
                raise ValueError(
                    f"{name} must be left out: {type(self).__name__} does not read it, got {got}"
                )
        hidden = self.model(input_ids, attention_mask, inputs_embeds, position_ids, is_causal)
        return MaskedLMOutput(logits=self.lm_head(hidden))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's causal language model looks for this method, and calls it to generate."""
        raise NotImplementedError("the model fills masks, it does not generate token by token")

    @classmethod
    def can_generate(cls) -> bool:
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Hugging Face, but a checkpoint that does not fit is an error, not a warning.

        Raises:
            ValueError: tensors are missing, unknown or of another shape; lists the first few.
        """
        load = super().from_pretrained
        return load_complete(load, pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Hugging Face looks for the decorator of the experts in the file of the model; the experts
        # are its own, in another file.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Qwen3MoeExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=std)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)
