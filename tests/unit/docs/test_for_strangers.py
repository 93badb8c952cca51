"""What a stranger meets first: the workflow, the bug form and the citation are what their readers' schemas take."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner

from tests.federation import REPOSITORY

GITHUB = REPOSITORY / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").iterdir())
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").iterdir())
CITATION = REPOSITORY / "CITATION.cff"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def complaints(schema: str, *files: Path) -> str:
    """What a schema that comes with check-jsonschema has against files; "" for nothing."""
    done = CliRunner().invoke(check_jsonschema, ["--builtin-schema", f"vendor.{schema}", *map(str, files)])
    return done.output if done.exit_code else ""


@pytest.mark.parametrize(
    ("schema", "files"),
    [("github-workflows", WORKFLOWS), ("github-issue-forms", FORMS), ("citation-file-format", [CITATION])],
    ids=["workflows", "forms", "citation"],
)
def test_its_schema_takes_it_and_takes_not_everything(schema: str, files: list[Path], tmp_path: Path) -> None:
    assert files
    assert complaints(schema, *files) == ""
    wrong = tmp_path / files[0].name
    wrong.write_text(re.sub(r"^(jobs|body|authors):", "things:", files[0].read_text(), flags=re.MULTILINE))
    assert "things" in complaints(schema, wrong)


def test_the_workflow_runs_ci_on_every_python_that_is_promised() -> None:
    (workflow,) = [yaml.safe_load(path.read_text()) for path in WORKFLOWS]
    (job,) = workflow["jobs"].values()
    promised = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert job["strategy"]["matrix"]["python"] == promised
    (run,) = [step for step in job["steps"] if "run" in step]
    assert run == {"run": ".ci/run", "env": {"PYTHON": "python${{ matrix.python }}"}}
    assert (REPOSITORY / ".ci" / "run").stat().st_mode & 0o111


def test_the_workflow_has_few_rights_and_pinned_actions() -> None:
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        assert "secrets" not in path.read_text()
        for job in workflow["jobs"].values():
            assert "permissions" not in job
            for step in job["steps"]:
                assert re.fullmatch(r"[\w/-]+@(v\d+|[0-9a-f]{40})", step.get("uses", "none@v0"))


def test_the_bug_form_asks_for_version_and_check() -> None:
    (form,) = [yaml.safe_load(path.read_text()) for path in FORMS]
    asked = {part["attributes"]["label"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert {"`fedmpt --version`", "`fedmpt check JOB.TOML --json`"} <= asked


def test_the_citation_is_of_this_release() -> None:
    citation = yaml.safe_load(CITATION.read_text())
    assert {name: citation[name] for name in ("version", "license")} == {
        name: PROJECT[name] for name in ("version", "license")
    }
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
