"""The decoding loop as a repository of its own, for people who have not installed this package.

Made from the package's own files: the modules that the entry point needs are found by their imports, laid side by side,
and their imports rewritten to each other. Nothing is written twice by hand, so nothing can drift apart.
"""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

from huggingface_hub import HfApi

import prune_opd_hf
from prune_opd_hf.hub.card import card_environment
from prune_opd_hf.hub.client import Patience
from prune_opd_hf.hub.commit import Target, check_access, validate_card
from prune_opd_hf.hub.markdown import Markdown, fence
from prune_opd_hf.hub.publish import Uploaded, upload
from prune_opd_hf.hub.results import literal

ENTRY = "prune_opd_hf.hub.hub_generate"
FOLDER = "custom_generate"
_PACKAGE = "prune_opd_hf"


def build_generate_repository(repo_id: str) -> dict[str, bytes]:
    """The repository's files by path: code, requirements and card.

    Args:
        repo_id: where it will be; the card's example names it.

    Example:
        >>> files = build_generate_repository("org/prune-opd-generate")
        >>> "custom_generate/generate.py" in files, "custom_generate/generation_loop.py" in files
        (True, True)
    """
    modules = _needed_modules(ENTRY)
    files = {f"{FOLDER}/{_file_name(module)}": _rewritten(module).encode() for module in sorted(modules)}
    files[f"{FOLDER}/requirements.txt"] = ("\n".join(_requirements(modules)) + "\n").encode()
    card = (
        card_environment()
        .get_template("generate_card.md.j2")
        .render(
            snippet=_snippet(repo_id), package_version=prune_opd_hf.__version__, requirements=_requirements(modules)
        )
    )
    files["README.md"] = f"{card.strip()}\n".encode()
    return files


def publish_generate_repository(
    target: Target, *, token: str | None = None, endpoint: str | None = None, patience: Patience | None = None
) -> Uploaded:
    """Publish the decoding loop in one commit, as students are published.

    Raises:
        HubAccessError: no token, one that only reads, or somebody else's namespace.
        HubError: the Hub refuses, or still fails after the last try.
    """
    api = HfApi(endpoint=endpoint, token=token, library_name="prune-opd-hf")
    files = build_generate_repository(target.repo_id)
    patience = patience or Patience()
    there = check_access(api, target, patience)
    validate_card(api, files["README.md"].decode(), patience)
    return upload(api, target, there, files, patience, replaced=lambda path: path.startswith(f"{FOLDER}/"))


def _snippet(repo_id: str) -> Markdown:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'name = "Qwen/Qwen3-0.6B"',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'student = AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
        'inputs = tokenizer(["What is 12 * 34?"], return_tensors="pt", return_token_type_ids=False)',
        "output = student.generate(",
        "    **inputs,",
        f"    custom_generate={literal(repo_id)},",
        '    teacher_model="Qwen/Qwen3-1.7B",',
        "    trust_remote_code=True,",
        "    max_new_tokens=512,",
        ")",
        "print(tokenizer.batch_decode(output, skip_special_tokens=True)[0])",
    ]
    return fence("\n".join(lines), "python")


def _needed_modules(entry: str) -> set[str]:
    """`entry` and every module of this package that it imports, directly or not."""
    found: set[str] = set()
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += [node.module for node in _own_imports(_tree(module)) if node.module]
    return found


def _own_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    """The imports of this package's modules, all of the one form that can be rewritten.

    Raises:
        NotImplementedError: another form, which would fail where the package is not installed.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            others = [alias.name for alias in node.names if alias.name.split(".")[0] == _PACKAGE]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            whole_file = module.startswith(f"{_PACKAGE}.") and _source_path(module).is_file()
            if whole_file and not node.level:
                found.append(node)
                continue
            others = [f"{'.' * node.level}{module}"] if node.level or module.split(".")[0] == _PACKAGE else []
        else:
            continue
        if others:
            raise NotImplementedError(
                f"line {node.lineno} imports {others[0]}: the decoding loop's modules must import names from modules, by "
                f"`from {_PACKAGE}.module import name`, to be published"
            )
    return found


def _rewritten(module: str) -> str:
    """The module's source with the imports of this package made relative; docstrings and all else stay as they are."""
    source = _source_path(module).read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in _own_imports(ast.parse(source)):
        assert node.module is not None
        flat = _file_name(node.module).removesuffix(".py")
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from .{flat} import", 1)
    path = module.replace(".", "/")
    return f"# {path}.py of prune-opd-hf {prune_opd_hf.__version__}, Apache-2.0\n" + "\n".join(lines) + "\n"


def _file_name(module: str) -> str:
    if module == ENTRY:
        return "generate.py"
    return module.removeprefix(f"{_PACKAGE}.").replace(".", "_") + ".py"


def _requirements(modules: set[str]) -> list[str]:
    """What the modules import from elsewhere, with the versions that this package asks for."""
    imported = {
        name.split(".")[0]
        for module in modules
        for node in ast.walk(_tree(module))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    foreign = imported - set(sys.stdlib_module_names) - {_PACKAGE, ""}
    stated = importlib.metadata.requires("prune-opd-hf") or []
    wanted = {re.split(r"[<>=!~ \[;]", line)[0].lower(): line for line in stated if "extra ==" not in line}
    return sorted(wanted[name] for name in foreign)


def _tree(module: str) -> ast.Module:
    return ast.parse(_source_path(module).read_text(encoding="utf-8"))


def _source_path(module: str) -> Path:
    return Path(prune_opd_hf.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
