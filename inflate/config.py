"""Read a command's settings: dataclass defaults < YAML files < `key=value` arguments, from left to right.

A schema is a dataclass whose fields are `bool int float str Path Literal X | None list tuple dict Enum` or dataclasses
(groups of settings), each followed by a one-line docstring. Values are converted by OmegaConf's structured configs;
nothing past `load` sees anything but plain dataclass instances. This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import itertools
import json
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from inflate import aliases
from inflate.errors import ConfigError, report_errors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)
    Schema = type[DataclassInstance]

__all__ = [
    "ConfigError", "check", "dotted", "dump", "flat", "from_command_line", "help_text", "is_argument", "leaves", "load",
    "load_each", "names", "parse", "report_errors", "translate",
]  # fmt: skip

NOT_SET = "???"
"""How a required setting without a value is written; OmegaConf's word for it."""
WIDTH = 120
_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_MAP = "tag:yaml.org,2002:map"
_FLOAT = "tag:yaml.org,2002:float"
_WORDS: dict[Any, str] = {
    types.NoneType: "null",
    str: "text",
    bool: "true or false",
    Path: "a path",
    int: "an int",
    float: "a float",
}
_ARGUMENT = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
_MISSPELT = 0.75
"""Likeness of two words from which on one is taken for the other misspelt: modle for model, daat for data."""
_PAIR = re.compile(r"\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w")
"""A character that JSON writes as two."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with `1e-5` a number, as everybody means it."""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read back as text."""


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+0123456789"))


def load(schema: type[T], sources: Sequence[str], defaults: Path | None = None, partial: bool = False) -> T:
    """Return `schema` with `sources` laid over the file `defaults` over the schema's own defaults, later ones winning.

    A source is a YAML file, `key=value`, or a flag of diffusers' scripts that stands for one (`inflate.aliases`). With
    `partial`, what a file says of other schemas is passed over: a part of a recipe's settings is read from the recipe's
    own files. Raises `ConfigError` naming the setting and where it was written.
    """
    return _instance(schema, _merge(schema, sources, defaults, partial))


def load_each(schema: type[T], file: Path, word: str) -> list[T]:
    """Return an instance of `schema` for each entry of the list in a YAML or JSON file; `word` is what one is called.

    Raises `ConfigError` naming the entry by its number and line, and the setting.
    """
    node = _node(_in_yaml(_text(str(file)), file), str(file))
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise ConfigError(f"{file}: expected a list of {word}s, each of lines `setting: value`")
    return [_entry(schema, entry, str(file), f"{word} {number}") for number, entry in enumerate(node.value, 1)]


def check(schema: Schema, sources: Sequence[str]) -> None:
    """Raise `ConfigError` if a source holds an unknown setting or a wrong value; settings may be missing."""
    _merge(schema, sources, None)


def names(schema: Schema) -> list[str]:
    """Return the dotted names of all settings and groups of settings."""
    return list(_paths(schema))


def is_argument(source: str) -> bool:
    """Whether a source is `key=value`, and not a file's name."""
    return _ARGUMENT.match(source) is not None


def translate(schema: Schema, arguments: Sequence[str]) -> list[str]:
    """Return a command line as YAML files and `key=value` alone; say on standard error what each flag has set."""
    texts = []
    for written, meant in aliases.translate(arguments, names(schema)):
        texts += meant
        if written.startswith("-") and "=" in meant[0] and os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{written}: {' '.join(meant)}\n")
    return texts


def dotted(file: Path) -> dict[str, Any]:
    """Return what a YAML file sets, by dotted name, whatever its schema; raises `ConfigError` if it cannot be read."""
    return parse(_text(str(file)), str(file))


def parse(text: str, name: str) -> dict[str, Any]:
    """Return what YAML text sets, by dotted name, as `dotted` of a file called `name`."""
    try:
        return dict(leaves(_Loader("").construct_document(_composed(text, name).entries)))
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}{_line(error)}: not valid YAML: {_problem(error)}") from None


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings, each with its dotted name."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flat(config: DataclassInstance) -> dict[str, Any]:
    """Return all settings of `config` by dotted name, as `dotted` reads them from its `dump`."""
    return dict(leaves(_plain(config)))


