"""Which candidate of a step goes on to be verified.

SpecGuard (arXiv 2604.15244): the consistency medoid of the candidates' embeddings.
"""

from __future__ import annotations

import torch

from telltale.decode.step_verified.encoders import Encoder, checked_embeddings
from telltale.decode.step_verified.ends import StepText
from telltale.decode.step_verified.proposals import Proposal
from telltale.signals.confidence import reduced
from telltale.signals.diversity import agreement, consistency_medoid


def selected(proposal: Proposal, steps: StepText, encoder: Encoder) -> tuple[int, float]:
    """The place of the chosen candidate, and the share of candidates that equal the most frequent one."""
    tokens = [tuple(candidate.tokens) for candidate in proposal.candidates]
    majority, share = agreement(tokens)
    config = proposal.row.config
    if len(tokens) == 1 or config.selector == "first":
        return 0, share
    if config.selector == "majority":
        return majority, share
    if config.selector == "log-probability":
        values = [
            float(reduced(torch.tensor(candidate.log_probabilities), config.log_probability_reduce))
            for candidate in proposal.candidates
        ]
        return max(range(len(values)), key=lambda place: (values[place], -place)), share
    if share == 1.0:
        return 0, share
    different = list(dict.fromkeys(tokens))
    embeddings = checked_embeddings(encoder, [steps.text(one) for one in different])
    places = {one: place for place, one in enumerate(different)}
    index, _ = consistency_medoid(embeddings[[places[one] for one in tokens]])
    return index, share
