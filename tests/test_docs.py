"""The documentation against the scripts: tags, commands, code, links, and a docstring under every flag."""

import ast
import importlib
import re
import shlex
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, load, to_argv
from gymnasium.utils.env_checker import check_env
from packaging.requirements import Requirement
from plot import interval, iqm
from plot import read as read_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import maml_trpo

README = ROOT / "README.md"
USE = ROOT / "docs" / "use.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FORM = ["The idea", "Pseudo-code", "Equations", "Quick facts", "Usage", "Logged metrics"]
FORM += ["Implementation details", "Deviations from the paper", "Results", "Questions", "Citation"]
IN_FORM = SCRIPTS


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


def test_the_task_of_the_readme(train, tmp_path, monkeypatch):
    """Saved as a module; gymnasium's checker finds no fault with it; docs/tasks.md has the same."""
    monkeypatch.syspath_prepend(tmp_path)
    (source,) = (block for block in code(read(README), "python") if "def set_task" in block)
    assert source in code(read(ROOT / "docs" / "tasks.md"), "python")
    (tmp_path / "my_tasks.py").write_text(source)
    train(maml_trpo, env_id="my_tasks:Reach-v0", horizon=0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_env(gym.make("my_tasks:Reach-v0").unwrapped)
    unbounded = r"Box observation space m\w+ value is -?infinity"
    assert not [w for w in found if not re.search(unbounded, str(w.message))]
    sys.modules.pop("my_tasks")


@pytest.mark.parametrize("env_id", ["SparsePointRobot-v0", "MultimodalNavigation2-v0"])
def test_arrays_of_an_evaluation(script, train, env_id, capsys):
    """Those that docs/evaluation.md has, in these shapes, and its four lines."""
    text = read(ROOT / "docs" / "evaluation.md")
    folder, _ = train(script, env_id=env_id)
    train(script, evaluate=folder, num_test_tasks=6, deterministic_eval=True, num_eval_steps=2)
    folder.rename("runs/NAME")
    shapes = {}
    for names, shape in re.findall(r"^\| (`.*?) \| (\(.*?\)) \|", text, re.MULTILINE):
        owner = re.search(r"(\w+)\.py", names)
        if not owner or owner[1] == script.__name__:
            shapes |= dict.fromkeys(re.findall(r"`(.*?)`", names), shape)
    assert shapes["obs_K"] == "(N, E, T, O)"
    sizes = {"M": 6, "K + 1": 3, "Z": 8, "N": {"pearl": 6, "rl2": 8}.get(script.__name__, 4)}
    with np.load("runs/NAME/evaluation.npz") as file:
        arrays = dict(file)
    for name, x in arrays.items():
        name = re.sub(r"^(obs_)\d$", r"\1K", re.sub(r"^(return_mode_)\d$", r"\1{m}", name))
        known = [sizes.get(size.strip(",. ")) for size in shapes[name][1:-1].split(", ")]
        for size, expected in zip(x.shape, known, strict=False):  # "..." is open
            assert expected in (None, size), name

    capsys.readouterr()
    (source,) = (x for x in code(text, "python") if "evaluation.npz" in x)
    exec(source, {})
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6
    for row, task, returns in zip(rows, arrays["tasks"], arrays["return"].T, strict=True):
        assert row == f"{task.round(2)} {returns.round(1)}"


# --------------------------------------------------------------------------------------------- docs/use.md

DISCRETE = ["maml_trpo", "rl2", "maesn", "mmaml"]  # the scripts that take such actions


@pytest.fixture
def use(script, train, monkeypatch):
    """use(env_id): load, adapted and so on of the script's block, and its example; and a run of that family."""

    def of(env_id):
        (source,) = (x for x in code(read(USE), "python") if f"import {script.__name__} as m" in x)
        functions, example = source.split("\n\n\nact")
        flags = {"horizon": 0 if "Bandit" in env_id else 8, "num_eval_steps": 3}
        folder, _ = train(script, env_id=env_id, **flags)
        if script.__name__ == "pearl":  # an untrained actor hardly heeds z
            state = load(folder)
            for name, x in state["agent"].items():
                x *= 5 if name.startswith("sac.actor") else 1
            torch.save(state, folder / "checkpoint.pt")
        folder.rename("runs/NAME")
        exec(functions, names := {})
        return SimpleNamespace(**names), f"act{example}", names

    yield of
    torch.use_deterministic_algorithms(False)


def last_collected(script, monkeypatch):
    """What collect was given last in a meta-test on one task, of mean actions, and its episodes; and the task."""
    calls = []
    collect = script.collect

    def record(*args, **settings):
        episodes = collect(*args, **settings)
        if settings.get("deterministic"):
            calls.append((args, episodes))
        return episodes

    more = {"num_minibatches": 1} if script.__name__ == "rl2" else {}
    flags = {"num_test_tasks": 1, "meta_batch_size": 1, "deterministic_eval": True, **more}
    with monkeypatch.context() as patch:
        patch.setattr(script, "collect", record)
        script.main(script.Args(evaluate="runs/NAME", **flags))
    given, played = calls[-1]
    batch = played[0] if script.__name__ == "rl2" else played
    with np.load("runs/NAME/evaluation.npz") as file:
        return given, {name: x.numpy() for name, x in batch.items()}, file["tasks"][0]


def env_of(script, own):
    """The script's default family, or one of a user, of Discrete actions if it takes them; episodes end early."""
    if not own:
        return script.Args.env_id
    return f"user_tasks:{'Discrete' if script.__name__ in DISCRETE else 'Uneven'}-v0"


@pytest.mark.parametrize("own", [False, True])
def test_an_agent_in_your_own_code(script, use, own, monkeypatch, capsys):
    """The blocks of docs/use.md act as the script does in a meta-test."""
    page, example, names = use(env_of(script, own))
    given, batch, task = last_collected(script, monkeypatch)
    if script.__name__ == "rl2":
        act, tell = page.adapted("runs/NAME", deterministic_eval=True)
        over = batch["inputs"][0, :, batch["obs"].shape[-1] + given[0].action_size + 1]
        ends = [*over[1:], 1]
        for t, end in enumerate(ends):
            np.testing.assert_allclose(act(batch["obs"][0, t]), batch["actions"][0, t], rtol=1e-4)
            tell(batch["rewards"][0, t], end)
        assert sum(ends) > 1
    else:
        act = page.adapted("runs/NAME", task, deterministic_eval=True)
        for e, t in np.argwhere(batch["mask"][0]):
            obs, expected = batch["obs"][0, e, t], batch["actions"][0, e, t]
            if script.__name__ in ("pearl", "maesn"):
                expected = with_the_first_z(script, given, obs)
            np.testing.assert_allclose(act(obs), expected, rtol=1e-5, atol=1e-7)
    if script.__name__ in ("pearl", "maesn"):
        first, again, other = (act(obs, first=new) for new in (False, False, True))
        assert (first == again).all() and (own or (first != other).any())
    if not own:  # the example is of the default family
        capsys.readouterr()
        exec(example, names)
        assert capsys.readouterr().out.count("\n") == 1
        sample = names["act"](np.zeros(batch["obs"].shape[-1]))
        assert sample.shape == batch["actions"].shape[batch["mask"].ndim :]


def with_the_first_z(script, given, obs):
    """The mean action of the agent that collect was given, with the z that a page draws first."""
    agent = given[3]
    generator = torch.Generator().manual_seed(1)
    space = script.make_envs(given[4].env_id).single_action_space
    if script.__name__ == "pearl":
        mean, variance = given[0]
        params = mean + variance.sqrt() * torch.randn(1, *mean.shape, generator=generator)
    else:
        theta, phi = given[0]
        eps = torch.randn(1, *phi["mu"].shape, generator=generator)
        params = theta, phi, script.latent(phi, eps)
    noise = script.draw_noise(space, (1, 1), generator, True)
    return agent.act(params, torch.as_tensor(obs).view(1, 1, -1), noise)[0, 0].detach()


def test_episodes_of_your_own(script, use, monkeypatch):
    """The keys in docs/use.md are those that are read: no others, and each of them."""
    if script.__name__ == "rl2":
        return  # it is told step by step
    page, _, names = use(script.Args.env_id)
    (row,) = re.findall(rf"^\| `{script.__name__}.py` \| (.*) \|$", read(USE), re.MULTILINE)
    keys = re.findall(r"`(\w+)`", row)
    task = last_collected(script, monkeypatch)[2]
    obs = np.zeros(script.make_envs(script.Args.env_id).single_observation_space.shape)
    expected = page.adapted("runs/NAME", task, deterministic_eval=True)(obs)
    collect = script.collect
    given = {}

    def some(*args, **settings):
        given["args"], given["batch"] = args, collect(*args, **settings)
        return {name: given["batch"][name] for name in keys}

    monkeypatch.setattr(script, "collect", some)
    assert (page.adapted("runs/NAME", task, deterministic_eval=True)(obs) == expected).all()
    for key in tuple(keys):
        keys.remove(key)
        with pytest.raises(KeyError, match=key):
            page.adapted("runs/NAME", task)
        keys.append(key)
    if script is maml_trpo:
        (source,) = (x for x in code(read(USE), "python") if "def batch_of(" in x)
        exec(source, names)
        params, _, _, policy, args = given["args"]
        told = [given["batch"][name] for name in ("obs", "actions", "rewards", "mask")]
        batch = names["batch_of"](*told, params, policy, args)
        for name, x in batch.items():
            torch.testing.assert_close(x, given["batch"][name])


def test_main_from_code(train, monkeypatch):
    """As the README calls it, with small numbers; in a thread, which gets no signals, as well."""
    (source,) = (block for block in code(read(README), "python") if "m.main(" in block)
    small = "1, episodes_per_task=2, num_test_tasks=5, num_threads=1"
    source = source.replace("32_000", small).replace("64_000", "3_000").replace("1000", "4")
    first, *others = source.split("m.main(m.Args(resume")
    train(maml_trpo)  # in a folder of its own
    exec(first, names := {})
    (folder,) = Path("runs").glob("*__maml_trpo__*")
    folder.rename("runs/NAME")
    thread = threading.Thread(target=exec, args=("m.main(m.Args(resume".join(["", *others]), names))
    thread.start()
    thread.join()
    assert load("runs/NAME")["global_step"] >= 3_000
    with np.load("runs/NAME/evaluation.npz") as file:
        assert file["tasks"].shape == (4, 2)


def test_the_readme_has_the_block_of_maml():
    (source,) = (block for block in code(read(README), "python") if "def adapted" in block)
    assert source in code(read(USE), "python")


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
    fields = [node for node in fields if not ast.unparse(node.annotation).startswith("ClassVar")]
    assert len(fields) > 20
    for node in fields:
        assert node.lineno == node.end_lineno
        assert re.search(r"  # \S.{3,}$", source[node.lineno - 1]), source[node.lineno - 1]
    names = {node.target.id for node in fields}
    assert script.Args.may_be_zero | script.Args.at_most_one <= names


def test_lines_of_the_files(script):
    """The README's, to tens and to hundreds."""
    lines = Path(script.__file__).read_text().splitlines()
    ruler = next(i for i, line in enumerate(lines) if line.startswith("# ====="))
    rows = section(read(README), "## Reading the code").split("| lines |")[1].splitlines()
    names, _, own, whole = (
        [cell.strip() for cell in row.strip("|").split("|")] for row in rows[:4]
    )
    i = names.index(f"{script.__name__}.py")
    assert abs(int(own[i + 1]) - ruler) <= 10
    assert abs(int(whole[i + 1].replace(",", "")) - len(lines)) <= 100


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
