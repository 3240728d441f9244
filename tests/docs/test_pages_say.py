"""What the pages refer to is there: languages, commands, links, anchors, pictures, options, defaults, files, names."""

import ast
import builtins
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

for package in ("transformers", "peft", "accelerate", "httpx"):
    pytest.importorskip(package)

from doc_checks import Failed, check_command, defaults_of_mopl, options_of_mopl
from doc_pages import (
    LANGUAGES,
    OTHER_PAGES,
    PAGES,
    ROOT,
    SHELL,
    blocks_of,
    lines_of,
    links_of,
    name_of,
    prose_of,
    slugs_of,
)  # fmt: skip

ALL = [*PAGES, *OTHER_PAGES]
IDS = [name_of(page) for page in ALL]
WITHOUT_HISTORY = [page for page in ALL if page.name != "CHANGELOG.md"]  # which has names that are gone
REFERENCE = [page for page in PAGES if page.parent == ROOT / "docs" / "reference"]
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}  # by docs/hooks.py
# Options of other programs of the pages: accelerate, torchrun, pip, vLLM, SGLang, TGI, llama.cpp, pytest, MkDocs.
OTHERS = {
    "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port", "--config_file", "--nnodes",
    "--nproc_per_node", "--rdzv", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--standalone", "--run-path",
    "--run_path", "--api-key", "--gpu-memory-utilization",
    "--num_processes", "--use_fsdp", "--fsdp_version", "--module", "--multi_gpu", "--index-url", "--enable-lora",
    "--max-lora-rank", "--max-loras", "--max-cpu-loras", "--lora-modules", "--enable-prompt-embeds", "--model-path",
    "--max-loras-per-batch", "--lora-target-modules", "--lora-paths", "--model-id", "--lora", "--lora-scaled",
    "--jinja", "--no-jinja", "--durations", "--import-mode", "--maxfail", "--maxschedchunk", "--tb", "--strict",
    "--shell", "--no-X", "--logprobs-mode", "--use_deepspeed", "--zero_stage", "--deepspeed_config_file",
    "--deepspeed_multinode_launcher",
}  # fmt: skip

# Classes and names of others: sentence-transformers, Liger, NeMo-RL, LoRAX, Lightning, torch's compiler, LightGBM,
# verl, OpenRLHF, and keys of transformers, TRL and vLLM; AlphaCoefficients is an old name of mopl's own.
OTHER_CLASSES = {
    "CrossEncoder", "ListNetLoss", "ListMLELoss", "RankNetLoss", "LambdaLoss", "LambdaRankScheme", "LinearMerge",
    "LigerFusedLinearJSDLoss", "DistributedLogprob", "ChunkedDistributedLogprob", "LoraWeights", "LightningModule",
    "ChunkedDistributedHiddenStatesToLogprobs", "PagedAttentionArgs", "InvalidCxxCompiler", "AlphaCoefficients",
    "HuggingFaceTB", "DeepSpeed",
}  # fmt: skip
OTHER_NAMES = {
    "fsdp_state_dict_type", "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "rank_xendcg", "mean_token_accuracy", "num_tokens", "actor_rollout_ref", "train_ppo_ray", "ATEN_CPU_CAPABILITY",
    "prompt_embeds", "merge_adapters", "adapter_names", "even_batches", "vllm_importance_sampling_correction",
}  # fmt: skip


