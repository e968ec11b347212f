# SPDX-License-Identifier: Apache-2.0
"""How weights are ranked: the scores by name, and functions of the user's beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError

#: (weight, gradient, state) -> state; see `register_score`.
ScoreFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """One way to rank weights.

    Attributes:
        name: What `SFAConfig.score` calls it.
        use: When to use it, one sentence.
        update: Adds one update step to a weight's state; None where nothing is added up.
        additive: Whether the state is the plain sum of the gradients. Then micro-batches and ranks
            add up by themselves; otherwise the gradient of a whole update step is brought together
            first, in a second buffer and, on several ranks, in one exchange a step.
        times_weight: Whether the state is multiplied by the weight before it is ranked.
        trained: Whether it needs training steps; otherwise all is selected by `get_peft_model`.
        dense: Whether every candidate trains inside the round; its change is the state.
        elementwise: Whether each entry of the state depends on the same entry of all else.
    """

    name: str
    use: str
    update: ScoreFunction | None = None
    additive: bool = False
    times_weight: bool = False
    trained: bool = True
    dense: bool = False
    elementwise: bool = True


def _sum(_weight: Tensor, gradient: Tensor, state: Tensor) -> Tensor:
    return state.add_(gradient)


def _sum_of_absolute(_weight: Tensor, gradient: Tensor, state: Tensor) -> Tensor:
    return state.add_(gradient.abs())


def _sum_of_squares(_weight: Tensor, gradient: Tensor, state: Tensor) -> Tensor:
    return state.addcmul_(gradient, gradient)


_SCORES = {
    score.name: score
    for score in (
        Score(
            "accumulated_gradient",
            "The default (Alg. 1): weights that the whole round pulls in one direction.",
            _sum,
            additive=True,
        ),
        Score(
            "absolute_gradient",
            "Weights that matter to single batches even where batches disagree; with few steps in "
            "a round.",
            _sum_of_absolute,
        ),
        Score(
            "squared_gradient",
            "The empirical Fisher information, as FISH and SPT use it; to compare with them.",
            _sum_of_squares,
        ),
        Score(
            "movement",
            "Gradient times weight: prefers large weights, for tasks near the pretraining.",
            _sum,
            additive=True,
            times_weight=True,
        ),
        Score(
            "weight_difference",
            "Eq. 4: trains every candidate inside the round and keeps those that moved furthest; "
            "costs the memory and time of full fine-tuning until the last pick.",
            dense=True,
        ),
        Score(
            "magnitude", "Largest pretrained weights: needs no data and no callback.", trained=False
        ),
        Score("random", "The control that every comparison needs.", trained=False),
    )
}


def register_score(name: str, function: ScoreFunction, *, elementwise: bool = False) -> None:
    """Let `SFAConfig(score=name)` rank weights by a function of yours.

    After every update step it is called for each weight tensor that may be selected, with the
    pretrained weight, the gradient of the update step (float32, over all micro-batches and ranks,
    unscaled and before clipping) and the state, which starts each round at zero and has the
    weight's shape, float32. It returns the new state, which may be the old one changed in place.
    The weights with the largest absolute state are selected.

    An adapter saves the name only: register the function again before training goes on. Loading a
    trained adapter does not need it.

    Args:
        name: A new name, or that of a function registered before, which is replaced.
        function: (weight, gradient, state) -> state.
        elementwise: Whether each entry of what it returns depends on the same entry of weight,
            gradient and state alone. Under FSDP2 it sees one process's part of a weight, and one
            that looks at whole weights (say, at their norm) would be wrong without a word: there
            this must be True.

    Raises:
        ConfigError: If the name is taken by a score of this library or is not a word.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"register_score: expected a word as the name, got {name!r}.")
    if not callable(function):
        raise ConfigError(
            f"register_score: expected a function (weight, gradient, state), got {function!r}."
        )
    known = _SCORES.get(name)
    if known is not None and known.use:
        raise ConfigError(f"register_score: {name!r} is a score of sfa_peft; take another name.")
    _SCORES[name] = Score(name, "", function, elementwise=elementwise)


def find_score(name: str) -> Score:
    """Return the score of that name.

    Raises:
        ConfigError: If there is none; the message lists what there is.
    """
    if not isinstance(name, str) or name not in _SCORES:
        raise ConfigError(
            f"SFAConfig.score: unknown score {name!r}; expected one of {', '.join(_SCORES)}. A "
            "score of your own must be registered first: sfa_peft.register_score(name, function)."
        )
    return _SCORES[name]


def score_names() -> tuple[str, ...]:
    """Return the names of all scores, those registered included."""
    return tuple(_SCORES)
