"""docs/design/001-compiler.md is what the compiler prints today."""

from __future__ import annotations

from tools import design_page


def test_page_is_up_to_date():
    assert design_page.PAGE.read_text() == design_page.page(), "run: python -m tools.design_page"


def test_page_is_the_same_every_time():
    assert design_page.page() == design_page.page()