@cache
def options_of_scripts() -> set[str]:
    """Return every option that a script of the project defines, and those of pytest's configuration."""
    found: set[str] = set()
    for folder in ("bench", "docs", "examples", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            defined = re.findall(r"add_?(?:argument|option)\(([^=)]+)", file.read_text(encoding="utf-8"))
            found |= set(re.findall(r"[\"'](--[a-z][\w-]*)[\"']", " ".join(defined)))
    return found


@cache
def anchors(page: Path) -> set[str]:
    return slugs_of(page)


def defines(module: list[str], names: list[str]) -> bool:
    """Say whether the source of a module, which needs a package that is not installed here, defines a name."""
    file = ROOT.joinpath(*module).with_suffix(".py")
    if len(names) != 1 or not file.exists():
        return False
    return any(getattr(node, "name", None) == names[0] for node in ast.parse(file.read_text(encoding="utf-8")).body)


def is_there(dotted: str) -> bool:
    """Say whether a name such as mopl.losses.listwise_dpo exists: the anchors of the reference are such names."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            if defines(parts[:count], parts[count:]):
                return True
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", ALL, ids=IDS)
def test_every_block_names_a_language_that_is_known(page: Path) -> None:
    unknown = [f"{block.where}: {block.language!r}" for block in blocks_of(page) if block.language not in LANGUAGES]
    assert not unknown, f"write ```text, ```sh or another of {', '.join(LANGUAGES)}: {unknown}"


@pytest.mark.parametrize("page", ALL, ids=IDS)
def test_every_command_line_is_known(page: Path) -> None:
    """Also those that do not run: programs, options, files of the project, addresses."""
    blocks, failed = blocks_of(page), []
    written = " ".join(re.findall(r"^# ([\w./-]+\.\w+)", "".join(block.text for block in blocks), re.MULTILINE))
    for line in (line for block in blocks if block.language in SHELL for line in lines_of(block)):
        for command in line.commands():
            try:
                check_command(command, written)
            except Failed as error:
                failed.append(f"{line.where}: {line.text}: {error}")
    assert not failed, "\n".join(failed)


def test_commands_of_the_readme_and_the_tutorials_fit_the_width_of_the_site() -> None:
    """At 1,280 pixels a block shows 86 characters; what stands further right is out of view."""
    first = [page for page in PAGES if page.name == "README.md" or page.parent.name == "tutorials"]
    wide = [
        f"{name_of(page)}:{block.line + number}: {len(line)} characters"
        for page in first
        for block in blocks_of(page)
        if block.language in SHELL
        for number, line in enumerate(block.text.splitlines())
        if len(line) > 86
    ]
    assert not wide, "end a line with \\ and go on in the next: " + ", ".join(wide)


@pytest.mark.parametrize("page", ALL, ids=IDS)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for number, target in links_of(page):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (page.parent / path).resolve() if path else page
        if there.parent == ROOT / "docs" and there.name in ROOT_PAGES:
            there = ROOT / ROOT_PAGES[there.name]
        where = f"{name_of(page)}:{number}: {target}"
        if not there.exists():
            broken.append(f"{where}: there is no such file")
        elif ROOT not in (there, *there.parents):
            broken.append(f"{where}: outside of the project")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there):
            if not (anchor.startswith("mopl.") and is_there(anchor)):
                broken.append(f"{where}: there is no such heading")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("page", ALL, ids=IDS)
def test_every_reference_link_has_its_definition(page: Path) -> None:
    prose = "\n".join(prose_of(page))
    defined = {each.lower() for each in re.findall(r"^ *\[([^\]]+)\]: ", prose, re.MULTILINE)}
    used = re.findall(r"\[([^\[\]]+)\]\[([^\[\]]*)\]", re.sub(r"`[^`\n]*`", "code", prose))
    missing = [f"[{text}][{name}]" for text, name in used if (name or text).lower() not in defined]
    assert not missing, f"{name_of(page)}: {missing}"


@pytest.mark.parametrize("page", ALL, ids=IDS)
def test_every_option_that_the_page_names_exists(page: Path) -> None:
    commands, unknown = options_of_mopl(), []
    known = set().union(*commands.values()) | options_of_scripts() | OTHERS
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        for option in sorted(set(re.findall(r"(?<![\w<-])--[a-zA-Z][\w-]*", line)) - known):
            unknown.append(f"{name_of(page)}:{number}: {option}")
    for number, line in enumerate(prose_of(page), 1):
        for name, rest in re.findall(r"(?<!`)`(?:[^`]*-m mopl\.cli|mopl) ([a-z]+)\b([^`]*)`(?!`)", line):
            if name not in commands:
                unknown.append(f"{name_of(page)}:{number}: there is no command `mopl {name}`")
                continue
            options = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", rest))
            unknown += [f"{name_of(page)}:{number}: {each} of {name}" for each in sorted(options - commands[name])]
    assert not unknown, "\n".join(unknown)


def is_default(value: str, stated: str) -> bool:
    try:
        return float(value.replace(",", "")) == float(stated)
    except ValueError:
        return value == stated


@pytest.mark.parametrize("page", ALL, ids=IDS)
def test_every_default_that_the_text_states_is_that_of_the_command(page: Path) -> None:
    """Forms: `--option VALUE`, the default; `mopl COMMAND` starts from `--option VALUE`; `--option` 9."""
    defaults, wrong = defaults_of_mopl(), []
    for number, line in enumerate(prose_of(page), 1):
        for sentence in re.split(r"(?<=[.;:]) ", line):
            stated = [
                (None, *each) for each in re.findall(r"`(--[\w-]+) ([^`]+)`(?:,| is| \() ?the default\b", sentence)
            ]
            stated += [(None, *each) for each in re.findall(r"`(--[\w-]+)` (\d+(?:[.,]\d+)*)", sentence)]
            if re.search(r"`mopl \w+`.* starts? from\b|\b[Tt]he default of `mopl \w+`", sentence):
                subjects: list[str] = []
                before = len(stated)
                for name, option, value in re.findall(r"`mopl (\w+)`|`(--[\w-]+) ([^`]+)`", sentence):
                    subjects = [*subjects, name] if name else subjects
                    if option:
                        stated += [(each, option, value) for each in subjects]
                        subjects = []
                if len(stated) == before or subjects:
                    wrong.append(f"{name_of(page)}:{number}: write the default as `--option VALUE`: {sentence}")
            for command, option, value in stated:
                known = [each[option] for name, each in defaults.items() if command in (None, name) and option in each]
                if not any(is_default(value, each) for each in known):
                    wrong.append(f"{name_of(page)}:{number}: {option} {value} of {command}, but it is {known}")
    assert not wrong, "\n".join(wrong)


@cache
def words_of_source() -> set[str]:
    """Return every word of the project's Python, and the names of its files."""
    folders = [ROOT / name for name in ("mopl", "kernels", "bench", "docs", "examples", "tests")]
    files = [ROOT / "pyproject.toml", *(file for folder in folders for file in folder.rglob("*.py"))]
    words = (re.findall(r"\w+", file.read_text(encoding="utf-8")) for file in files if file != Path(__file__))
    return {file.stem for file in files}.union(*words)


@cache
def names_of_classes() -> set[str]:
    """Return the classes of mopl, the names of its reference, and those of the libraries that the pages speak of."""
    text = "".join(
        f.read_text(encoding="utf-8") for f in [*ROOT.glob("mopl/**/*.py"), *ROOT.glob("docs/reference/*.md")]
    )
    found = set(re.findall(r"^(?:class |::: mopl\S*\.)(\w+)", text, re.MULTILINE))
    libraries = [importlib.import_module(name) for name in ("torch", "torch.nn", "transformers", "trl", "peft")]
    return found.union(dir(builtins), OTHER_CLASSES, *map(dir, libraries))


@pytest.mark.parametrize("page", WITHOUT_HISTORY, ids=map(name_of, WITHOUT_HISTORY))
def test_every_name_in_code_that_the_text_has_is_a_known_one(page: Path) -> None:
    """Classes are mopl's or a library's; other names, with an underscore, are words of the source or of a block."""
    blocks = set(re.findall(r"\w+", " ".join(block.text for block in blocks_of(page))))
    missing = []
    for number, line in enumerate(prose_of(page), 1):
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
            words = set(re.findall(r"(?<![\w./-])[A-Za-z]\w+(?![\w-])", span)) - blocks
            classes = {each for each in words if re.match(r"([A-Z]+[a-z0-9]+){2,}", each)} - names_of_classes()
            names = {each for each in words if re.match(r"[A-Za-z]+(_[A-Za-z]\w*)+", each)} - OTHER_NAMES
            for each in sorted(classes | names):
                known = words_of_source() if each in names else ()
                if (
                    each in known
                    or each.lower() in known
                    or (span.startswith("pytest") and any(each in k for k in known))
                ):
                    continue
                missing.append(f"{name_of(page)}:{number}: {each}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", WITHOUT_HISTORY, ids=map(name_of, WITHOUT_HISTORY))
def test_every_file_and_name_of_mopl_that_the_text_names_exists(page: Path) -> None:
    missing = []
    for number, line in enumerate(prose_of(page), 1):
        for file in re.findall(r"`((?:mopl|tests|bench|docs|examples)/[\w/.-]+)`", line):
            if not (ROOT / file).exists() and not re.search(r"\b[A-Z]{2,}\b", file):  # CARD stands for any name
                missing.append(f"{name_of(page)}:{number}: {file}")
        for name in re.findall(r"`(mopl(?:\.[A-Za-z_]\w*)+)(?:\([^`]*)?`", line):
            if not is_there(name) and name not in ("mopl.json",):
                missing.append(f"{name_of(page)}:{number}: {name}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("page", ALL, ids=IDS)
def test_what_code_takes_from_mopl_is_there(page: Path) -> None:
    """Also in blocks that do not run."""
    missing = []
    for block in blocks_of(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text, block.where)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mopl":
                names = [f"{node.module}.{each.name}" for each in node.names]
            elif isinstance(node, ast.Import):
                names = [each.name for each in node.names if each.name.split(".")[0] == "mopl"]
            else:
                continue
            missing += [
                f"{name_of(page)}:{block.line + node.lineno - 1}: {name}" for name in names if not is_there(name)
            ]
    assert not missing, "\n".join(missing)


def names_used(code: str) -> set[str]:
    """Return the names that code uses, beyond importing them, and the modules that it imports from, by their last part.

    A comment or an import alone shows nobody how to use a name.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[-1])
    return found


def names_shown(entry: str) -> set[str]:
    """Return what an entry of the reference shows by its last part: a name, or a module and what it defines."""
    last = entry.split(".")[-1]
    try:
        module = vars(importlib.import_module(entry))
    except ImportError:
        return {last}
    return {last} | {name for name, value in module.items() if getattr(value, "__module__", None) == entry}


@pytest.mark.parametrize("page", REFERENCE, ids=[name_of(page) for page in REFERENCE])
def test_every_entry_of_the_reference_has_an_example_of_its_own(page: Path) -> None:
    lines = prose_of(page)
    starts = [number for number, line in enumerate(lines, 1) if re.match(r"::: |#+ ", line)]
    without = []
    for start, end in zip(starts, [*starts[1:], len(lines) + 1], strict=True):
        if not lines[start - 1].startswith("::: "):
            continue
        entry = lines[start - 1].removeprefix("::: ").strip()
        examples = [block.text for block in blocks_of(page) if block.language == "python" and start < block.line < end]
        if not any(names_shown(entry) & names_used(text) for text in examples):
            without.append(f"{name_of(page)}:{start}: {entry}")
    assert not without, "no ```python block below these entries uses the name:\n" + "\n".join(without)


@pytest.mark.parametrize("program", ["verl", "openrlhf", "nemo_rl"])
def test_every_function_for_another_program_is_on_the_page(program: str) -> None:
    page = (ROOT / "docs" / "log_probabilities.md").read_text(encoding="utf-8")
    names = importlib.import_module(f"mopl.integrations.{program}").__all__
    missing = [
        name
        for name in names
        if name not in page and name.replace("from_parallel_logits_to_logprobs", "the same `") not in page
    ]
    assert not missing, missing


def test_every_picture_says_what_it_shows() -> None:
    without = [
        f"{name_of(page)}:{number}"
        for page in PAGES
        for number, line in enumerate(prose_of(page), 1)
        for alt in [*re.findall(r"!\[([^\]]*)\]\(", line), *re.findall(r"<img (?:alt=\"([^\"]*)\")?", line)]
        if len(alt) < 10
    ]
    assert not without, f"pictures need a text for those who do not see them: {', '.join(without)}"
