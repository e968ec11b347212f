# SPDX-License-Identifier: Apache-2.0
"""`SFAConfig`: what the user decides, checked where it is written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import CONFIG_NAME, PeftType

from .budget import DEFAULT_RHO
from .config_fields import (
    check_fields,
    choice,
    names,
    number,
    option,
    patterns,
    saved,
    steps,
    whole,
)
from .errors import ConfigError, SFAError
from .files.folder import check_complete, replacing
from .files.packing import SAVED_VALUES
from .model_card import CardFacts, make_section, write_section
from .selection.accumulators import SCORE_DTYPES
from .selection.pick import GRANULARITIES, RANKINGS
from .selection.rules import SelectionRules
from .selection.schedule import SCHEDULES
from .selection.scores import find_score, score_names

#: How the paper does it, whatever becomes of the defaults. Of AdamW it says nothing: torch's.
_PAPER: dict[str, Any] = {
    "external_type": "bottleneck",
    "external_bias": False,
    "score": "accumulated_gradient",
    "ranking": "global",
    "granularity": "weight",
    "schedule": "literal",
    "late_bias_correction": False,
    "internal_lr_ratio": 1.0,
    "weight_decay_on": "weight",
}
#: Forms of external adapters.
EXTERNAL_TYPES = ("bottleneck", "mona")
#: What weight decay of the optimizer pulls towards its neutral value.
WEIGHT_DECAYS = ("change", "weight")
#: What the values of a saved selection start from.
SELECTION_VALUES = ("zero", "trained")
#: In `modules_to_save`: everything outside the backbone. A list of it, since PEFT extends that.
AUTO = "auto"


@dataclass(frozen=True)
class Notes:
    """What is known of an adapter beside its settings; on its config, but in no file of it."""

    folder: str | None = None  # where the config was read from, or Hub id
    resolved: dict[str, Any] | None = None  # sizes and layers, when it is about to be saved
    facts: CardFacts | None = None  # what its model card says
    metrics: Mapping[str, float | str] | None = None  # results in its model card


@dataclass
class SFAConfig(PeftConfig):
    r"""Configuration of a Selective Feature Adapter (https://arxiv.org/abs/2310.01843).

    The adapter :math:`\mathcal F = \{\mathcal F_e, \mathcal F_i\}` may train at most
    :math:`\beta \lVert\theta(\mathcal T)\rVert` parameters (Eq. 1), of which a share :math:`\rho`
    goes to the external adapters and the rest to selected pretrained weights (Eq. 2). The task
    head is never counted: name it in `modules_to_save`, and it is trained and saved whole.

    Args:
        budget: The paper's beta, in (0, 1]: trainable share of the backbone's parameters. Without a
            recognised backbone it is a share of the model without `modules_to_save`.
        rho: Share of the budget for the external adapters, in [0, 1]. 0: selected weights only;
            1: external adapters only. None: 0.5, or what `adapter_dim` leads to; on a model where
            no targeted layer ends a sub-layer it means 0, and a warning says so.
        adapter_dim: Width d of the external adapters (a layer of D features gets min(d, D)); give
            it instead of `rho`, never with it.
        external_type: "bottleneck" (Eq. 3): two projections and a ReLU. "mona": a scaled norm and
            depthwise convolutions over the feature map besides, as Mona has them, for tasks that
            live on neighbourhoods; slower, and for backbones of which it is known how tokens lie in
            the image.
        external_bias: Whether projections and convolutions of an external adapter have biases.
        external_modules: Names (suffixes, or one regular expression, as in `target_modules`) of the
            layers that get an external adapter on their output: linear layers, convolutions, layer
            norms. None: the last linear layer of each attention and MLP sub-layer.
        target_modules: Names (suffixes, or one regular expression) of the layers whose weights may
            be selected. None: the attention and MLP linear layers of the backbone.
        target_parameters: Names (suffixes such as "bias" or "norm.weight", or one regular
            expression) of further parameters whose entries may be selected: norms, biases, patch
            embedding and merging, convolutions. Their layer must have no layers inside.
        exclude_modules: Names (or one regular expression) of layers to leave alone.
        layers_to_transform: Index or indices of the layers to adapt, matched as everywhere in PEFT.
        layers_pattern: Name of the module list that holds the layers, with `layers_to_transform`.
        modules_to_save: Modules trained and saved whole, such as the task head. "auto": all that
            lies outside the backbone (see `head_modules`); the names found are saved.
        score: How weights are ranked. "accumulated_gradient" (Alg. 1): weights that the whole round
            pulls in one direction; the default. "absolute_gradient": weights that matter to single
            batches even where batches disagree; for rounds of few steps. "squared_gradient": the
            empirical Fisher information; to compare with methods that use it. "movement": gradient
            times weight, which prefers large weights; for tasks near the pretraining.
            "weight_difference" (Eq. 4): trains all candidates inside a round and keeps those that
            moved furthest; for small models, as it costs what full fine-tuning costs. "magnitude":
            the largest weights, selected by `get_peft_model`; where no callback can run. "random":
            the same without looking; the control that every comparison needs. Or the name of a
            function of yours, see `register_score`.
        score_dtype: "float32", or "bfloat16" with stochastic rounding: half the memory of scores;
            when scores do not fit.
        score_every: Score one update step in so many (the last of a round always): when steps that
            score are too slow.
        ranking: "global" compares all weights (Fig. 5: layers end up uneven); "layer" gives every
            tensor the same share, for backbones whose gradients differ by orders of magnitude;
            "output" gives every output feature of every tensor as many weights, so that each can
            change, as GPS does.
        granularity: "weight"; "block" and "block64": 16 and 64 neighbours in a row together, which
            are written several times as fast; for frequent switching. "row": all weights of one
            output feature together, which needs no index per weight; for the smallest files.
        schedule: "linear" picks equal shares after each round but the last; "cubic" picks most of
            them early, so that they train longer; "one_shot" picks once after the first round, for
            short runs; "literal" is the paper's loop as printed, which leaves 1/n of the budget
            unused; to reproduce it.
        select_until: Share of the run, (0, 1], after which no pick happens, so that the last
            weights still train long; 1: until the last round. None: while a quarter of the learning
            rates' sum is left ("literal": until the last round), which is half of the run under a
            linear decay, and where the rates are not known (see `SFASelector`).
        selection_steps: The paper's s: update steps in a round. None: 2000 as in the paper; a run
            too short for 20 such rounds gets a twentieth of its length, and says so.
        total_steps: The paper's T: update steps of the whole run. `SFACallback` takes it from the
            Trainer; an own loop gives it here or to `SFASelector`. A loop that calls
            `SFAModel.update_and_allocate` gives it here.
        late_bias_correction: Whether, under Adam, weights that join late get the bias correction of
            their own age. False is stock behaviour, which starts them with steps several times too
            large; for comparison.
        internal_lr_ratio: Learning rate of selected weights over that of everything else; sparser
            selections want larger steps.
        weight_decay_on: "change" pulls selected weights back to their pretrained values; "weight"
            pulls them to zero, as full fine-tuning does.
        seed: Seed of the "random" score and of nothing else.
        saved_values: How `save_pretrained` writes changed weights. "exact": every bit of the
            adapted weights. "bfloat16": changes rounded, error at most 2^-8 of each. "int8":
            changes in blocks of 128, error at most 1/253 of the largest in the block.
        selection_from: A saved adapter (folder or Hub id) whose selection a new task trains:
            exactly those weights, and nothing is picked. The budget's internal part is then the
            size of that selection; `target_modules` only says where external adapters may go. The
            new adapter's files do not need the other one.
        selection_values: What the values of `selection_from` start from: "zero", or "trained", the
            saved change.
        continue_from: A saved adapter (folder or Hub id) whose sparse change belongs to the new
            task's base, frozen; its external adapters and head do not. The new adapter selects and
            trains its own change on top. Loading it needs the earlier adapter again, and checks
            that its selection is still the same.
        check_base: Whether loading demands the pretrained weights that the adapter was trained on.
            False loads onto others too, and warns; so does SFA_CHECK_BASE=0 in the environment,
            where no config can be passed.
        init_weights: False starts from random instead of neutral values (for tests).
        resolved: Filled in when an adapter is saved: what the budget was solved to and which layers
            the stored positions refer to. Not to be set by hand.

    Raises:
        ConfigError: If a value is out of range or two values contradict each other.
    """

    budget: float = option(
        0.2,
        "Trainable share of the backbone, (0, 1].",
        number(
            "a share of the backbone, 0 < budget <= 1",
            lambda v: 0 < v <= 1,
            "0.05 is the paper's small setting, 0.2 its large one.",
        ),
    )
    rho: float | None = option(
        None,
        "Share of the budget for external adapters, [0, 1].",
        number(
            "the external adapters' share of the budget, 0 <= rho <= 1",
            lambda v: 0 <= v <= 1,
            "0.5 is the paper's value.",
        ),
    )
    adapter_dim: int | None = option(
        None,
        "Width of the external adapters, instead of rho.",
        whole("a width of at least 1", 1, "For no external adapters use rho=0."),
    )
    external_type: str = choice("bottleneck", EXTERNAL_TYPES, "External adapters")
    external_bias: bool = option(True, "Biases in external adapters.")
    external_modules: list[str] | str | None = patterns(
        "Layers that get an external adapter on their output."
    )
    target_modules: list[str] | str | None = patterns("Layers whose weights may be selected.")
    target_parameters: list[str] | str | None = patterns(
        "Further parameters whose entries may be selected."
    )
    exclude_modules: list[str] | str | None = patterns("Layers to leave alone.")
    layers_to_transform: list[int] | int | None = option(None, "Indices of the layers to adapt.")
    layers_pattern: list[str] | str | None = option(
        None, "Name of the module list that holds the layers."
    )
    modules_to_save: list[str] | str | None = names(
        "Modules trained and saved whole, such as the task head.", AUTO
    )
    score: str = option(
        "accumulated_gradient",
        f"How weights are ranked: {', '.join(score_names())}, or your own.",
    )
    score_dtype: str = choice("float32", SCORE_DTYPES, "Of scores")
    score_every: int = option(
        1,
        "Score one update step in so many (the last always).",
        whole("a number of steps of at least 1", 1),
    )
    ranking: str = choice("global", RANKINGS, "Compare weights")
    granularity: str = choice("weight", GRANULARITIES, "Select as one")
    schedule: str = choice("linear", SCHEDULES, "How the selection grows")
    select_until: float | None = option(
        None,
        "Share of the run after which no pick happens.",
        number("a share of the run, 0 < select_until <= 1", lambda v: 0 < v <= 1),
    )
    selection_steps: int | None = steps("Update steps in a round (the paper's s).")
    total_steps: int | None = steps("Update steps of the whole run (the paper's T).")
    late_bias_correction: bool = option(True, "Adam's bias correction by each weight's own age.")
    internal_lr_ratio: float = option(
        1.0,
        "Learning rate of selected weights over the others'.",
        number("a factor above 0", lambda v: v > 0),
    )
    weight_decay_on: str = choice("change", WEIGHT_DECAYS, "What decays")
    seed: int = option(0, 'Seed of the "random" score.', whole("an integer"))
    saved_values: str = choice("exact", SAVED_VALUES, "How changes are saved")
    selection_from: str | None = saved("Saved adapter whose selection is trained anew.")
    selection_values: str = choice("zero", SELECTION_VALUES, "Start of a saved selection")
    continue_from: str | None = saved("Saved adapter whose change belongs to the base.")
    check_base: bool = option(True, "Demand the base that an adapter was trained on.")
    init_weights: bool = option(True, "False: random start, for tests.")
    resolved: dict[str, Any] | None = option(None, "Filled in when an adapter is saved.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SFA  # pyright: ignore[reportAttributeAccessIssue]
        self.notes = Notes()
        _check_registered(self)
        check_fields(self)
        if self.resolved is None:  # a trained adapter loads without its user's own score
            find_score(self.score)
        contradiction = next(self._contradictions(), None)
        if contradiction is not None:
            raise ConfigError(f"SFAConfig: {contradiction}")

    @classmethod
    def paper(cls, budget: float = 0.2, **options: Any) -> SFAConfig:
        """Return the paper's own settings; to reproduce it, and to compare with it.

        What differs from the defaults: picks follow Alg. 1 to the letter (`schedule="literal"`),
        external adapters have no biases, as Table 4 counts them, and AdamW is torch's, which decays
        weights to zero and corrects late ones by the age of the first.

        Args:
            budget: beta. The paper's SFA-B has 0.195 with `adapter_dim=128`, its SFA-S 0.048 with
                `adapter_dim=64`; its rho is 0.5 where no width is given.
            options: Any other fields, in the place of the paper's.

        Raises:
            ConfigError: As the class itself.
        """
        shares: dict[str, Any] = {} if "adapter_dim" in options else {"rho": DEFAULT_RHO}
        return cls(budget=budget, **(_PAPER | shares | options))

    def _contradictions(self) -> Iterator[str]:
        """Say which fields contradict each other."""
        if self.rho is not None and self.adapter_dim is not None:
            yield (
                f"rho={self.rho!r} and adapter_dim={self.adapter_dim!r} are both given, "
                "but each follows from the other and the budget. Leave one of them out."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            yield (
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            yield (
                "`layers_to_transform` cannot be used when `target_modules` is a str, because a "
                "regular expression can name the layers itself."
            )
        if self.ranking == "output" and self.granularity != "weight":
            yield (
                'ranking="output" gives every row as many weights, granularity='
                f"{self.granularity!r} selects several together. Leave one of them out."
            )
        plain = self.score_every == 1 and self.score_dtype == "float32"
        if self.score == "weight_difference" and not plain:
            yield (
                'score="weight_difference" trains candidates in fp32 on every step; leave out '
                f"score_every={self.score_every} and score_dtype={self.score_dtype!r}."
            )
        if self.selection_from is not None and self.rho == 1:
            yield (
                "rho=1 leaves no budget for the weights of selection_from="
                f"{self.selection_from!r}. Lower rho, or leave selection_from out."
            )
        if self.selection_from is None and self.selection_values == "trained":
            yield (
                "selection_values='trained' is about a saved selection, but selection_from names "
                "none. Give an adapter's folder there."
            )

    @property
    def selects_while_training(self) -> bool:
        """Whether the selection grows during training (and so needs a callback or a selector)."""
        if self.selection_from is not None:
            return False
        return self.score not in score_names() or find_score(self.score).trained

    @property
    def rules(self) -> SelectionRules:
        """How weights are scored and picked."""
        return SelectionRules(**{f.name: getattr(self, f.name) for f in fields(SelectionRules)})

    def remember(self, **known: Any) -> None:
        """Note something about the adapter, by the names of `Notes`."""
        self.notes = replace(self.notes, **known)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold (sets become sorted lists)."""
        fields = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }
        fields["resolved"] = self.notes.resolved or self.resolved
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and a section of the model card beside it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as elsewhere:  # PEFT writes in place
            super().save_pretrained(elsewhere, **kwargs)
            written = (Path(elsewhere) / CONFIG_NAME).read_bytes()
        with replacing(folder / CONFIG_NAME) as partial:
            partial.write_bytes(written)
        mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping or {}
        known = mapping.get("parent_library", "").startswith("transformers.")
        write_section(folder, self.card_section(mapping["base_model_class"] if known else None))

    def card_section(self, base_class: str | None = None, base: str | None = None) -> str:
        """Return what a model card says of the adapter.

        Args:
            base_class: Class of its base model, if that is one of transformers'.
            base: Name of the base model, where the config does not know it yet.
        """
        return make_section(
            base=self.base_model_name_or_path or base,
            base_class=base_class,
            facts=self.notes.facts,
            metrics=self.notes.metrics,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SFAConfig:
        """Read a saved config; a local adapter whose tensors' file is damaged is refused here.

        Raises:
            AdapterFileError: If the tensors beside the config are cut short or damaged.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        check_complete(folder)
        config: Any = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if isinstance(config, cls):  # PEFT returns what the file is of
            config.remember(folder=str(folder))
        return config


def _check_registered(config: SFAConfig) -> None:
    """Check that PEFT still takes the config's type for this method."""
    name: Any = config.peft_type
    of_config: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(name)
    theirs: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(name)
    package = __name__.partition(".")[0]
    if of_config is not None and not isinstance(config, of_config):
        theirs = of_config
    elif theirs is None or any(c.__module__.partition(".")[0] == package for c in theirs.__mro__):
        return
    raise SFAError(
        f"Another package has put its own method ({theirs.__module__}.{theirs.__qualname__}) in "
        "the place of SFA in PEFT's tables, after sfa_peft was imported. Import only one of the "
        "two in a process."
    )
