"""What the documents promise exists: links lead somewhere, commands know their options, variables are read."""

import re
import shlex
from pathlib import Path

import click
import pytest

from mergequant.cli.root import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [path.name for path in DOCUMENTS]
SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(mergequant .*)$", re.MULTILINE)
INDENTED = re.compile(r"^    (mergequant .*)$", re.MULTILINE)
INLINE = re.compile(r"`(mergequant \w+ [^`]*)`")


def anchors(text: str) -> set[str]:
    """Names that headings can be linked by."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name) if name else path
        assert place.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_commands_know_their_options(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = [line for block in SHELL.findall(text) for line in COMMAND.findall(block)]
    for line in (*lines, *INDENTED.findall(text), *INLINE.findall(text)):
        words = shlex.split(line, comments=True)[1:]
        command: click.Command = main
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        assert command is not main, f"{path.name}: {line}"
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
        passes_on = command.context_settings.get("ignore_unknown_options", False)  # options of another program
        unknown = [word for word in words if word.startswith("--") and word not in known and not passes_on]
        assert not unknown, f"{path.name}: {line}: {unknown}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_variables_are_read_somewhere(path: Path) -> None:
    for name in set(re.findall(r"MERGEQUANT_[A-Z]+", path.read_text(encoding="utf-8"))):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert any(name in source for source in (*SOURCES, makefile)), f"{path.name} names {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_files_that_are_named_exist(path: Path) -> None:
    folders = r"(?:src|benchmarks|docs|tests|ops|runtime|integrations|bench)"
    for name in set(re.findall(rf"`({folders}/[\w/.-]+\.(?:py|cu|cuh|sh|md|log))`", path.read_text(encoding="utf-8"))):
        assert (ROOT / name).exists() or (ROOT / "src" / "mergequant" / name).exists(), f"{path.name} names {name}"
