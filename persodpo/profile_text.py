"""What settings are made of, and their text: plain YAML and ``section.key=value`` in, checked sections out, and back.

YAML says where lists and sections stand, and nothing of types: ``010``, ``no``, ``1e-6`` and dates are texts until a field
makes of them what it holds. What cannot be parsed and what looks like a secret is named by its place and never repeated.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from persodpo.errors import PersodpoError


def _filled(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("the text is empty; write one")
    return value


def _file_name(value: Any) -> Any:
    """Refuse what no file can be called, and read a ~ as the shell does."""
    parts = str(value).split("/")
    if "\0" in str(value) or any(len(part.encode("utf-8", "surrogatepass")) > 255 for part in parts):
        raise ValueError("no file can be called so; shorten it")
    return str(Path(value).expanduser()) if str(value).startswith("~/") else value


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a list that names something twice."""
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"'{twice[0]}' stands twice; name each once")
    return values


Count = Annotated[int, Field(ge=1, lt=2**53)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, BeforeValidator(_filled)]
Place = Annotated[Path, BeforeValidator(_filled), BeforeValidator(_file_name)]
#: A text that may be the path of a file or folder.
Name = Annotated[str, BeforeValidator(_filled), BeforeValidator(_file_name)]
_Entry = TypeVar("_Entry")
Several = Annotated[tuple[_Entry, ...], AfterValidator(distinct)]
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no NaN or infinity, no values in error messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _read_texts(cls, values: Any) -> Any:
        """Read the text of a list or section as YAML, and ``null`` or nothing as None where there may be none."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, field in cls.model_fields.items():
            text = values.get(name)
            if not isinstance(text, str):
                continue
            if type(None) in get_args(field.annotation) and text.strip() in {"", "~", "null"}:
                values[name] = None
            elif get_origin(field.annotation) in {tuple, dict} or _sections_in(field.annotation):
                values[name] = read_yaml(text, f"The value of {name}")
        return values

    def to_yaml(self) -> str:
        """Return all settings as a profile file, each with its comment."""
        return "\n".join([*_commented(self), ""])


def setting(comment: str, default: Any = ..., **limits: Any) -> Any:
    """Describe a setting: its one comment, its default (none: it must be given), and pydantic's limits."""
    return Field(default, description=comment, **limits)


class _Loader(yaml.BaseLoader):
    """PyYAML's loader that leaves every value a text; a key may not stand twice, and there are no aliases and tags."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = cast(Any, self).peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem="aliases and tags are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value if isinstance(key, yaml.ScalarNode) else None for key, _ in node.value]
        for number, key in enumerate(keys):
            if key is None or key in keys[:number]:
                fault = "a key is no text" if key is None else "a key stands twice"
                raise yaml.MarkedYAMLError(problem=fault, problem_mark=node.value[number][0].start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """Return the lists, sections and texts of one YAML document; ``where`` names it in messages.

    Raises:
        PersodpoError: It is no plain YAML: aliases are not read, for a few lines of them can stand for gigabytes.
    """
    mark = None
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        fault, mark = error.problem or "it cannot be read", error.problem_mark
    except (yaml.YAMLError, ValueError):
        fault = "it holds characters that cannot be read"
    except RecursionError:
        fault = "it is nested too deeply"
    line = f", line {mark.line + 1}," if mark else ""
    raise PersodpoError(f"{where}{line} is not plain YAML: {fault}; write texts, numbers, lists and sections only.")


def _commented(section: BaseModel, indent: str = "") -> Iterator[str]:
    """Yield the lines of a section as YAML, with the description of every field as its comment."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        comment, *more = (field.description or (type(value).__doc__ or "").splitlines()[0].rstrip(".")).splitlines()
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:  # {comment}"
            yield from _commented(value, f"{indent}  ")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            yield f"{indent}{name}:  # {comment}"
            for entry in value:
                first, *others = _commented(entry, f"{indent}    ")
                yield from (f"{indent}  - {first.strip()}", *others)
        else:
            style: Any = {"default_flow_style": True, "width": 10**9, "allow_unicode": True}
            odd = "\\n" in repr(values[name]) or not str(values[name]).isprintable()
            text = yaml.safe_dump(values[name], **style, default_style='"' if odd else None)
            text = text.strip(" \n").removesuffix("...").strip(" \n")
            yield f"{indent}{name}: {text}  # {comment}"
        yield from (f"{indent}# {line}" for line in more)


