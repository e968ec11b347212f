# SPDX-License-Identifier: Apache-2.0
"""What a script says of its task, and the run that all of them share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset
from transformers import PreTrainedModel

from common.arguments import SharedArguments, parse
from common.augmented import AugmentedTrainer
from common.data import Data
from common.methods import check_loaded_again, prepare_method, save_method, saved_size
from common.reporting import Result, make_result, open_output, report, scores_of, shown_indices
from common.training import Rates, make_trainer
from sfa_peft import find_backbone
from sfa_peft.dense import Preprocessing, TaskSpec


class Scoring(Protocol):
    """How a task's outputs are scored and drawn.

    Attributes:
        headers: Columns of the table: header to key of the scores.
        sheet: Writes rows of pictures below their titles as a contact sheet.
    """

    headers: dict[str, str]
    sheet: Callable[[list[list[Any]], list[str], Path], Any]

    def trainer_options(self, data: Data) -> dict[str, Any]:
        """Return what `make_trainer` is told of the task."""
        ...

    def evaluate(self, trainer: AugmentedTrainer, data: Dataset[dict[str, Any]]) -> dict[str, Any]:
        """Return the scores of a trained model."""
        ...

    def columns(self, model: Any, items: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return pictures of some items by title: input, truth and prediction."""
        ...


@dataclass(frozen=True)
class Task:
    """What a script says of its task; all that is called gets the run's arguments first.

    Attributes:
        name: What it is called in `task.json`.
        arguments: The options.
        load_data: Returns items as the model takes them.
        make_model: Returns the head on the pretrained backbone, the same for every method.
        rates: Returns the learning rates.
        scoring: Returns how outputs are scored, and refuses what cannot work.
        preprocessing: Returns what the evaluation does with images, for predictions.
    """

    name: str
    arguments: type[SharedArguments]
    load_data: Callable[[Any], Data]
    make_model: Callable[[Any, Data], PreTrainedModel]
    rates: Callable[[Any], Rates]
    scoring: Callable[[Any, Data], Scoring]
    preprocessing: Callable[[Any], Preprocessing]


def run_task(task: Task, argv: Sequence[str] | None, description: str) -> Result:
    """Train, evaluate and save as a command line says.

    Of several processes the first one saves and the others wait.

    Args:
        task: What the script adds.
        argv: Options; None for those of the process.
        description: Text of which the first line heads the help.
    """
    args = parse(task.arguments, argv, description.splitlines()[0])

    # 1. Data
    open_output(args)
    data = task.load_data(args)
    args.count_steps(len(data.train))

    # 2. Model
    model = task.make_model(args, data)
    scoring = task.scoring(args, data)
    spec = describe(task, args, data, model)

    # 3. Adapter
    ready = prepare_method(model, args)

    # 4. Train
    rates, options = task.rates(args), scoring.trainer_options(data)
    trainer = make_trainer(ready, args, rates=rates, train_data=data.train, **options)
    trainer.train(resume_from_checkpoint=ready.checkpoint)

    # 5. Evaluate
    scores = scoring.evaluate(trainer, data.evaluation)
    items = [data.evaluation[i] for i in shown_indices(len(data.evaluation))]
    columns = scoring.columns(ready.model, items)

    # 6. Save, and load it again to see that nothing is lost
    out = Path(args.output_dir)
    with trainer.args.main_process_first(local=False, desc="saving"):
        if trainer.is_world_process_zero():
            save_method(ready, args, out)
            spec.write(out, metrics=scores_of(scores))
            fresh, pixels = task.make_model(args, data), items[0]["pixel_values"][None]
            check_loaded_again(ready, fresh, args, out, pixels)
        result = make_result(
            ready,
            args,
            trainer,
            rates=rates,
            size=saved_size(out),
            scores=scores,
            headers=scoring.headers,
            columns=columns,
            draw=lambda columns, path: draw_columns(scoring, columns, path),
        )
        if trainer.is_world_process_zero():
            report(result, ready, args)
    return result


def describe(task: Task, args: SharedArguments, data: Data, model: PreTrainedModel) -> TaskSpec:
    """Return all that a prediction needs to know of a task, beside what is trained."""
    spec = TaskSpec.describe(
        model,
        task=task.name,
        backbone=find_backbone(model).name,
        source=args.backbone,
        preprocessing=task.preprocessing(args),
        class_names=data.class_names,
    )
    return replace(spec, method={"name": args.method, "budget": args.budget})


def draw_columns(scoring: Scoring, columns: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Write columns of pictures as a contact sheet, one row per item."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    scoring.sheet(rows, list(columns), path)
