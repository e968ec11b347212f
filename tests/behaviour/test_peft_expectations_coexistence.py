# SPDX-License-Identifier: Apache-2.0
"""One name in PEFT's tables: imported twice, taken by others, and programs without the import."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

from sfa_peft import SFAConfig
from sfa_peft.__main__ import main
from tests.processes import run_code, run_module
from tests.tiny import MLP

ROOT = Path(__file__).parents[2]
#: How packages outside PEFT's tree put a method into its tables.
REGISTRATIONS = {
    "plain strings in the tables": """
PeftType.SFA = "SFA"
for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
    table["SFA"] = Theirs
PEFT_TYPE_TO_PREFIX_MAPPING["SFA"] = "sfa_"
""",
    "a member of the enum": """
member = str.__new__(PeftType, "SFA")
member._name_ = member._value_ = "SFA"
setattr(PeftType, "SFA", member)
PeftType._member_map_["SFA"] = PeftType._value2member_map_["SFA"] = member
PeftType._member_names_.append("SFA")
register_peft_method(name="sfa", config_cls=Theirs, model_cls=Theirs, prefix="sfa_")
""",
}
AFTERWARDS = 'PEFT_TYPE_TO_CONFIG_MAPPING["SFA"] = PEFT_TYPE_TO_TUNER_MAPPING["SFA"] = Theirs\n'
START = """
from peft import PeftConfig
from peft.mapping import *
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType, register_peft_method
class Theirs(PeftConfig):
    prefix = "sfa_"
"""


def test_reloading_changes_nothing_and_a_second_copy_is_refused():
    script = """
import importlib, sys, sfa_peft, sfa_peft
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
before = dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)
importlib.reload(sfa_peft)
importlib.reload(sfa_peft.tuner)
assert (dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)) == before
print("same")
for name in [n for n in sys.modules if n.partition(".")[0] == "sfa_peft"]:
    del sys.modules[name]
import sfa_peft
"""
    result = run_code(script)
    assert "same" in result.stdout, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "SFAError: PEFT holds another copy of sfa_peft" in last
    assert "Start Python anew" in last


@pytest.mark.parametrize(
    ("how", "module", "message"),
    [
        (
            "plain strings in the tables",
            "their_package.model",
            "from the package `their_package` (their_package.model.Theirs)",
        ),
        (
            "a member of the enum",
            "peft.tuners.sfa.model",
            "has its own method named SFA (peft.tuners.sfa.model.Theirs)",
        ),
    ],
)
def test_a_name_that_is_taken_is_reported_and_stays_theirs(how, module, message):
    script = f"""{START}
Theirs.__module__ = {module!r}
{REGISTRATIONS[how]}
members = list(PeftType)
try:
    import sfa_peft
except ValueError as error:
    print(error)
assert PEFT_TYPE_TO_TUNER_MAPPING["SFA"] is Theirs and list(PeftType) == members
print("theirs")
"""
    result = run_code(script)
    assert message in result.stdout, result.stderr
    assert "theirs" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "afterwards",
    [AFTERWARDS, AFTERWARDS.partition(" = ")[2], 'PEFT_TYPE_TO_CONFIG_MAPPING["SFA"] = Theirs\n'],
)
def test_a_name_that_is_taken_afterwards_is_reported_when_the_config_is_made(afterwards):
    script = f"import sfa_peft\n{START}{afterwards}"
    last = run_code(script + "sfa_peft.SFAConfig()").stderr.strip().splitlines()[-1]
    assert "SFAError: Another package has put its own method (__main__.Theirs)" in last


@pytest.fixture
def program(tmp_path):
    """Return a program that loads an adapter and does not know this library."""
    model = get_peft_model(MLP(), SFAConfig(rho=0, score="magnitude", target_modules=["first"]))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "serve.py"
    path.write_text(
        "import sys; from peft import PeftModel; from helper import MLP\n"
        "model = PeftModel.from_pretrained(MLP(), sys.argv[1])\n"
        "print(__name__, type(model.base_model).__name__, sys.argv[1:])\n"
    )
    (tmp_path / "helper.py").write_text(
        f"import sys; sys.path.append({str(sys.path[0])!r}); sys.path.append({str(ROOT)!r})\n"
        "from tests.tiny import MLP\n"
    )
    return path


@pytest.mark.parametrize("target", [["serve.py"], ["-m", "serve"]])
def test_a_program_runs_with_the_method_registered(program, target):
    result = run_module("sfa_peft", *target, "adapter", cwd=program.parent)
    assert "__main__ SFAModel ['adapter']" in result.stdout, result.stderr


@pytest.mark.parametrize("arguments", [[], ["-m"], ["absent.py"]])
def test_the_runner_says_how_it_is_used(arguments):
    with pytest.raises(SystemExit, match=r"usage: python -m sfa_peft program\.py"):
        main(arguments)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_no_error(flag):
    result = run_module("sfa_peft", flag)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: python -m sfa_peft program.py")


@pytest.mark.parametrize("name", ["nope", "nope.inner", "tests.tiny.inner", "email"])
def test_a_module_that_cannot_be_run_ends_in_one_line(name):
    with pytest.raises(SystemExit, match=r"^python -m sfa_peft: [^\n]*module '[^\n]*$"):
        main(["-m", name])


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_and_a_zip_file_run_as_with_python(zipped, tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "helper.py").touch()
    with pytest.raises(SystemExit, match=r"^python -m sfa_peft: there is no __main__\.py in"):
        main([str(folder)])
    (folder / "__main__.py").write_text(
        "import sys, helper\nprint(__name__, sys.argv[1:], sys.path[0])\n"
    )
    name = "program.zip" if zipped else "program"
    if zipped:
        shutil.make_archive(str(folder), "zip", folder)
    plain = [sys.executable, name, "a"]
    expected = subprocess.run(plain, capture_output=True, text=True, check=True, cwd=tmp_path)
    result = run_module("sfa_peft", name, "a", cwd=tmp_path)
    assert Path(result.stdout.split()[-1]).name == name, result.stderr
    assert result.stdout.split()[:-1] == expected.stdout.split()[:-1]
