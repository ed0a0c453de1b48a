"""Writing with a masked diffusion model."""

from memdlm.sampler.aliases import sampler_config
from memdlm.sampler.config import SamplerConfig
from memdlm.sampler.denoise import Sampler, SamplerOutput
from memdlm.sampler.row import row_seeds

__all__ = ["Sampler", "SamplerConfig", "SamplerOutput", "row_seeds", "sampler_config"]
