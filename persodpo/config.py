"""Profile file in, frozen settings out: an unknown key or an impossible value is an error.

A profile is one YAML file that names every setting of a run (`persodpo.settings`). The same code runs under every
profile; what differs stands in the profile and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from persodpo.errors import PersodpoError
from persodpo.settings import Profile

PROFILES = Path(__file__).parent / "profiles"
DEFAULT_PROFILE = "mini"


def profile_names() -> list[str]:
    """Return the names of the profiles that ship with the package, sorted."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str | Path = DEFAULT_PROFILE, overrides: Sequence[str] = ()) -> Profile:
    """Read a profile, apply overrides, and check every value.

    Args:
        name: A shipped profile's name (see `profile_names`) or the path of a YAML file.
        overrides: Assignments such as ``"pairs.low_quantile=0.3"``; the value is read as YAML.

    Returns:
        The frozen profile.

    Raises:
        PersodpoError: The profile does not exist, is not YAML, or holds an unknown key or an impossible value; the
            message names the key's path and what is allowed there.
    """
    path = PROFILES / f"{name}.yaml" if str(name) in profile_names() else Path(name)
    if not path.is_file():
        raise PersodpoError(
            f"Profile '{name}' is neither a shipped profile ({', '.join(profile_names())}) nor a YAML file; there is no "
            f"{path.absolute()}."
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PersodpoError(f"Profile {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(settings, dict):
        raise PersodpoError(f"Profile {path} must hold sections such as 'dialogues:' and 'pairs:', not a single value.")
    return _resolve(settings, overrides, str(name))


def with_overrides(profile: Profile, overrides: Sequence[str]) -> Profile:
    """Return ``profile`` with some settings changed; overrides, checks and errors as in `load_profile`."""
    return _resolve(profile.model_dump(mode="json"), overrides, profile.name)


def _resolve(settings: dict[str, Any], overrides: Sequence[str], name: str) -> Profile:
    """Apply ``overrides`` to ``settings`` in place and check the outcome."""
    for assignment in overrides:
        _assign(settings, assignment)
    try:
        return Profile.model_validate(settings)
    except ValidationError as error:
        raise PersodpoError(f"Profile '{name}': {_explain(error)}") from error


def _assign(settings: dict[str, Any], assignment: str) -> None:
    """Apply one ``section.key=value`` to the nested ``settings`` in place."""
    key, equals, value = assignment.partition("=")
    *sections, leaf = key.strip().split(".")
    if not equals or not leaf:
        raise PersodpoError(f"Override '{assignment}' must read section.key=value, for example pairs.low_quantile=0.3.")
    node = settings
    for section in sections:
        child = node.get(section)
        if not isinstance(child, dict):
            raise PersodpoError(f"Override '{assignment}': '{section}' is no section; {_allowed(node, section)}")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise PersodpoError(f"Override '{assignment}': the value is not valid YAML.") from error


def _allowed(names: Sequence[str] | dict[str, Any], wrong: str) -> str:
    """Name the allowed keys, the nearest first when there is one."""
    near = difflib.get_close_matches(wrong, list(names), n=1)
    return (f"did you mean '{near[0]}'? " if near else "") + f"Allowed here: {', '.join(names)}."


def _section_at(location: Sequence[Any]) -> type[BaseModel] | None:
    """Return the model class of the section that ``location`` points into; a list's entries are told apart by kind."""
    sections: list[type[BaseModel]] = [Profile]
    for part in location:
        if isinstance(part, int):
            continue
        of_kind = [section for section in sections if part in _kinds(section)]
        fields = (section.model_fields.get(str(part)) for section in sections)
        sections = of_kind or [inner for field in fields if field for inner in _sections_in(field.annotation)]
    return sections[0] if sections else None


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    """Return the kinds of list entries that a section describes, none for other sections."""
    return get_args(section.model_fields["kind"].annotation) if "kind" in section.model_fields else ()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation allows, however deep they stand in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _explain(error: ValidationError) -> str:
    """Turn pydantic's report into sentences that name each key's path and what is allowed there."""
    sentences = []
    for item in error.errors():
        location = item["loc"]
        path = ".".join(str(part) for part in location) or "the profile"
        if item["type"] == "extra_forbidden":
            section = _section_at(location[:-1])
            allowed = list(section.model_fields) if section else []
            sentences.append(f"{path} is an unknown key; {_allowed(allowed, str(location[-1]))}")
        elif item["type"] == "missing":
            sentences.append(f"{path} is missing; every key must be set.")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = "" if isinstance(item["input"], (dict, BaseModel)) else f", not {item['input']!r}"
            sentences.append(f"{path}: {message}{given}.")
    return " ".join(sentences)
