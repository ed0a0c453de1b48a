"""What the decoder asks of a config, and what a published config may not ask of the decoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig


class DecoderConfig(PreTrainedConfig):
    """A config under its published names, which `attribute_map` also gives Hugging Face's.

    Keys that nothing here reads are kept as they came. Some of them would change what the model
    computes: those are in `computed`, and another value is refused rather than ignored.

    Attributes:
        known_architectures: the names that published configs give the model; ours is the first.
        computed: published key to the values that the model computes; without the key, the first.
        right_shift_logits: whether the logits at position i predict token i + 1, not token i.
    """

    known_architectures: ClassVar[tuple[str, ...]] = ()
    computed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    right_shift_logits: ClassVar[bool] = False

    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.architectures is None:
            self.architectures = [self.known_architectures[0]]
        config: Any = self
        if not config.num_key_value_heads:
            config.num_key_value_heads = config.num_attention_heads
        self.check()

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        width = getattr(self, "head_dim", None)
        return width or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """How many of a head's elements are rotated; the others carry no position."""
        return int(self.head_width * getattr(self, "partial_rotary_factor", 1.0))

    @property
    def rotary_in_float32(self) -> bool:
        """Whether queries and keys are rotated in float32 where the model has less."""
        return False

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding and of the head."""
        return self.vocab_size

    @property
    def head_norm(self) -> bool:
        """Whether each head of the queries and keys is normed."""
        return False

    @property
    def query_key_value_bias(self) -> bool:
        """Whether the projections into the attention have a bias."""
        return False

    @property
    def attention_output_bias(self) -> bool:
        """Whether the projection out of the attention has a bias."""
        return False

    @property
    def ffn_bias(self) -> bool:
        """Whether the projections of the dense FFN have a bias."""
        return False

    @property
    def logit_bias(self) -> bool:
        """Whether the head has a bias."""
        return False

    def check(self) -> None:
        """Refuse what the model would not compute as the config says.

        Raises:
            ValueError: names the key, what it must be and what it is.
        """
        unknown = set(self.architectures or ()) - set(self.known_architectures)
        if unknown:
            self.refuse("architectures", " or ".join(self.known_architectures), self.architectures)
        for key, values in self.computed.items():
            value = getattr(self, key, values[0])
            if value not in values:
                self.refuse(key, " or ".join(map(repr, values)), value)
        rope = self.rope_scaling or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            self.refuse("rope_scaling", "null or of type 'default'", self.rope_scaling)
        heads = self.num_attention_heads
        if getattr(self, "head_dim", None) is None and self.hidden_size % heads:
            self.refuse(
                "hidden_size", f"a multiple of the {heads} attention heads", self.hidden_size
            )
        if heads % self.num_key_value_heads:
            self.refuse(
                "num_key_value_heads", f"a divisor of {heads} heads", self.num_key_value_heads
            )
        if not 0 < self.rotary_width <= self.head_width or self.rotary_width % 2:
            has_factor = hasattr(self, "partial_rotary_factor")
            key = "partial_rotary_factor" if has_factor else "num_attention_heads"
            self.refuse(
                key,
                f"such that an even part of a head's {self.head_width} elements is rotated",
                getattr(self, key),
            )

    def refuse(self, key: str, must_be: str, value: Any) -> None:
        """Raise the ValueError about a key, under its published name."""
        published = self.attribute_map.get(key, key)
        raise ValueError(f"{type(self).__name__}: {published} must be {must_be}, got {value!r}")
