"""pqcad_qat/README.md says what is: its rooms, its rules and its files are the code's own."""

from __future__ import annotations

import architecture_page

from pqcad_qat.commands.schema import schema


def test_the_architecture_page_is_what_the_code_says() -> None:
    assert architecture_page.PAGE.read_text(encoding="utf-8") == architecture_page.page()


def test_editors_read_the_schema_that_the_command_prints() -> None:
    assert architecture_page.SCHEMA.read_text(encoding="utf-8") == schema()


def test_every_module_says_what_it_holds() -> None:
    silent = [path for path in architecture_page.PACKAGE.rglob("*.py") if not architecture_page.summary(path)]
    assert silent == []
