"""The documentation against the scripts: tags, commands, code, links, and a docstring under every flag."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS, to_argv
from plot import interval, iqm
from plot import read as read_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import maml_trpo

README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FORM = ["The idea", "Pseudo-code", "Equations", "Quick facts", "Usage", "Logged metrics"]
FORM += ["Implementation details", "Deviations from the paper", "Results", "Questions", "Citation"]
IN_FORM = ["maml_trpo", "rl2", "maesn"]  # the other pages are still to come into it


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


def test_python_in_the_readme_runs(train, tmp_path, monkeypatch):
    """The task to save as a module, and the use of a checkpoint."""
    monkeypatch.syspath_prepend(tmp_path)
    blocks = code(read(README), "python")
    (tmp_path / "my_tasks.py").write_text(
        next(block for block in blocks if "def set_task" in block)
    )
    train(maml_trpo, env_id="my_tasks:Reach-v0", horizon=0)
    folder, _ = train(maml_trpo, env_id="Navigation2D-v0", hidden_size=64)
    folder.rename("runs/NAME")
    exec(next(block for block in blocks if "runs/NAME/checkpoint.pt" in block), {})


def test_python_of_the_tasks_page_runs(script, train, tmp_path, monkeypatch):
    """The three doors, each saved as the page says."""
    monkeypatch.syspath_prepend(tmp_path)
    text = read(ROOT / "docs" / "tasks.md")
    pages = [("my_tasks", "Reach-v0"), ("my_lanes", "Reaches-v0")]
    for module, env_id in [*pages, ("my_tensors", "DriftingReaches-v0")]:
        (source,) = (x for x in code(text, "python") if f'gym.register("{env_id}"' in x)
        (tmp_path / f"{module}.py").write_text(source)
        _, metrics = train(script, env_id=f"{module}:{env_id}", horizon=0, total_timesteps=700)
        assert metrics["charts/episodic_length"] == 20
        sys.modules.pop(module)


def prose(text):
    """A page without its fenced blocks."""
    for block in code(text):
        text = text.replace(block, "")
    return text


def section(text, heading):
    """What is under a heading, up to the next one of its level or above."""
    level = heading.split()[0]
    found = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.M | re.S
    )
    assert found, f"no {heading}"
    return found[1]


def anchors(text):
    """Of the headings, as GitHub makes them: no markup and punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(text), re.MULTILINE)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(text):
    """Targets of inline links, of images, and of definitions [name]: target."""
    links = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return links + re.findall(r"^\[[^\]]+\]: +(\S+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES or [README], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = prose(read(page))
    for link in links_of(text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(read(target)), link


@pytest.mark.parametrize("page", PAGES or [README], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_code_are_permanent_and_defined(page):
    """What leads to a file of another repository names a commit; a [text][name] is defined, a definition is used."""
    text = prose(read(page))
    elsewhere = [link for link in links_of(text) if re.search(r"github\.com/.*/blob/", link)]
    assert not [link for link in elsewhere if not re.search(r"/blob/[0-9a-f]{40}/", link)]
    defined = re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE)
    used = re.findall(r"\]\[([^\]]+)\]", text)
    assert sorted(set(used)) == sorted(defined)


@pytest.mark.parametrize("name", IN_FORM)
def test_pages_have_one_form(name):
    text = read(ROOT / "docs" / f"{name}.md")
    assert re.findall(r"^## (.*)", prose(text), re.MULTILINE) == FORM
    results = re.findall(r"^### (.*)", section(text, "## Results"), re.MULTILINE)
    assert results[0] == "The default run" and "What the paper claims" in results
    assert f"(figures/{name}_default.png)" in section(text, "### The default run")
    assert f"(notes/{name}.md" in text and "(glossary.md)" in text
    lines = prose(text).splitlines()
    assert not [x for x in lines if len(x) > 120 and not re.match(r"\||\[[^\]]+\]: |\$\$", x)]


def exists(script, name):
    for part in name.split("."):
        if not hasattr(script, part):
            return False
        script = getattr(script, part)
    return True


@pytest.mark.parametrize("name", IN_FORM)
def test_functions_of_the_equations_exist(name):
    script = importlib.import_module(name)
    text = read(ROOT / "docs" / f"{name}.md")
    rows = [row for row in section(text, "## Equations").splitlines() if row.startswith("| ")]
    named = [re.findall(r"`([\w.]+)`", row.rsplit(" | ", 1)[1]) for row in rows[1:]]
    assert len(named) > 5 and all(named), "each equation has its function"
    (steps,) = code(section(text, "## Pseudo-code"), "text")
    beside = re.findall(r"\s{2,}([\w.]+(?:, [\w.]+)*)$", steps, re.MULTILINE)
    assert len(beside) > 5
    named += [names.split(", ") for names in beside]
    assert not [name for names in named for name in names if not exists(script, name)]


# ------------------------------------------------------------------------------------ numbers of the default runs


def default_runs(name):
    """Columns of benchmarks/results/defaults, a list over seeds."""
    paths = sorted((ROOT / "benchmarks" / "results" / "defaults").glob(f"{name}_*.csv"))
    return [read_csv(path) for path in paths]


def agrees(said, runs, tag):
    """Whether the text "1.2", or "1.2 [0.9, 1.4]" with its interval, is what the runs end with, as far as it says."""
    ends = np.array([run[tag][-1] for run in runs])
    numbers = re.findall(r"-?\d+(?:\.\d+)?", said.split("±")[0])
    expected = [iqm(ends), *interval(ends)][: len(numbers)]
    digits = [len(number.partition(".")[2]) for number in numbers]
    return all(
        abs(float(number) - value) <= 0.5 * 10.0**-places + 1e-6
        for number, value, places in zip(numbers, expected, digits, strict=True)
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_of_the_readme_are_those_of_the_default_runs(name):
    """Such as [1.2 → 4.6 after 50 episodes → 9.8 after 500, five seeds], or 9.5 in episode 20, that is after 19.

    Where the number of seeds is not said it is one, the first.
    """
    runs = default_runs(name)
    (row,) = (x for x in read(README).splitlines() if x.startswith(f"| [`{name}.py`]({name}.py)"))
    (said,) = re.findall(r"\[([^\]]*)\]\([^)]*\) \|$", row)
    seeds = re.search("(two|three|four|five) seeds", said)
    number = "one two three four five".split().index(seeds[1]) + 1 if seeds else 1
    assert len(runs) == number or number == 1
    runs = runs[:number]
    for part in said.split("→"):
        value = re.match(r" *(-?[\d.]+)", part)[1]
        after = re.search(r"after (\d+)", part)
        within = re.search(r"in episode (\d+)", part)
        n = int(after[1]) if after else int(within[1]) - 1 if within else 0
        assert agrees(value, runs, f"eval/return_after_{n}_episodes"), (part, n)


@pytest.mark.parametrize("name", IN_FORM)
def test_numbers_of_a_page_are_those_of_its_default_runs(name):
    """The table under The default run: rows of returns, hits and goals found, columns of episodes before."""
    text = section(read(ROOT / "docs" / f"{name}.md"), "### The default run")
    rows = [row.strip("|").split("|") for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    header, _, *rows = ([cell.strip() for cell in row] for row in rows)
    tags = {"return": "return", "share of episodes": "success", "share of goals": "found"}
    checked = 0
    for first, *cells in rows:
        runs = default_runs(name)[: 1 if "seed 1" in header[1] + first else None]
        tag = next((tags[start] for start in tags if first.startswith(start)), None)
        for n, cell in zip(header[1:], cells, strict=True):
            if tag and cell and (n.isdigit() or n.startswith("RL²")):
                n = int(n) if n.isdigit() else 0
                assert agrees(cell, runs, f"eval/{tag}_after_{n}_episodes"), (first, n)
                checked += 1
    assert checked


def test_every_flag_has_its_help_beside_it(script):
    """One line a flag, which --help prints."""
    source = Path(script.__file__).read_text().splitlines()
    (args,) = (
        node
        for node in ast.parse("\n".join(source)).body
        if isinstance(node, ast.ClassDef) and node.name == "Args"
    )
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    fields = [node for node in fields if ast.unparse(node.annotation) != "ClassVar"]
    assert len(fields) > 20
    for node in fields:
        assert node.lineno == node.end_lineno
        assert re.search(r"  # \S.{3,}$", source[node.lineno - 1]), source[node.lineno - 1]
    names = {node.target.id for node in fields}
    assert script.Args.may_be_zero | script.Args.at_most_one <= names


def test_requirements_of_a_script(script):
    """Those at its top, for uv run, are those of requirements.txt but for MuJoCo."""
    block = re.search(
        r"^# /// script\n(.*?)^# ///$", Path(script.__file__).read_text(), re.M | re.S
    )
    text = re.sub(r"^# ?", "", block[1], flags=re.MULTILINE)
    (needed,) = re.findall(r"dependencies = (\[.*?\])", text, re.DOTALL)
    needed = set(ast.literal_eval(needed))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = {line.split("#")[0].strip() for line in lines} - {""}
    torch = {line for line in lines if line.startswith("torch")}
    assert needed == {"torch"} | {x for x in lines - torch if not x.startswith("mujoco")}


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


def test_anchors_and_links_are_found():
    text = "# One `two`, [three](x.md)!\n[a](b.md#c) [d][e]\n\n[e]: https://f\n```\n# none\n[g](h)\n```\n"
    assert anchors(text) == {"one-two-three"}
    assert links_of(prose(text)) == ["x.md", "b.md#c", "https://f"]
    assert section("## A\n1\n### B\n2\n## C\n3\n", "## A") == "1\n### B\n2\n"


def test_numbers_agree_as_far_as_they_say():
    runs = [{"a": np.array([0, x])} for x in (1.0, 1.26, 1.26, 1.26, 9.0)]
    assert agrees("1.3 ± 7", runs, "a") and agrees("1", runs, "a") and not agrees("1.2", runs, "a")
    low, high = interval(np.array([1.0, 1.26, 1.26, 1.26, 9.0]))
    assert agrees(f"1.26 [{low:.2f}, {high:.2f}]", runs, "a")
    assert not agrees(f"1.26 [{low + 0.1:.2f}, {high:.2f}]", runs, "a")
