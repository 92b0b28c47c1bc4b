"""Names in the code and keys of the configuration are the field's standard terms."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
PACKAGES = ("mvhpc", "launchers", "shards", "benchmarks")

# Word -> the standard term. A name may not contain it, whole or between underscores (`readers_of`, `Readers`).
WORDS = {
    "asked": "query",
    "bend": "film",
    "blind": "masked_level",
    "hindrance": "reason",
    "judged": "held_out",
    "judges": "held_out",
    "meters": "metrics",
    "modulate": "film",
    "question": "query",
    "questions": "queries",
    "readers": "ensemble_members",
    "reveal": "show",
    "said": "prediction",
    "strange": "held_out",
    "surprise": "nll",
    "taught": "in_fold",
    "told": "conditioning",
    "trouble": "warning",
    "trunk": "residual",
    "ward": "process",
}
# Not names of modules or classes; as names of values these words are normal.
DEFINITIONS = {
    "agreement": "compatibility",
    "direct": "direct_io",
    "guard": "watchdog",
    "lead": "head",
    "link": "rendezvous",
    "listening": "bind_address",
    "manage": "jobs",
    "member": "node",
    "people": "records",
    "ranks": "collectives",
    "reader": "encoder",
    "shares": "cross_fitting",
    "temporary": "scratch",
    "whole": "consolidate",
}
FUNCTIONS = {"spread": "map_batches"}
KEYS = {"spread": "temperature"}


def parts(name: str) -> set[str]:
    """The words of a name in snake or camel case, lowercase."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier of a module, parameters and keywords of calls included."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.alias(name=name, asname=alias):
                yield node.lineno, alias or name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield node.lineno, name


def definitions(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, name and standard term of each class or function of a module that has a private name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.lower() in DEFINITIONS:
            yield node.lineno, node.name, DEFINITIONS[node.name.lower()]
        elif isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
            yield node.lineno, node.name, FUNCTIONS[node.name]


def private_words(source: str, module: str) -> list[str]:
    """``line: name: use TERM`` of each private word in a module's text and in its name."""
    tree = ast.parse(source)
    found = {(line, name, WORDS[word]) for line, name in names(tree) for word in parts(name) & WORDS.keys()}
    found |= {(1, module, WORDS[word]) for word in parts(module) & WORDS.keys()}
    found |= {(1, module, DEFINITIONS[module])} if module in DEFINITIONS else set()
    found |= set(definitions(tree))
    return [f"{line}: {name}: use {term}" for line, name, term in sorted(found)]


def private_keys(node: object, path: str = "") -> list[str]:
    """``dotted.key: use TERM`` of each private word among the keys of a configuration."""
    found = []
    terms = WORDS | KEYS
    for key, value in node.items() if isinstance(node, dict) else ():
        found += [f"{path}{key}: use {terms[word]}" for word in parts(str(key)) & terms.keys()]
        found += private_keys(value, f"{path}{key}.")
    return found


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_names_in_the_code_are_standard_terms(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [f"{f.relative_to(ROOT)}:{line}" for f in files for line in private_words(f.read_text(), f.stem)]
    assert not found, "\n".join(found)


def test_keys_of_the_configuration_are_standard_terms() -> None:
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    found = [
        f"{f.relative_to(ROOT)}: {key}"
        for f in files
        for key in private_keys(OmegaConf.to_container(OmegaConf.load(f)))
    ]
    assert not found, "\n".join(found)


def test_every_kind_of_name_is_searched() -> None:
    """An example of each place where a private word can stand; words inside others, and normal uses, are left alone."""
    source = """
import trunk
def spread(questions, *, asked=None): ...
class Ward: ...
call(told=said.reveal)
forward, spread, shares, question_mark = csv.reader, 1, [2], "told"
"""
    expected = {"trunk", "spread", "questions", "asked", "Ward", "told", "said", "reveal", "question_mark"}
    assert {line.split(": ")[1] for line in private_words(source, "forward")} == expected
    assert private_words("", "shares") == ["1: shares: use cross_fitting"]
    assert private_keys({"model": {"readers": 2, "forward": 1}}) == ["model.readers: use ensemble_members"]
