"""The documentation against the scripts: tags, commands, code, links, and a docstring under every flag."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, to_argv
from packaging.requirements import Requirement
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import maml_trpo

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def read(path):
    """A page's text; every page is there once README.md is."""
    if not README.exists():
        pytest.skip("README.md is still to be written")
    assert path.exists(), f"{path.relative_to(ROOT)} is missing"
    return path.read_text()


def code(text, language=r"\w*"):
    """The contents of the fenced blocks of a page, with the indentation of a list taken off."""
    found = re.finditer(rf"^( *)```{language} *\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{match[1]}", "", match[2], flags=re.MULTILINE) for match in found]


def commands(text, script):
    """The arguments of every call of a script in the fenced blocks, where it is python or torchrun that calls it."""
    lines = "\n".join(code(text)).replace("\\\n", " ").splitlines()
    calls = [
        re.search(rf"(?:python|torchrun)\b[^;&|#]*?\b{script}\.py\b([^;&|>#]*)", line)
        for line in lines
    ]
    calls = [
        re.sub(r"\$\{?\w+\}?", "1", call[1]) for call in calls if call
    ]  # of a loop in the shell, one turn
    # a run that is to go on does not exist here: its other flags are checked all the same
    return [shlex.split(re.sub(r"--(resume|evaluate)[ =]\S+", "", call)) for call in calls]


def mentions(text, tag):
    """Whether a page has the tag, or its pattern with {n} in place of the number of episodes."""
    patterns = {tag, re.sub(r"_\d+_", "_{n}_", tag)}
    return any(re.search(rf"(?<![\w/]){re.escape(pattern)}(?![\w/])", text) for pattern in patterns)


def test_every_tag_is_documented(script, train):
    text = read(ROOT / "docs" / f"{script.__name__}.md")
    folder, _ = train(script, env_id="SparsePointRobot-v0", eval_every=1)
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert "eval/success_after_0_episodes" in tags
    assert not [tag for tag in tags if not mentions(text, tag)]


def test_commands_parse(script, capsys):
    found = [argv for page in PAGES for argv in commands(read(page), script.__name__)]
    docs = commands(read(ROOT / "docs" / f"{script.__name__}.md"), script.__name__)
    assert docs and len(found) > len(docs), "README.md and the script's page show how to call it"
    for argv in found:
        try:
            script.parse(script.Args, argv)
        except SystemExit:
            pytest.fail(f"{shlex.join(argv)}\n{capsys.readouterr().err}")


def test_python_in_the_readme_compiles():
    for source in code(read(README), "python"):
        compile(source, "README.md", "exec")


def test_python_in_the_readme_runs(train, tmp_path):
    """The task to save as a module, and the use of a checkpoint."""
    blocks = code(read(README), "python")
    (tmp_path / "my_tasks.py").write_text(
        next(block for block in blocks if "def set_task" in block)
    )
    train(maml_trpo, env_id="my_tasks:Reach-v0", horizon=0)
    folder, _ = train(maml_trpo, env_id="Navigation2D-v0", hidden_size=64)
    folder.rename("runs/NAME")
    exec(next(block for block in blocks if "runs/NAME/checkpoint.pt" in block), {})


def test_python_of_the_tasks_page_runs(script, train, tmp_path):
    """The three doors, each saved as the page says."""
    text = read(ROOT / "docs" / "tasks.md")
    pages = [("my_tasks", "Reach-v0"), ("my_lanes", "Reaches-v0")]
    for module, env_id in [*pages, ("my_tensors", "DriftingReaches-v0")]:
        (source,) = (x for x in code(text, "python") if f'gym.register("{env_id}"' in x)
        (tmp_path / f"{module}.py").write_text(source)
        _, metrics = train(script, env_id=f"{module}:{env_id}", horizon=0, total_timesteps=700)
        assert metrics["charts/episodic_length"] == 20
        sys.modules.pop(module)


@pytest.mark.parametrize("page", PAGES or [README], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = read(page)
    for block in code(text):
        text = text.replace(block, "")
    links = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    paths = [link.split("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    assert not [path for path in paths if not (page.parent / path).exists()]


def test_every_flag_has_its_help_beside_it(script):
    """One line a flag, which --help prints."""
    source = Path(script.__file__).read_text().splitlines()
    (args,) = (
        node
        for node in ast.parse("\n".join(source)).body
        if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    fields = [node for node in fields if not ast.unparse(node.annotation).startswith("ClassVar")]
    assert len(fields) > 20
    for node in fields:
        assert node.lineno == node.end_lineno
        assert re.search(r"  # \S.{3,}$", source[node.lineno - 1]), source[node.lineno - 1]
    names = {node.target.id for node in fields}
    assert script.Args.may_be_zero | script.Args.at_most_one <= names


def requirements(path):
    """Its lines, without options and comments."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def test_requirements_of_a_script(script):
    """Those at its top, for uv run, are those of requirements.txt but for MuJoCo."""
    block = re.search(
        r"^# /// script\n(.*?)^# ///$", Path(script.__file__).read_text(), re.M | re.S
    )
    text = re.sub(r"^# ?", "", block[1], flags=re.MULTILINE)
    tomllib = pytest.importorskip("tomllib", reason="is new in Python 3.11")
    header = tomllib.loads(text)
    expected = requirements(ROOT / "requirements.txt")
    expected = [need for need in expected if need.name != "mujoco"]
    assert {*map(Requirement, header["dependencies"])} == {*expected}
    assert header["requires-python"] == ">=3.10" and "Python 3.10 to" in read(README)


def test_the_published_versions_are_allowed():
    """What the tests are run with lies in the ranges of requirements.txt."""
    ranges = {need.name: need.specifier for need in requirements(ROOT / "requirements.txt")}
    for need in requirements(ROOT / "tests" / "constraints.txt"):
        (version,) = need.specifier
        assert version.operator == "==" and ranges[need.name].contains(version.version)


# -------------------------------------------------------------------------------------------- the helpers can be wrong


def test_commands_are_found():
    text = """
    python outside.py --seed 1
```
python maml_trpo.py --env-id PointRobot-v0 \\
    --seed 2  # why
for seed in 1 2; do .venv/bin/python maml_trpo.py --seed $seed & done
torchrun --nproc-per-node=2 maml_trpo.py --resume runs/NAME --total-timesteps 3 > log
python maml_trpo.py
python other.py --seed 4
```
1. a list

   ```bash
   python maml_trpo.py --exp-name "a b"
   ```
"""
    expected = [
        ["--env-id", "PointRobot-v0", "--seed", "2"],
        ["--seed", "1"],
        ["--total-timesteps", "3"],
        [],
    ]
    assert commands(text, "maml_trpo") == [*expected, to_argv({"exp_name": "a b"})]
    assert code("```python\nx = 1\n```\n```bash\nls\n```\n", "python") == ["x = 1\n"]


def test_tags_are_found():
    text = "`losses/kl`, `eval/return_after_{n}_episodes` and `charts/SPS_2`"
    assert mentions(text, "losses/kl") and mentions(text, "eval/return_after_20_episodes")
    assert (
        not mentions(text, "charts/SPS")
        and not mentions(text, "losses/k")
        and not mentions(text, "eval/return")
    )
