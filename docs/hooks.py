"""What the site takes from outside this folder: plots and results, linked as a reader of the repository finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LINK = "../benchmarks/results/"  # from a page in docs/


def on_files(files: Files, config: Any) -> Files:
    """Add the committed results to the site."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to results at the copies within the site."""
    return markdown.replace(f"]({LINK}", "](results/")
