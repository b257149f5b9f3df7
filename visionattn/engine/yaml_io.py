"""YAML as users expect it: `1e-3` is a number, `no` is a word, a key given twice is an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from visionattn.errors import InputError, as_input_error, one_line


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (PyYAML's 1.1 reads `1e-3` as text and `no` as false) and unique keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?\d[\d_]*|0o[0-7]+|0x[\da-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_OLD = tuple(f":{name}" for name in (*_SCALARS, "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(_OLD)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that one of the dialects would read as something else: ours, or YAML 1.1."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds these breaks of lines, where it does not escape them.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)
for _name, (_pattern, _firsts) in _SCALARS.items():
    for _dialect in (_Loader, _Dumper):
        _regexp = re.compile(rf"^(?:{_pattern})$")
        _dialect.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _regexp, list(_firsts))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    """Decimal also with a leading zero, which YAML 1.1 takes for octal."""
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        InputError: the file is missing, is not UTF-8 or not YAML, or is not a mapping.
    """
    if not path.is_file():
        raise InputError(f"there is no configuration file {path}")
    with as_input_error(f"cannot read {path} as UTF-8", OSError, UnicodeDecodeError):
        text = path.read_bytes().decode("utf-8-sig")
    content = parse_value(text, where=str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold `key: value` lines, but holds a {type(content).__name__}")
    return content


def parse_value(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in the error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # at tags such as `!!float x` PyYAML fails in any way that Python knows
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
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_value(value: Any) -> str:
    """A plain value on one line, as it would stand in a configuration."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n...\n").strip()
