# SPDX-License-Identifier: Apache-2.0
"""`SFAConfig`: what the user decides, checked where it is written."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from .config_checks import (
    SELECTION_VALUES,
    WEIGHT_DECAYS,
    check_budget,
    check_layers,
    check_registered,
    check_reuse,
    check_schedule,
    check_score,
    check_types,
)
from .files.folder import check_complete
from .files.packing import SAVED_VALUES
from .model_card import METRICS, CardFacts, write_section
from .selection.accumulators import SCORE_DTYPES
from .selection.pick import GRANULARITIES, RANKINGS
from .selection.rules import SelectionRules
from .selection.schedule import SCHEDULES
from .selection.scores import find_score, score_names

#: `rho` where neither `rho` nor `adapter_dim` is given (the paper's value, Sec. 3).
DEFAULT_RHO = 0.5

#: Attribute under which a config keeps where it was read; no field, so it is not written.
_FOLDER = "_read_from"


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
        external_bias: Whether the two projections of an external adapter have biases.
        external_modules: Names (suffixes, or one regular expression, as in `target_modules`) of the
            layers that get an external adapter on their output. None: the last linear layer of each
            attention and MLP sub-layer.
        target_modules: Names (suffixes, or one regular expression) of the layers whose weights may
            be selected. None: the attention and MLP linear layers of the backbone.
        target_parameters: Names (suffixes such as "bias" or "norm.weight", or one regular
            expression) of further parameters whose entries may be selected: norms, biases, patch
            embedding and merging, convolutions. Their layer must have no layers inside.
        exclude_modules: Names (or one regular expression) of layers to leave alone.
        layers_to_transform: Index or indices of the layers to adapt, matched as everywhere in PEFT.
        layers_pattern: Name of the module list that holds the layers, with `layers_to_transform`.
        modules_to_save: Modules trained and saved whole, such as the task head.
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
            tensor the same share, for backbones whose gradients differ by orders of magnitude.
        granularity: "weight", or "row": all weights of one output feature together, which needs no
            index per weight; for the smallest files.
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
            Trainer; an own loop gives it here or to `SFASelector`.
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

    budget: float = field(
        default=0.2, metadata={"help": "Trainable share of the backbone, (0, 1]."}
    )
    rho: float | None = field(
        default=None, metadata={"help": "Share of the budget for external adapters, [0, 1]."}
    )
    adapter_dim: int | None = field(
        default=None, metadata={"help": "Width of the external adapters, instead of rho."}
    )
    external_bias: bool = field(default=True, metadata={"help": "Biases in external adapters."})
    external_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers that get an external adapter on their output."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers whose weights may be selected."}
    )
    target_parameters: list[str] | str | None = field(
        default=None, metadata={"help": "Further parameters whose entries may be selected."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that holds the layers."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole, such as the task head."}
    )
    score: str = field(
        default="accumulated_gradient",
        metadata={"help": f"How weights are ranked: {', '.join(score_names())}, or your own."},
    )
    score_dtype: str = field(
        default="float32", metadata={"help": f"Of scores: {', '.join(SCORE_DTYPES)}."}
    )
    score_every: int = field(
        default=1, metadata={"help": "Score one update step in so many (the last always)."}
    )
    ranking: str = field(
        default="global", metadata={"help": f"Compare weights: {', '.join(RANKINGS)}."}
    )
    granularity: str = field(
        default="weight", metadata={"help": f"Select as one: {', '.join(GRANULARITIES)}."}
    )
    schedule: str = field(
        default="linear", metadata={"help": f"How the selection grows: {', '.join(SCHEDULES)}."}
    )
    select_until: float | None = field(
        default=None, metadata={"help": "Share of the run after which no pick happens."}
    )
    selection_steps: int | None = field(
        default=None, metadata={"help": "Update steps in a round (the paper's s)."}
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "Update steps of the whole run (the paper's T)."}
    )
    late_bias_correction: bool = field(
        default=True, metadata={"help": "Adam's bias correction by each weight's own age."}
    )
    internal_lr_ratio: float = field(
        default=1.0, metadata={"help": "Learning rate of selected weights over the others'."}
    )
    weight_decay_on: str = field(
        default="change", metadata={"help": f"What decays: {', '.join(WEIGHT_DECAYS)}."}
    )
    seed: int = field(default=0, metadata={"help": 'Seed of the "random" score.'})
    saved_values: str = field(
        default="exact", metadata={"help": f"How changes are saved: {', '.join(SAVED_VALUES)}."}
    )
    selection_from: str | None = field(
        default=None, metadata={"help": "Saved adapter whose selection is trained anew."}
    )
    selection_values: str = field(
        default="zero",
        metadata={"help": f"Start of a saved selection: {', '.join(SELECTION_VALUES)}."},
    )
    continue_from: str | None = field(
        default=None, metadata={"help": "Saved adapter whose change belongs to the base."}
    )
    check_base: bool = field(
        default=True, metadata={"help": "Demand the base that an adapter was trained on."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random start, for tests."})
    resolved: dict[str, Any] | None = field(
        default=None, metadata={"help": "Filled in when an adapter is saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SFA  # pyright: ignore[reportAttributeAccessIssue]
        check_registered(self)
        check_types(self)
        for name in ("target_modules", "target_parameters", "exclude_modules", "external_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if self.modules_to_save is not None:  # PEFT appends to the list that it is given
            ordered = sorted if isinstance(self.modules_to_save, (set, frozenset)) else list
            self.modules_to_save = ordered(self.modules_to_save)
        check_budget(self)
        check_layers(self)
        check_score(self)
        check_schedule(self)
        for name in ("selection_from", "continue_from"):
            if getattr(self, name) is not None:
                setattr(self, name, os.fspath(getattr(self, name)))
        check_reuse(self)

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

    @property
    def folder(self) -> str | None:
        """Where the config was read from (folder or Hub id); None where it was not read."""
        return getattr(self, _FOLDER, None)

    def remember(self, resolved: dict[str, Any], facts: CardFacts | None = None) -> None:
        """Keep what a model's budget was solved to, for the file (a reused config is solved anew).

        Args:
            resolved: Sizes and layers of the adapter that is about to be saved.
            facts: What its model card says.
        """
        self._resolved = resolved
        self._facts = facts

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold (sets become sorted lists)."""
        fields = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }
        fields["resolved"] = getattr(self, "_resolved", None) or self.resolved
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and a section of the model card beside it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            super().save_pretrained(partial, **kwargs)
            (Path(partial) / CONFIG_NAME).replace(folder / CONFIG_NAME)
        mapping = kwargs.get("auto_mapping_dict") or self.auto_mapping or {}
        known = mapping.get("parent_library", "").startswith("transformers.")
        write_section(
            folder,
            base=self.base_model_name_or_path,
            base_class=mapping["base_model_class"] if known else None,
            facts=getattr(self, "_facts", None),
            metrics=getattr(self, METRICS, None),
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SFAConfig:
        """Read a saved config; a local adapter whose tensors' file is damaged is refused here.

        Raises:
            AdapterFileError: If the tensors beside the config are cut short or damaged.
        """
        check_complete(Path(pretrained_model_name_or_path) / (subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        setattr(config, _FOLDER, str(Path(pretrained_model_name_or_path, subfolder or "")))
        return cast(SFAConfig, config)
