# SPDX-License-Identifier: Apache-2.0
"""Errors of the library in the words of the command line."""

import re

# Of the library's arguments, as its errors write them (`name=` or `name='value'`): the options.
OPTIONS = {
    "classes": "--classes",
    "dataset_format": "--dataset_format",
    "depth_scale": "--depth_scale",
    "ignore_index": "--ignore_index",
    "image_column": "--image_column_name",
    "keep_unlabelled": "--on_error skip",  # images without a label are left out
    "label_column": "--label_column_name",
    "num_shifts": "--test_shifts",
    "on_error": "--on_error",
    "split": "--split",
}
_ARGUMENT = re.compile(rf"\b({'|'.join(OPTIONS)})=(?:'([^']*)'|(True)|(\d+))?")


def as_typed(message: str) -> str:
    """Return an error of the library with the options that the user of a script would type."""

    def option(found: re.Match[str]) -> str:
        value = found[2] or found[4]
        return OPTIONS[found[1]] + (f" {value}" if value else "")

    return _ARGUMENT.sub(option, message)