def names_of(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields; entries of a list that are told apart by their kind stand under it."""
    for name, field in section.model_fields.items():
        yield before + name
        for inner in _sections_in(field.annotation):
            kind = [inner.kind] if hasattr(inner, "kind") else []
            yield from names_of(inner, ".".join([before + name, *kind, ""]))


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation allows, however deep they stand in it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def resolve(model: type[Model], settings: dict[str, Any], overrides: Sequence[str] = ()) -> Model:
    """Return nested settings, changed by overrides ``section.key=value``, as a section.

    Raises:
        PersodpoError: A key is unknown, a value impossible, or a text looks like a secret, each named by its path; or an
            override is none.
    """
    for assignment in overrides:
        key, equals, text = assignment.partition("=")
        *sections, leaf = key.strip().split(".")
        if not equals or not leaf:
            raise PersodpoError("An override must read section.key=value, for example pairs.low_quantile=0.3.")
        node = settings
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}  # where that is no section, validation says so
            node = node[section]
        node[leaf] = text
    try:
        _refuse_secrets(settings)
        return model.model_validate(settings)
    except ValidationError as error:
        raise PersodpoError(_explain(error, model)) from None
    except RecursionError:
        raise PersodpoError("The settings are nested too deeply; `persodpo profile` shows their form.") from None


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return pydantic's messages with each key's path in front, and the nearest known key for an unknown one."""
    sentences = []
    for item in error.errors(include_url=False, include_input=False):
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such setting"
            paths = {name.rpartition(".")[2]: name for name in reversed([*names_of(model)])}
            near = difflib.get_close_matches(path.rpartition(".")[2], paths, n=1, cutoff=0.85)
            message += f"; did you mean {paths[near[0]]}?" if near else "; `persodpo profile` prints all settings"
        sentences.append(f"{path or 'settings'}: {message}")
    text = "; ".join(sentences)
    return text if text.endswith("?") else f"{text}."


#: What keys of services look like, and addresses with a password or a key in them.
_SECRET = re.compile(
    r"(?<![\w-])(?:(?:sk|gsk|xai|glpat|xox[abp])-|AKIA|AIza)[\w+/=.-]{8,}|(?<!\w)(?:hf_|gh[opsu]_|github_pat_)\w{16,}|(?i:bearer\s+\S{8,})"
    r"|://[^/\s]*@|[?&][\w-]*(?i:key|token|secret|password)="
)


def _refuse_secrets(value: Any, path: str = "") -> None:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_secrets(str(key), path or "A key")
            _refuse_secrets(inner, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, str) and _SECRET.search(value):
        raise PersodpoError(
            f"{path} holds what looks like a key or a password, and a run writes its settings down; put it into an "
            "environment variable and name that in api_key_env."
        )


def read_file(path: Path, shipped: Sequence[str]) -> dict[str, Any]:
    """Return the settings in a YAML file, which must hold sections; ``shipped`` are names to give instead."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        fault = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PersodpoError(
            f"Profile {path.absolute()} cannot be read ({fault}); name a YAML file, or one of {', '.join(shipped)}."
        ) from error
    settings = read_yaml(text, f"Profile {path}")
    if not isinstance(settings, dict):
        raise PersodpoError(f"Profile {path} must hold sections such as 'dialogues:' and 'pairs:', not a single value.")
    return settings