def dump(config: DataclassInstance) -> str:
    """Return `config` as YAML text that `load` reads back as an equal instance."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def help_text(schema: Schema, defaults: Path | None = None) -> str:
    """Return the default settings as YAML, each with its field's docstring as a comment."""
    return "\n".join(_help_lines(schema, _values(schema, None, _merge(schema, (), defaults)), indent=0)) + "\n"


@report_errors()
def from_command_line(schema: type[T], defaults: Path | None = None, arguments: Sequence[str] | None = None) -> T:
    """Read a recipe's settings from its command line; answer --help; end with status 1 on an error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        name = Path(sys.argv[0]).name
        sys.stdout.write(f"usage: {name} [FILE.yaml] [key=value] ...   (later ones win)\n\n")
        sys.stdout.write(help_text(schema, defaults))
        sys.stdout.write(f"\nflags of diffusers' scripts, and what they set here:\n{aliases.table(names(schema))}")
        sys.exit(0)
    return load(schema, translate(schema, arguments), defaults)


# Sources: from files and arguments to a tree of converted values.


@dataclasses.dataclass(frozen=True)
class _Source:
    """One YAML file or one argument, and the YAML nodes read from it."""

    name: str
    entries: yaml.MappingNode
    argument: str | None = None
    """The text after `key=`, None for a file."""

    def at(self, node: yaml.Node) -> str:
        """Say where `node` was written."""
        return f"{self.name}:{node.start_mark.line + 1}" if self.argument is None else f"argument {self.name}"


def _merge(schema: Schema, sources: Sequence[str], defaults: Path | None, partial: bool = False) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    read = [] if defaults is None else [_file(str(defaults))]
    texts = [text for _, meant in aliases.translate(sources, names(schema)) for text in meant]
    read += [_argument(text) if is_argument(text) else _file(text) for text in texts]
    for source in read:
        _lay(schema, tree, (), _own(schema, source) if partial else source.entries, source)
    return tree


def _own(schema: Schema, source: _Source) -> yaml.MappingNode:
    """The entries of a file whose first word is a setting of the schema; all of an argument's, which must be one."""
    words, own = list(_hints(schema)), []
    for key, node in source.entries.value:
        first, _, rest = str(key.value).partition(".")
        if source.argument is None and first not in words:
            continue
        if rest and first not in words and not _is_misspelt(first, words):
            told = f"{first} is not read here, where a run's other settings count for nothing: leave it out"
            raise ConfigError(f"{source.at(key)}: {told}; what is read: {', '.join(words)}")
        own.append((key, node))
    return yaml.MappingNode("", own)


def _is_misspelt(word: str, words: Sequence[str]) -> bool:
    """Whether a word is one of others misspelt; of another group (text_to_video of image_text_to_video) it is not."""
    return any(not near.endswith(word) for near in difflib.get_close_matches(word, words, 1, _MISSPELT))


def _argument(text: str) -> _Source:
    key, value = text.split("=", 1)
    try:
        node = yaml.compose(value, Loader=_Loader) or _scalar("", _NULL)
    except yaml.YAMLError:  # text such as *.mp4 or @home; a field that is no text will refuse it
        node = _scalar(value, _TEXT)
    return _Source(text, yaml.MappingNode(_MAP, [(_scalar(key, _TEXT), node)]), value)


def _scalar(value: str, tag: str) -> yaml.ScalarNode:
    return yaml.ScalarNode(tag, value)


def _file(name: str) -> _Source:
    return _composed(_text(name), name)


