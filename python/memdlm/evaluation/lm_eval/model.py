"""The model "memdlm" of lm-evaluation-harness."""

import collections
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from memdlm.evaluation.held_out import no_memory
from memdlm.evaluation.likelihood import DRAWS, LogLikelihood, response_log_likelihood
from memdlm.evaluation.lm_eval.arguments import request_config
from memdlm.inference import load_checkpoint
from memdlm.prompt_memory import PromptMemory
from memdlm.sampler import Sampler, SamplerConfig

logger = logging.getLogger(__name__)

# Tasks set these for every request: a model argument would not be read.
OF_THE_TASK = ("max_new_tokens", "temperature", "gen_length")


class NoPromptError(ValueError):
    """A task of texts without a prompt, which have nothing to write a memory from."""


@register_model("memdlm")
class MemDLM(TemplateLM):
    """A masked diffusion language model for lm-evaluation-harness.

    `loglikelihood` is LLaDA's Monte-Carlo bound, `generate_until` the sampler. A context that is
    too long loses its first tokens, which is logged.

    Args:
        pretrained: as for `load_checkpoint`.
        dtype, load_in_4bit: likewise.
        device: where the model goes; None for the first GPU if there is one. Without any GPU
            "cuda" is the CPU, since the harness's command line always asks for "cuda:0".
        batch_size: requests of a batch, at least 1.
        draws, seed: of the bound and the sampler, as for `response_log_likelihood`.
        memory: write a memory from the context of each request, and read it.
        budget_gib: as for `PromptMemory`; only with `memory`.
        check_greedy: tell whether a continuation is what greedy decoding gives, one token in each
            step, the surest first. As many steps as tokens; a few metrics read it, such as
            LAMBADA's accuracy. False answers "no" every time, as LLaDA's evaluation does.
        max_gen_toks: new tokens where a task does not say.
        options: of the sampler, under any name that `sampler_config` knows.

    Raises:
        ValueError: what cannot be loaded, a value outside its range, an unknown option, or one
            that nothing would read.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        load_in_4bit: bool = False,
        batch_size: int = 1,
        draws: int = DRAWS,
        seed: int = 0,
        memory: bool = False,
        budget_gib: float | None = None,
        check_greedy: bool = False,
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) and not str(batch_size).isdecimal():
            raise ValueError(f"batch_size must be a whole number, got {batch_size!r}")
        if int(batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if draws < 1 or (draws > 1 and draws % 2):
            raise ValueError(f"draws must be 1 or an even number, got {draws}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if budget_gib is not None and not memory:
            raise ValueError("budget_gib would not be read: memory is not true")
        for name in OF_THE_TASK:
            if name in options:
                raise ValueError(
                    f"{name} must not be an argument of the model, every task sets its own: give "
                    "it as a generation argument (--gen_kwargs)"
                )
        # That a value is in its range shows now; what reads it depends on the task.
        request_config({"temperature": 1.0} if _needs_temperature(options) else {}, options, 256)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            logger.warning("no GPU: the model is on the CPU, in place of %s", device)
            device = "cpu"
        checkpoint = load_checkpoint(
            pretrained, dtype=dtype, device=device, load_in_4bit=load_in_4bit
        )
        self.checkpoint = checkpoint
        self.tokenizer: Any = checkpoint.tokenizer
        self.batch_size = int(batch_size)
        self.draws = draws
        self.seed = seed
        self.check_greedy = check_greedy
        self.max_gen_toks = max_gen_toks
        self.options = options
        self.sampler = Sampler.of(checkpoint)
        self._device = checkpoint.device
        self.memory = (
            PromptMemory.of(checkpoint, seed=seed, budget_gib=budget_gib) if memory else None
        )
        self.adapt = no_memory if self.memory is None else self.memory.adapt

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = self.checkpoint.end_token_ids
        return ends[0] if ends else self.checkpoint.pad_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Positions that the model has."""
        return self.checkpoint.max_length

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside the arguments."""
        config = self.checkpoint.model.config
        return {
            "model_type": config.model_type,
            "model_dtype": str(self.checkpoint.model.dtype),
            "model_num_parameters": sum(p.numel() for p in self.checkpoint.model.parameters()),
            "mask_token_id": self.checkpoint.mask_token_id,
            "memory": self.memory is not None,
            "draws": self.draws,
            "seed": self.seed,
            "sampler": self.options,
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text of a prompt.

        Args:
            chat_history: "role" and "content" of each message.
            add_generation_prompt: end where the assistant begins; False goes on with its message.

        Returns:
            The text.
        """
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Text to token ids.

        Args:
            string: the text.
            add_special_tokens: those that the tokenizer adds; None for all but a second first one,
                where the text (of a chat template) has it already.
            kwargs: for the tokenizer.

        Returns:
            Token ids.
        """
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = begin is None or not string.startswith(begin)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        responses = [response for _, _, response in requests]
        prompts = self._shortened([prompt for _, prompt, _ in requests], list(map(len, responses)))
        greedy = [False] * len(requests)

        def keep(numbers: Sequence[int], found: LogLikelihood) -> None:
            if self.check_greedy:
                own = self._are_greedy(
                    [prompts[i] for i in numbers], [responses[i] for i in numbers]
                )
                for i, is_greedy in zip(numbers, own, strict=True):
                    greedy[i] = is_greedy
            for i, value in zip(numbers, found.mean.tolist(), strict=True):
                self.cache_hook.add_partial("loglikelihood", requests[i][0], (value, greedy[i]))

        found = response_log_likelihood(
            self.checkpoint.model,
            prompts,
            responses,
            **self._likelihood_options(),
            adapt=self.adapt,
            title="loglikelihood",
            on_batch=keep,
        )
        return list(zip(found.mean.tolist(), greedy, strict=True))

    def _are_greedy(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[bool]:
        mask = self.checkpoint.mask_token_id
        canvases = [
            [*prompt, *[mask] * len(response)]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        with self.adapt(prompts):
            filled = self.sampler.infill(canvases, SamplerConfig()).responses
        return [
            tokens[len(prompt) :] == list(response)
            for tokens, prompt, response in zip(filled, prompts, responses, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Bounds on the log-likelihood of whole texts.

        A text longer than the model's positions is cut into windows without overlap; a window sees
        nothing of those before it. There is no prompt, so there is no memory to write.

        Args:
            requests: instances whose arguments are (text,).
            disable_tqdm: not read, the bar is shown.

        Returns:
            Nats of each text.

        Raises:
            NoPromptError: the memory is on.
        """
        if self.memory is not None:
            raise NoPromptError(
                "memory must be false for tasks of rolling log-likelihood: a text without a prompt "
                "has nothing to write a memory from"
            )
        texts = [self.tok_encode(request.args[0]) for request in requests]
        windows = [
            (number, tokens[first : first + self.max_length])
            for number, tokens in enumerate(texts)
            for first in range(0, len(tokens), self.max_length)
        ]
        found = response_log_likelihood(
            self.checkpoint.model,
            [[] for _ in windows],
            [tokens for _, tokens in windows],
            **self._likelihood_options(),
            title="loglikelihood_rolling",
        )
        totals = [0.0] * len(requests)
        for (number, _), value in zip(windows, found.mean.tolist(), strict=True):
            totals[number] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _likelihood_options(self) -> dict[str, Any]:
        return {
            "mask_token_id": self.checkpoint.mask_token_id,
            "pad_token_id": self.checkpoint.pad_token_id,
            "block_size": self.sampler.block_size,
            "draws": self.draws,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers to prompts.

        Args:
            requests: instances whose arguments are (context, generation arguments). Of those,
                `until`, `do_sample`, `temperature` and `max_gen_toks` are the harness's; the
                others must be options of the sampler.
            disable_tqdm: show no bar.

        Returns:
            The text of each answer, cut before the first of its `until`.

        Raises:
            ValueError: a generation argument that is unknown, outside its range, or read by
                nothing; too many new tokens for the model's positions.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(number)
        configs = {
            key: request_config(
                requests[own[0]].args[1],
                {"seed": self.seed, **self.options},
                self.max_gen_toks,
            )
            for key, own in groups.items()
        }
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for key, own in groups.items():
                config = configs[key]
                encoded = [self.tok_encode(requests[number].args[0]) for number in own]
                prompts = dict(
                    zip(
                        own,
                        self._shortened(encoded, [config.max_new_tokens] * len(own)),
                        strict=True,
                    )
                )
                seeds = dict(zip(own, _seeds(config.seed, list(prompts.values())), strict=True))
                # The longest first: what does not fit in memory fails at once.
                order = sorted(own, key=lambda number: -len(prompts[number]))
                for first in range(0, len(order), self.batch_size):
                    chosen = order[first : first + self.batch_size]
                    batch = [prompts[number] for number in chosen]
                    with self.adapt(batch):
                        output = self.sampler.generate(
                            batch, config, seeds=[seeds[number] for number in chosen]
                        )
                    for number, tokens in zip(chosen, output.responses, strict=True):
                        context, arguments = requests[number].args
                        answers[number] = self._text(tokens, arguments.get("until"))
                        self.cache_hook.add_partial(
                            "generate_until", (context, arguments), answers[number]
                        )
                    bar.update(len(chosen))
        return answers

    def _text(self, tokens: Sequence[int], until: str | list[str] | None) -> str:
        stops = [until] if isinstance(until, str) else list(until or [])
        # A stop that is a special token is not in the text, which has none of these.
        special = {self.tokenizer.convert_tokens_to_ids(stop) for stop in stops}
        special &= set(self.tokenizer.all_special_ids)
        end = next((i for i, token in enumerate(tokens) if token in special), len(tokens))
        text = str(self.tokenizer.decode(list(tokens[:end]), skip_special_tokens=True))
        cuts = [text.find(stop) for stop in stops if stop]
        return text[: min((cut for cut in cuts if cut >= 0), default=len(text))]

    def _shortened(
        self, prompts: Sequence[list[int]], new_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Prompts without the first tokens of those that are too long."""
        longest = max(new_tokens, default=0)
        if longest >= self.max_length:
            raise ValueError(
                f"a continuation must leave room for a prompt in {self.max_length} positions, got "
                f"{longest} tokens"
            )
        room = [self.max_length - count for count in new_tokens]
        pairs = list(zip(prompts, room, strict=True))
        cut = sum(len(prompt) > own for prompt, own in pairs)
        if cut:
            logger.warning(
                "%d of %d prompts lost their first tokens: the model has %d positions",
                cut,
                len(prompts),
                self.max_length,
            )
        return [prompt[-own:] or [self.prefix_token_id] for prompt, own in pairs]


def _needs_temperature(options: Mapping[str, Any]) -> bool:
    return any(name in options for name in ("top_k", "top_p", "tempered_confidence"))


def _seeds(seed: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed of each prompt's own, wherever it stands; of one that comes again, another."""
    times: collections.Counter[tuple[int, ...]] = collections.Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        digest = hashlib.sha256(f"{seed}/{times[prompt]}/{prompt}".encode()).digest()
        seeds.append(int.from_bytes(digest[:8], "big") >> 1)
        times[prompt] += 1
    return seeds
