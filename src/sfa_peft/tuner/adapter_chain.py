# SPDX-License-Identifier: Apache-2.0
"""Earlier adapters that one builds on, found by their files alone, whatever the model.

A file may say anything: each folder is read and followed once, and its depth is bounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor

from ..config import SFAConfig
from ..errors import AdapterFileError, SFAError
from ..files.adapter_config import Link, read_resolved


@dataclass(frozen=True)
class SavedFiles:
    """What an adapter's folder holds.

    Attributes:
        source: Folder or Hub id.
        config: Its config.
        state: All its tensors by key, as in the file.
        digest: SHA-256 of the stored selection, hexadecimal.
        links: What it builds on, the oldest first.
    """

    source: str
    config: SFAConfig
    state: dict[str, Tensor]
    digest: str
    links: tuple[Link, ...]


class Search:
    """Finds earlier adapters by their files alone; each folder is read and followed once.

    A candidate must name, and be, exactly what the later one recorded, so chains only get shorter
    from one to the one before: no folders, whatever they say, lead round in a circle.
    """

    def __init__(self) -> None:
        self._read: dict[str, SavedFiles | AdapterFileError] = {}
        self._followed: dict[str, tuple[SavedFiles, ...] | None] = {}
        self._errors: dict[str, AdapterFileError] = {}  # by their texts

    def read(self, source: str) -> SavedFiles:
        """Return what the files of an adapter say (AdapterFileError if they cannot be read)."""
        key = _key(source)
        if key not in self._read:
            try:
                self._read[key] = _read_files(source)
            except AdapterFileError as error:
                self._read[key] = error
        found = self._read[key]
        if isinstance(found, AdapterFileError):
            raise found
        return found

    def earlier(self, links: Sequence[Link], folder: str | None) -> tuple[SavedFiles, ...]:
        """Return the adapters that an adapter's links name, the oldest first.

        Raises:
            AdapterFileError: With the first cause, if one is not found as it was.
        """
        self._errors = {}
        found = self._follow(links, folder)
        if found is not None:
            return found
        cause, *others = self._errors.values()
        more = f" ({len(others)} more at other places.)" if others else ""
        raise AdapterFileError(
            f"{folder or 'The adapter'} continues `{links[-1].source}` and needs it as it was "
            f"then: {cause}{more} Put the earlier adapter there or beside the new one."
        ) from cause

    def _follow(self, links: Sequence[Link], folder: str | None) -> tuple[SavedFiles, ...] | None:
        if not links:
            return ()
        wanted = [link.digest for link in links]
        for place in _places(links[-1].source, folder):
            try:
                last = self.read(place)
            except AdapterFileError as error:
                self._errors[str(error)] = error
                continue
            if [*(link.digest for link in last.links), last.digest] != wanted:
                text = f"{place}: its selection (or one before) is another now."
                self._errors[text] = AdapterFileError(text)
                continue
            key = _key(place)
            if key not in self._followed:
                self._followed[key] = self._follow(last.links, place)
            before = self._followed[key]
            if before is not None:
                return (*before, last)
        return None


def _places(source: str, folder: str | None) -> list[str]:
    """Return where an earlier adapter may be: as given, or seen from the later one's folder."""
    found = [source]
    if folder is not None and _is_there(folder):
        inside, beside = Path(folder) / source, Path(folder).resolve().parent / Path(source).name
        found = [str(inside), source, str(beside)]
    there = [_key(place) for place in found if _is_there(f"{place}/adapter_config.json")]
    return list(dict.fromkeys(there)) or [source]


def _key(source: str) -> str:
    """Return what is the same for all ways to write a folder."""
    return str(Path(source).resolve()) if _is_there(source) else source


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # no name of a file
        return False


def _read_files(source: str) -> SavedFiles:
    try:
        config = PeftConfig.from_pretrained(source)
        if not isinstance(config, SFAConfig):
            raise AdapterFileError(f"{source}: its config is not of an SFA adapter.")
        if config.resolved is None:
            raise AdapterFileError(
                f"{source}: its config does not say what it was solved to; it was not written by "
                "save_pretrained. Save the adapter again."
            )
        SFAConfig.from_pretrained(source)  # checks that the tensors are whole
        state, links = load_peft_weights(source, device="cpu"), read_resolved(config.resolved).chain
        key = packed_key(state)
        digest = _digest(None if key is None else state[key])
        return SavedFiles(source, config, state, digest, links)
    except SFAError:
        raise
    except Exception as error:  # of the Hub's client, of safetensors, of JSON
        raise AdapterFileError(
            f"{source}: no adapter can be read there ({type(error).__name__}: {error}). Give the "
            "folder that save_pretrained wrote, or a Hub id."
        ) from error


def packed_key(state: dict[str, Tensor]) -> str | None:
    """Return the key of the stored selection, None where there is none."""
    return next((key for key in state if key.endswith("sfa_packed")), None)


def _digest(packed: Tensor | None) -> str:
    found = hashlib.sha256()
    if packed is not None:
        found.update(packed.contiguous().numpy().data)
    return found.hexdigest()
