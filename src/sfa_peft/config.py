# SPDX-License-Identifier: Apache-2.0
"""`SFAConfig`: what the user decides, checked where it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import PeftType

from .checkpoint.file import check_complete
from .errors import ConfigError

#: Scores that need gradients: the selection grows while training.
TRAINED_SCORES = ("accumulated_gradient",)
#: Scores that need no data: the whole selection is made by `get_peft_model`.
DATA_FREE_SCORES = ("magnitude", "random")
SCORES = TRAINED_SCORES + DATA_FREE_SCORES

#: `rho` where neither `rho` nor `adapter_dim` is given (the paper's value, Sec. 3).
DEFAULT_RHO = 0.5

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
        exclude_modules: Names (or one regular expression) of layers to leave alone.
        layers_to_transform: Index or indices of the layers to adapt, matched as everywhere in PEFT.
        layers_pattern: Name of the module list that holds the layers, with `layers_to_transform`.
        modules_to_save: Modules trained and saved whole, such as the task head.
        score: How weights are ranked. "accumulated_gradient" (Alg. 1): absolute value of the
            gradient summed over a round. "random" and "magnitude" need no data and select
            everything in `get_peft_model`; "random" is the control to compare with.
        selection_steps: The paper's s: update steps in a round. None: 2000 as in the paper; a run
            too short for 20 such rounds gets a twentieth of its length, and says so.
        total_steps: The paper's T: update steps of the whole run. `SFACallback` takes it from the
            Trainer; an own loop gives it here or to `SFASelector`.
        seed: Seed of the "random" score and of nothing else.
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
        default="accumulated_gradient", metadata={"help": f"How weights are ranked: {SCORES}."}
    )
    selection_steps: int | None = field(
        default=None, metadata={"help": "Update steps in a round (the paper's s)."}
    )
    total_steps: int | None = field(
        default=None, metadata={"help": "Update steps of the whole run (the paper's T)."}
    )
    seed: int = field(default=0, metadata={"help": 'Seed of the "random" score.'})
    init_weights: bool = field(default=True, metadata={"help": "False: random start, for tests."})
    resolved: dict[str, Any] | None = field(
        default=None, metadata={"help": "Filled in when an adapter is saved."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SFA  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("target_modules", "exclude_modules", "external_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        self._check_budget()
        self._check_layers()
        self._check_schedule()

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
        if self.score not in SCORES:
            raise ConfigError(
                f"SFAConfig.score: unknown score {self.score!r}; expected one of "
                f"{', '.join(SCORES)}."
            )
        if not _is_int(self.seed):
            raise ConfigError(f"SFAConfig.seed: expected an integer, got {self.seed!r}.")
        for name in ("selection_steps", "total_steps"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise ConfigError(
                    f"SFAConfig.{name}: expected a number of update steps of at least 1, got "
                    f"{value!r}. None lets the run decide."
                )

    @property
    def selects_while_training(self) -> bool:
        """Whether the selection grows during training (and so needs a callback or a selector)."""
        return self.score in TRAINED_SCORES

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
        return cast(SFAConfig, config)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
