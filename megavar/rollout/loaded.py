"""One set of weights of the local engine with what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from megavar.errors import UserError
from megavar.rollout.engine import SamplingParams
from megavar.rollout.stops import StopTexts, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    directory: Path
    version: str
    model: PreTrainedModel
    vocabulary: int
    """Number of logits."""
    limit: int
    """Longest prompt plus completion."""
    end_ids: frozenset[int]
    """End-of-sequence ids: the ones that SGLang too stops on."""
    _stops: dict[tuple[str, ...], StopTexts] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path, version: str, dtype: torch.dtype, device: torch.device) -> LoadedModel:
        """Raises UserError when the directory does not hold a causal language model."""
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory}: no config.json; give a Hugging Face model directory")
        bar = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{directory}: transformers cannot load it as a causal language model: {error}"
            ) from error
        finally:
            if bar:
                hf_logging.enable_progress_bar()
        torch.nn.Module.to(model.eval().requires_grad_(False), device)
        return cls(
            directory=directory,
            version=version,
            model=model,
            vocabulary=model.get_output_embeddings().weight.shape[0],
            limit=model.config.get_text_config().max_position_embeddings,
            end_ids=_end_of_sequence(model, load_tokenizer(directory)),
        )

    def context(self, params: SamplingParams) -> int:
        """Longest prompt plus completion under `params`."""
        return min(self.limit, params.context_length or self.limit)

    def stop_texts(self, texts: tuple[str, ...]) -> StopTexts | None:
        """Their detector, None without texts. Raises UserError where there is no tokenizer."""
        if texts and texts not in self._stops:
            self._stops[texts] = StopTexts.load(self.directory, texts, self.vocabulary)
        return self._stops.get(texts)


def _end_of_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    ids: set[int] = set()
    for source in (model.config.get_text_config(), model.generation_config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        ids.update([found] if isinstance(found, int) else found or [])
    return frozenset(ids)
