"""YAML as users expect it: `1e-3` is a number, `no` is a word, a key given twice is an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from visionattn.errors import InputError, one_line


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (PyYAML's 1.1 reads `1e-3` as text and `no` as false) and unique keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$
        |^[-+]?\d[\d_]*[eE][-+]?\d+$
        |^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is missing, is not YAML, or is not a mapping.
    """
    if not path.is_file():
        raise InputError(f"there is no configuration file {path}")
    content = parse_value(path.read_text(encoding="utf-8"), where=str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold `key: value` lines, but holds a {type(content).__name__}")
    return content


def parse_value(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"cannot read {where} as YAML: {one_line(error)}") from error


def parse_pairs(texts: Sequence[str]) -> dict[str, Any]:
    """The mapping that texts such as `"depths=[2, 2]"` describe; values are YAML.

    Raises:
        InputError: a text without `=`, or with a value that is no YAML.
    """
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"an argument of the network reads key=value, but {text!r} was given")
        pairs[key] = parse_value(value, where=text)
    return pairs


def dump_yaml(content: dict[str, Any]) -> str:
    """A mapping as YAML text that `read_yaml` reads back."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def dump_value(value: Any) -> str:
    """A plain value on one line, as it would stand in a configuration."""
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n...\n").strip()
