"""The repository itself: manifest, layers, README, and nothing of one machine in it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = "napari_xanes_tomo"


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)


def tracked_files(repository: Path) -> list[Path]:
    try:
        answer = subprocess.run(
            ["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout here")
    return [repository / name for name in answer.stdout.split("\0") if name]


# --- the manifest -------------------------------------------------------------------------------------------


def test_manifest_is_valid(repository: Path) -> None:
    result = python("-m", "npe2", "validate", f"src/{PACKAGE}/napari.yaml", cwd=repository)
    assert result.returncode == 0, result.stdout + result.stderr


def test_napari_finds_the_manifest(repository: Path) -> None:
    result = python("-m", "npe2", "validate", "napari-xanes-tomo", cwd=repository)
    assert result.returncode == 0, result.stdout + result.stderr


def test_top_level_manifest_is_a_link_to_the_packaged_one(repository: Path) -> None:
    link = repository / "napari.yaml"
    assert link.is_symlink()
    assert link.readlink() == Path("src") / PACKAGE / "napari.yaml"
    assert link.is_file()


# --- the layers ---------------------------------------------------------------------------------------------


def test_imports_keep_the_layers(repository: Path) -> None:
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(cache_dir=None))"
    result = python("-c", command, cwd=repository)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_documented_layers_are_those_of_the_contract(repository: Path) -> None:
    configuration = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in configuration["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    expected = [{m.strip().strip("()") for m in layer.split("|")} for layer in reversed(contract["layers"])]
    found: dict[int, set[str]] = {}
    table = (repository / "docs" / "architecture.md").read_text(encoding="utf-8")
    for layer, module in re.findall(r"^\| (\d+) \| `(\w+)", table, flags=re.MULTILINE):
        found.setdefault(int(layer), set()).add(module)
    assert [found[i] for i in sorted(found)] == expected


@pytest.mark.parametrize("module", ["cli", "workflow", PACKAGE])
def test_work_without_a_screen_needs_no_qt(repository: Path, module: str) -> None:
    name = module if module == PACKAGE else f"{PACKAGE}.{module}"
    seen = "sorted({n.partition('.')[0] for n in sys.modules} & {'napari', 'qtpy', 'PyQt6', 'PySide6', 'pyqtgraph'})"
    result = python("-c", f"import sys, {name}; found = {seen}; sys.exit(str(found) if found else 0)", cwd=repository)
    assert result.returncode == 0, result.stderr


# --- README and docs ----------------------------------------------------------------------------------------


def test_readme_example_runs(
    repository: Path,
    tiny_twin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, "README.md has no ```python example"
    assert len(blocks[0].strip().splitlines()) <= 15
    (tmp_path / "demo").symlink_to(tiny_twin, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), "the example prints nothing"
    assert (tmp_path / "demo-out" / "tables" / "shifts.csv").is_file()


def test_links_between_documents_lead_somewhere(repository: Path) -> None:
    broken = [
        f"{page.name}: {target}"
        for page in [*repository.glob("*.md"), *repository.glob("docs/**/*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists()
    ]
    assert not broken


def test_every_page_is_in_the_table_of_contents(repository: Path) -> None:
    contents = (repository / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"([\w/-]+\.md)", contents))
    assert named == {str(p.relative_to(repository / "docs")) for p in repository.glob("docs/**/*.md")}


# --- nothing of one machine ---------------------------------------------------------------------------------


def test_no_path_of_a_machine_in_the_repository(repository: Path) -> None:
    folder = re.compile(rb"(?<![\w.:/)}\]*-])/(?:home|work|root|Users|mnt|tmp|opt)/[\w.]")
    found = []
    for path in tracked_files(repository):
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if b"\0" in content[:4096]:  # pictures
            continue
        found += [
            f"{path.relative_to(repository)}:{number}"
            for number, line in enumerate(content.splitlines(), start=1)
            if folder.search(line)
        ]
    assert not found, f"absolute paths of one machine: {', '.join(found)}"
