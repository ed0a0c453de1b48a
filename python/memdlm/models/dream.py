"""Dream: the shape of Qwen2.5, with logits that predict the next position."""

from typing import ClassVar

from memdlm.models.config import DecoderConfig
from memdlm.models.masked_lm import MaskedLM


class DreamConfig(DecoderConfig):
    """Config of Dream; the defaults are Dream-v0-7B's."""

    model_type = "Dream"
    known_architectures = ("DreamModel",)
    computed: ClassVar = {
        "hidden_act": ("silu",),
        "use_mrope": (False,),
        "use_sliding_window": (False,),
    }
    right_shift_logits = True

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = False
    mask_token_id: int | None = 151666
    pad_token_id: int | None = 151643

    @property
    def query_key_value_bias(self) -> bool:
        return True


class DreamModel(MaskedLM):
    """Dream with its head. Its checkpoints have the names of the modules."""

    config_class = DreamConfig