def _text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file{_other_file(name)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot be read as a YAML file: {error}") from None


def _node(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}{_line(error)}: not valid YAML: {_problem(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: cannot be read as a YAML file: {error}") from None


def _in_yaml(text: str, file: Path) -> str:
    """Write what JSON has and YAML has not, tabs and characters in two halves, in YAML; the lines stay."""
    if file.suffix != ".json":
        return text
    return _PAIR.sub(lambda pair: str(json.loads(f'"{pair[0]}"')), text.replace("\t", " "))


def _entry(schema: type[T], node: yaml.Node, file: str, name: str) -> T:
    """Return the instance of one entry of a file's list."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name} of {_Source(file, yaml.MappingNode(_MAP, [])).at(node)}: expected `setting: value`")
    source, tree = _Source(file, node), dict[str, Any]()
    try:
        _lay(schema, tree, (), node, source)
    except ConfigError as error:
        raise ConfigError(f"{name} of {error}") from None
    try:
        return _instance(schema, tree)
    except ConfigError as error:
        raise ConfigError(f"{name} of {source.at(node)}: {error}") from None


def _composed(text: str, name: str) -> _Source:
    node = _node(text, name)
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{name}: expected lines of `setting: value`")
    return _Source(name, node or yaml.MappingNode(_MAP, []))


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).split("\n")[0]


def _other_file(name: str) -> str:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return "; settings are written key=value"
    names = [other.name for other in path.parent.glob("*.y*ml")]
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def _lay(
    schema: Schema,
    tree: dict[str, Any],
    path: tuple[str, ...],
    node: yaml.MappingNode,
    source: _Source,
) -> None:
    """Lay a mapping's settings over `tree`, the values of the group at `path`."""
    seen: set[str] = set()
    for key, value in node.value:
        name = str(key.value)
        if name in seen:
            raise ConfigError(f"{source.at(key)}: {'.'.join((*path, name))} is set twice in this file")
        seen.add(name)
        _set(schema, tree, (*path, *name.split(".")), key, value, source)


def _set(
    schema: Schema,
    tree: dict[str, Any],
    path: tuple[str, ...],
    key: yaml.Node,
    node: yaml.Node,
    source: _Source,
) -> None:
    """Set the one setting (or group of settings) at `path`, counted from the root of the schema."""
    group, branch = schema, tree
    for name in path[:-1]:
        child = _group(_hints(group).get(name))
        if child is None:
            raise _unknown(schema, path, source.at(key))
        if branch.get(name) is None:
            branch[name] = {}
        group, branch = child, branch[name]
    hint = _hints(group).get(path[-1])
    if hint is None:
        raise _unknown(schema, path, source.at(key))
    if _group(hint) is None:
        if node.value != NOT_SET:
            branch[path[-1]] = _convert(group, path, node, source, source.at(key))
    elif isinstance(node, yaml.MappingNode):
        branch[path[-1]] = branch.get(path[-1]) or {}  # switches an optional group on, even without entries
        _lay(schema, tree, path, node, source)
    elif node.tag == _NULL and types.NoneType in typing.get_args(hint):
        branch[path[-1]] = None
    else:
        raise ConfigError(f"{source.at(key)}: {'.'.join(path)} is a group of settings{_members(hint)}")


def _convert(group: Schema, path: tuple[str, ...], node: yaml.Node, source: _Source, where: str) -> Any:
    """Return the value of `node` as the field's type, or raise `ConfigError`."""
    name, hint = path[-1], _hints(group)[path[-1]]
    try:
        value = _read(hint, node, source.argument)
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{where}: {'.'.join(path)} holds '${{': settings are written out, nothing is filled in")
        if _members_of(hint) == (bool,) and not isinstance(value, bool | None):
            raise ValueError("OmegaConf would take any number")
        structure = _structure(group)
        OmegaConf.update(structure, name, value, merge=False)
        value = structure[name]
        return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, yaml.YAMLError, ValueError):
        raise ConfigError(f"{where}: {'.'.join(path)} must be {_describe(hint)}, not {_shown(node, source)}") from None


def _read(hint: Any, node: yaml.Node, argument: str | None) -> Any:
    """Return the plain value of `node`; text fields keep `no`, 007 and 1e-5 as they were typed."""
    if not _is_text(hint) or (node.tag == _NULL and (_optional(hint) or argument is None)):
        return _Loader("").construct_document(node)
    if argument is not None and argument[:1] not in ("'", '"'):
        return argument
    return node.value if isinstance(node, yaml.ScalarNode) else _Loader("").construct_document(node)


@functools.cache
def _structure(group: Schema) -> Any:
    structure = OmegaConf.structured(group)
    OmegaConf.set_readonly(structure, False)  # of a frozen dataclass
    return structure


# Schemas: fields, types, names.


@functools.cache
def _hints(group: Schema) -> dict[str, Any]:
    hints = typing.get_type_hints(group)
    return {field.name: hints[field.name] for field in dataclasses.fields(group) if field.init}


def _members_of(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(member for member in typing.get_args(hint) if member is not types.NoneType) if is_union else (hint,)


def _optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint) or (
        typing.get_origin(hint) is Literal and None in typing.get_args(hint)
    )


def _group(hint: Any) -> Schema | None:
    """Return the dataclass if `hint` is one, or one or None."""
    member, *others = _members_of(hint) or (None,)
    return member if isinstance(member, type) and dataclasses.is_dataclass(member) and not others else None


def _is_text(hint: Any) -> bool:
    def is_text(member: Any) -> bool:
        if typing.get_origin(member) is Literal:
            return all(isinstance(choice, str | None) for choice in typing.get_args(member))
        return isinstance(member, type) and issubclass(member, str | Path | enum.Enum)

    return all(is_text(member) for member in _members_of(hint))


def _describe(hint: Any) -> str:
    """Say a type in words: `one of a, b`, `float or null`, `list of int`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join("null" if choice is None else str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments)
    if origin in (list, tuple):
        inner = [_describe(member) for member in arguments if member is not Ellipsis]
        return f"a list of {inner[0]}" if origin is list or Ellipsis in arguments else f"a list [{', '.join(inner)}]"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(hint.__members__)
    return _WORDS.get(hint) or str(hint if origin else getattr(hint, "__name__", hint))


def _shown(node: yaml.Node, source: _Source) -> str:
    if source.argument is not None:
        return repr(source.argument)
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a sequence"


def _unknown(schema: Schema, path: tuple[str, ...], where: str) -> ConfigError:
    key = ".".join(path)
    return ConfigError(f"{where}: unknown setting {key}{_hint(key, list(_paths(schema)))}")


def renewed(text: str, name: str) -> str:
    """Return the YAML of an earlier version's `dump` with the settings of today's names."""
    tree = _Loader("").construct_document(_composed(text, name).entries)
    for group in [group for group in tree.values() if isinstance(group, dict)]:
        for word, (place, values) in aliases.FORMERLY.items():
            if word in group:
                into, _, setting = place.partition(".")
                tree.setdefault(into, {})[setting] = values[group.pop(word)]
    return yaml.safe_dump(tree, sort_keys=False)


def _hint(key: str, names: list[str]) -> str:
    """Return `; did you mean NAME?` for the nearest of `names`: same last word, else similar spelling."""
    last = key.rpartition(".")[2]
    if last in aliases.FORMERLY:
        place, values = aliases.FORMERLY[last]
        return f"; it is {place} now: {', '.join(f'{new} for {str(old).lower()}' for old, new in values.items())}"
    same = [name for name in names if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, same, 1, 0) or difflib.get_close_matches(key, names, 1)
    if not near:
        words = {name.rpartition(".")[2]: name for name in names}
        near = [words[word] for word in difflib.get_close_matches(last, words, 1)]
    return f"; did you mean {near[0]}?" if near else ""


def _paths(schema: Schema, prefix: str = "") -> Iterator[str]:
    for name, hint in _hints(schema).items():
        yield prefix + name
        child = _group(hint)
        if child:
            yield from _paths(child, f"{prefix}{name}.")


def _members(hint: Any) -> str:
    child = _group(hint)
    return f" ({', '.join(_hints(child))}), not one value" if child else ""


# Values: the tree over the defaults, then instances, text and help.


def _values(schema: Schema, base: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """Return a group's settings, nested groups as dicts: `tree` over the instance `base` over the class's defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        if not field.init:
            continue
        child = _group(_hints(schema)[field.name])
        default = _default(field) if base is None else getattr(base, field.name)
        given = tree.get(field.name, default)
        if child and given is not None:
            branch = tree.get(field.name, {})
            given = _values(child, default if dataclasses.is_dataclass(default) else None, branch)
        values[field.name] = given
    return values


def _instance(schema: type[T], tree: dict[str, Any]) -> T:
    """Return `tree` over the class's defaults; ConfigError where a required setting is missing."""
    values = _values(schema, None, tree)
    missing = list(_missing(schema, values))
    if missing:
        raise ConfigError("; ".join(f"{key} is not set: give {key}=... ({kind})" for key, kind in missing))
    return typing.cast("T", _build(schema, values))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return NOT_SET if field.default is dataclasses.MISSING else field.default


def _missing(schema: Schema, values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        child = _group(_hints(schema)[name])
        if child and isinstance(value, dict):
            yield from _missing(child, value, f"{prefix}{name}.")
        elif isinstance(value, str) and value == NOT_SET:
            yield prefix + name, _describe(_hints(schema)[name])


def _build(schema: Schema, values: dict[str, Any], prefix: str = "") -> DataclassInstance:
    """Make the instances from the innermost outwards, so that each `__post_init__` sees finished groups."""
    settings = {}
    for name, value in values.items():
        child = _group(_hints(schema)[name])
        settings[name] = _build(child, value, f"{prefix}{name}.") if child and isinstance(value, dict) else value
    try:
        return schema(**settings)
    except (ValueError, ConfigError) as error:
        named = not prefix or str(error).startswith(prefix)
        raise ConfigError(str(error) if named else f"{prefix[:-1]}: {error}") from None


def _plain(value: Any) -> Any:
    """Return `value` in the types YAML has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _help_lines(schema: Schema, values: dict[str, Any], indent: int) -> Iterator[str]:
    documents, space = _field_documents(schema), " " * indent
    for name, value in values.items():
        child = _group(_hints(schema)[name])
        nested = child is not None and isinstance(value, dict)
        line = f"{space}{name}:" + ("" if nested else f" {_inline(value)}")
        yield from _commented(line, _comment(documents.get(name, ""), _hints(schema)[name], value), space)
        if child and nested:
            yield from _help_lines(child, value, indent + 2)


def _inline(value: Any) -> str:
    if isinstance(value, str) and value == NOT_SET:
        return NOT_SET
    text = yaml.dump(
        _plain(value), Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()


def _comment(document: str, hint: Any, value: Any) -> str:
    """Return a setting's comment: is it required, what may it be where the value does not show it, its docstring."""
    required = f"required, {_describe(hint)}" if isinstance(value, str) and value == NOT_SET else ""
    shows_type = _group(hint) or _members_of(hint)[0] in (str, bool, int, float, Path)
    kind = "" if required or shows_type else _describe(hint)
    parts = [part for part in (required, document, kind) if part]
    return "; ".join([*(part.removesuffix(".") for part in parts[:-1]), *parts[-1:]])


def _commented(line: str, comment: str, space: str) -> list[str]:
    """Put a comment behind its line, or above it where both are too long for one."""
    if not comment:
        return [line]
    if len(line) + len(comment) + 4 <= WIDTH:
        return [f"{line}  # {comment}"]
    return [*textwrap.wrap(comment, WIDTH, initial_indent=f"{space}# ", subsequent_indent=f"{space}# "), line]


def _field_documents(schema: type) -> dict[str, str]:
    """Return the string written under each field of a dataclass and its bases, by the field's name."""
    documents: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    documents[field.target.id] = " ".join(str(text.value.value).split())
    return documents
