# SPDX-License-Identifier: Apache-2.0
import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft import SFAConfig
from sfa_peft.model_card import make_section, with_section

SECTION = make_section(base="a/b", base_class="ViTModel")


def python_of(section):
    """Return the statements of a section's Python block."""
    return ast.parse(re.search(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[1])


def test_the_card_says_how_to_load_and_says_it_once(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# My adapter\n\nAbout it.\n")
    SFAConfig().save_pretrained(tmp_path)
    SFAConfig().save_pretrained(tmp_path)
    text = card.read_text()
    assert text.startswith("# My adapter\n\n<!-- sfa_peft")
    assert text.endswith("<!-- sfa_peft: end -->\n\nAbout it.\n")
    assert text.count("import sfa_peft  # registers") == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("", "No title.\n"),
        ("---\nlibrary_name: peft\n---", ""),
        ("---\nlibrary_name: peft\n---", "Text.\n\n# A title further down\n"),
        ("---\nlibrary_name: peft\n---\n\n# Title", "<!-- a comment -->\n\n## More\n"),
        ("<!-- one\n# of two lines -->\n\n# Title", "Text.\n"),
        ("", "<!-- that never ends\n# Title\n"),
        ("", "---\nthat never ends\n"),
        ("---\na: b\n---\n<!-- c -->\n# Title", "# Another\n"),
    ],
)
def test_the_section_comes_first_after_metadata_and_title(before, after):
    card = f"{before}\n\n{after}"
    found = with_section(card, SECTION)
    start = found.index("<!-- sfa_peft: written")
    assert found[:start].strip() == before
    assert found[start:] == SECTION + (f"\n{after}" if after else "")
    assert with_section(found, SECTION) == found


@given(st.text(max_size=200))
def test_putting_it_in_twice_changes_nothing_and_keeps_all_other_lines(card):
    once = with_section(card, SECTION)
    assert once.count(SECTION) == 1
    assert with_section(once, SECTION) == once
    rest = once.replace(SECTION, "")
    assert rest.split() == card.split()


HOSTILE = [
    'x"); import os; os.system("touch /tmp/owned"); ("',
    "x\nimport os",
    "x\r\n```\n\n<script>alert(1)</script>",
    "<!-- sfa_peft: end -->",
    "\u202e gnp.exe",
    "C:\\new\\table",
    "x\\",
    "\ud800",
]


@pytest.mark.parametrize("base_class", ["ViTModel", None])
@given(base=st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=60)))
def test_no_name_of_a_base_leaves_its_place_in_the_code(base_class, base):
    section = make_section(base=base, base_class=base_class)
    plain = make_section(base="x", base_class=base_class)
    assert with_section(with_section("# A", section), plain) == with_section("# A", plain)
    statements = ast.dump(python_of(section))
    assert statements == ast.dump(python_of(plain)).replace("'x'", repr(base))
    if base_class:
        assert statements.count(repr(base)) == 1
    assert section.count("\n") == plain.count("\n")
    assert section.isascii()


@pytest.mark.parametrize("base_class", ["x; import os", "os\nimport os", "", "a.b", "\u0430"])
def test_a_class_that_is_no_name_is_left_out(base_class):
    assert "from transformers" not in make_section(base="a/b", base_class=base_class)


def test_metrics_stay_inside_their_cells():
    name = "a|b\n# c <!-- sfa_peft: end -->\u2028d"
    section = make_section(metrics={name: 0.5})
    assert "| a\\|b # c &lt;!-- sfa_peft: end --> d | 0.5 |\n" in section
    assert with_section(with_section("", section), SECTION) == SECTION
