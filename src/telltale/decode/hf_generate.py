"""The plug-in for Transformers: ``model.generate(..., custom_generate=telltale.decode.custom_generate)``.

Transformers prepares inputs, logits processors and stopping criteria as always; only the decoding loop is ours. In
transformers 5.23 ``generate`` hands a callable neither its ``streamer`` nor its ``tokenizer``: pass a streamer as
``token_streamer=``, and use ``SelfSpeculative.stream`` for stop strings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from telltale.decode.decoders import SelfSpeculative
from telltale.decode.request import Request, checked_request
from telltale.errors import ConfigError

_ATTRIBUTE = "_telltale_decoders"


class _Opened(dict[Any, Any]):
    """Decoders of one model by settings. It lives and dies with the model, and copies and pickles of the model lack it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Opened, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Opened:
        return _Opened()


def custom_generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    exit_layer: int | str = "auto",
    draft_length: int | str = "auto",
    drafter: str = "exit",
    exactness: str = "fast",
    backend: str = "auto",
    token_streamer: Any = None,
    streamer: Any = None,
    **model_inputs: Any,
) -> Any:
    """The decoding loop for ``generate``: full sequences (batch, prompt + new) int64, prompt included.

    With ``return_dict_in_generate`` a ``GenerateDecoderOnlyOutput`` with ``sequences`` (no scores, no hidden states).
    ``exit_layer``, ``draft_length``, ``drafter``, ``exactness`` and ``backend`` are those of
    :class:`~telltale.decode.SelfSpeculative` and go through ``generate(...)`` as keyword arguments.

    Raises :class:`~telltale.errors.ConfigError` for beams, for a guidance that needs a second forward, and for outputs
    that this loop does not produce.
    """
    # A name of Transformers' own must not be in the signature: ``generate`` would pass it twice.
    config = generation_config or getattr(model, "generation_config", None) or GenerationConfig()
    _refuse(config)
    criteria = stopping_criteria or StoppingCriteriaList()
    decoding = _decoder(model, exit_layer, draft_length, drafter, exactness, backend)
    length = input_ids.shape[1]
    limits = [one.max_length - length for one in criteria if isinstance(one, MaxLengthCriteria)]
    limit = min(limits) if limits else (config.max_new_tokens or (config.max_length or length + 20) - length)
    eos = [token for one in criteria if isinstance(one, EosTokenCriteria) for token in one.eos_token_id.tolist()]
    others = [one for one in criteria if not isinstance(one, (MaxLengthCriteria, EosTokenCriteria))]
    pad = getattr(config, "_pad_token_tensor", None)
    request = checked_request(
        decoding.decoder,
        input_ids,
        max_new_tokens=limit,
        eos_token_id=eos,
        temperature=1.0 if config.do_sample else 0.0,
        attention_mask=model_inputs.get("attention_mask"),
        logits_processor=logits_processor if logits_processor else None,
        pad_token_id=config.pad_token_id if pad is None else int(pad),
    )
    # Processors and criteria of Transformers count from the padded prompt, so they get to see it.
    request.seen_by_processors = input_ids.tolist()
    if others:
        request.ends = _ends(request, others, decoding.decoder.vocabulary_size, input_ids.device)
    receiver = token_streamer if token_streamer is not None else streamer
    if receiver is not None and len(request.prompts) > 1:
        raise ConfigError(f"a streamer was given for {len(request.prompts)} rows; it takes one row.")
    steps = decoding.steps(request, block=1 if receiver is not None else 16)
    while True:
        try:
            committed = next(steps)
        except StopIteration as end:
            result = end.value
            break
        if receiver is not None:
            for token in committed[0]:
                receiver.put(torch.tensor([token]))
    if receiver is not None:
        receiver.end()
    sequences = torch.cat([input_ids, result.tokens.to(input_ids.device)], -1)
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences


def _refuse(config: Any) -> None:
    if (config.num_beams or 1) > 1:
        raise ConfigError(f"num_beams={config.num_beams}; self-speculation decodes one beam. Use num_beams=1.")
    guidance = getattr(config, "guidance_scale", None)
    if guidance is not None and guidance != 1:
        raise ConfigError(f"guidance_scale={guidance} needs a second forward pass per token; leave it out.")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, name, False):
            raise ConfigError(f"{name}=True is not available from this loop; leave it out.")


def _decoder(model: nn.Module, *settings: Any) -> SelfSpeculative:
    """The decoder for ``settings``, kept with the model as long as it can serve it."""
    opened = model.__dict__.get(_ATTRIBUTE)
    if opened is None:
        opened = _Opened()
    if settings in opened and opened[settings].decoder.outdated_reason() is not None:
        del opened[settings]
    if settings not in opened:
        exit_layer, draft_length, drafter, exactness, backend = settings
        opened[settings] = SelfSpeculative(
            model, exit_layer, draft_length, drafter=drafter, exactness=exactness, backend=backend
        )
    model.__dict__[_ATTRIBUTE] = opened
    return opened[settings]


def _ends(request: Request, criteria: list[Any], vocabulary_size: int, device: torch.device) -> Any:
    """Asks Transformers' own criteria after each token of a row; they get the whole row, and no scores."""
    no_scores = torch.zeros(1, vocabulary_size, device=device)

    def ends(row: int, tokens: list[int]) -> bool:
        ids = torch.tensor([request.seen_by_processors[row] + tokens], device=device)
        return any(bool(torch.as_tensor(one(ids, no_scores)).any()) for one in criteria)

    return ends
