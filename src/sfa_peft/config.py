# SPDX-License-Identifier: Apache-2.0
"""`SFAConfig`: what the user decides, checked where it is written."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import PeftType

from .checkpoint.file import check_complete
from .checkpoint.packing import SAVED_VALUES
from .errors import ConfigError
from .selection.accumulators import SCORE_DTYPES
from .selection.pick import GRANULARITIES, RANKINGS
from .selection.schedule import SCHEDULES
from .selection.scores import find_score, score_names

#: What weight decay of the optimizer pulls towards its neutral value.
WEIGHT_DECAYS = ("change", "weight")

#: What the values of a saved selection start from.
SELECTION_VALUES = ("zero", "trained")

#: `rho` where neither `rho` nor `adapter_dim` is given (the paper's value, Sec. 3).
DEFAULT_RHO = 0.5

#: Attribute under which a config keeps where it was read; no field, so it is not written.
_FOLDER = "_read_from"

_USAGE_HEADING = "## Loading this Selective Feature Adapter"
_USAGE = f"""{_USAGE_HEADING}

`import sfa_peft` must come first: it registers the method with PEFT. Without it loading ends in
`KeyError: 'SFA'`.

```python
import sfa_peft  # registers SFA with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/hub-id/of/this/folder")
```
"""


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
            weights still train long; None: until the last round.
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
        for name in ("target_modules", "target_parameters", "exclude_modules", "external_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self._check_budget()
        self._check_layers()
        self._check_score()
        self._check_schedule()
        self._check_reuse()

    def _check_budget(self) -> None:
        if not _is_number(self.budget) or not 0 < self.budget <= 1:
            raise ConfigError(
                f"SFAConfig.budget: expected a share of the backbone, 0 < budget <= 1, got "
                f"{self.budget!r}. 0.05 is the paper's small setting, 0.2 its large one."
            )
        if self.rho is not None and self.adapter_dim is not None:
            raise ConfigError(
                f"SFAConfig: rho={self.rho!r} and adapter_dim={self.adapter_dim!r} are both given, "
                "but each follows from the other and the budget. Leave one of them out."
            )
        if self.rho is not None and (not _is_number(self.rho) or not 0 <= self.rho <= 1):
            raise ConfigError(
                "SFAConfig.rho: expected the external adapters' share of the budget, 0 <= rho <= "
                f"1, got {self.rho!r}. 0.5 is the paper's value."
            )
        if self.adapter_dim is not None and (not _is_int(self.adapter_dim) or self.adapter_dim < 1):
            raise ConfigError(
                f"SFAConfig.adapter_dim: expected a width of at least 1, got {self.adapter_dim!r}. "
                "For no external adapters use rho=0."
            )

    def _check_layers(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"SFAConfig.modules_to_save: expected a list of names, got the string "
                f"{self.modules_to_save!r}. Write [{self.modules_to_save!r}]."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "SFAConfig: When `layers_pattern` is specified, `layers_to_transform` must also be "
                "specified."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                "SFAConfig: `layers_to_transform` cannot be used when `target_modules` is a str, "
                "because a regular expression can name the layers itself."
            )

    def _check_schedule(self) -> None:
        choices = {
            "score_dtype": SCORE_DTYPES,
            "ranking": RANKINGS,
            "granularity": GRANULARITIES,
            "schedule": SCHEDULES,
            "weight_decay_on": WEIGHT_DECAYS,
            "saved_values": SAVED_VALUES,
            "selection_values": SELECTION_VALUES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"SFAConfig.{name}: expected one of {', '.join(allowed)}, got "
                    f"{getattr(self, name)!r}."
                )
        if not _is_number(self.internal_lr_ratio) or self.internal_lr_ratio <= 0:
            raise ConfigError(
                "SFAConfig.internal_lr_ratio: expected a factor above 0, got "
                f"{self.internal_lr_ratio!r}."
            )
        until = self.select_until
        if until is not None and (not _is_number(until) or not 0 < until <= 1):
            raise ConfigError(
                f"SFAConfig.select_until: expected a share of the run, 0 < select_until <= 1, got "
                f"{until!r}."
            )
        for name in ("selection_steps", "total_steps"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise ConfigError(
                    f"SFAConfig.{name}: expected a number of update steps of at least 1, got "
                    f"{value!r}. None lets the run decide."
                )

    def _check_score(self) -> None:
        if self.resolved is None:  # a trained adapter loads without its user's own score
            find_score(self.score)
        if not _is_int(self.seed):
            raise ConfigError(f"SFAConfig.seed: expected an integer, got {self.seed!r}.")
        if not _is_int(self.score_every) or self.score_every < 1:
            raise ConfigError(
                f"SFAConfig.score_every: expected a number of steps of at least 1, got "
                f"{self.score_every!r}."
            )
        if self.score == "weight_difference" and (
            self.score_every > 1 or self.score_dtype != "float32"
        ):
            raise ConfigError(
                'SFAConfig: score="weight_difference" trains candidates in fp32 on every step; '
                f"leave out score_every={self.score_every} and score_dtype={self.score_dtype!r}."
            )

    def _check_reuse(self) -> None:
        if self.continue_from is not None:
            self.continue_from = os.fspath(self.continue_from)
        if self.selection_from is not None:
            self.selection_from = os.fspath(self.selection_from)
            if self.rho == 1:
                raise ConfigError(
                    "SFAConfig: rho=1 leaves no budget for the weights of selection_from="
                    f"{self.selection_from!r}. Lower rho, or leave selection_from out."
                )
        elif self.selection_values == "trained":
            raise ConfigError(
                "SFAConfig: selection_values='trained' is about a saved selection, but "
                "selection_from names none. Give an adapter's folder there."
            )

    @property
    def selects_while_training(self) -> bool:
        """Whether the selection grows during training (and so needs a callback or a selector)."""
        if self.selection_from is not None:
            return False
        return self.score not in score_names() or find_score(self.score).trained

    @property
    def folder(self) -> str | None:
        """Where the config was read from (folder or Hub id); None where it was not read."""
        return getattr(self, _FOLDER, None)

    def remember(self, resolved: dict[str, Any]) -> None:
        """Keep what a model's budget was solved to, for the file (a reused config is solved anew).

        Args:
            resolved: Sizes and layers of the adapter that is about to be saved.
        """
        self._resolved = resolved

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold (sets become sorted lists)."""
        fields = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }
        fields["resolved"] = getattr(self, "_resolved", None) or self.resolved
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and into the model card beside it how to load."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if _USAGE_HEADING not in text:
            card.write_text(text.rstrip() + "\n\n" + _USAGE, encoding="utf-8")

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


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
