"""docs/ builds as a site, where mkdocs is installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_can_be_found(site: Path):
    pages = {page.stem for page in (REPOSITORY / "docs").glob("*.md")} | {"index"}
    assert pages == {page.stem for page in site.glob("*.html")} - {"404"}
    found = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    assert {f"{page}.html" for page in pages - {"index"}} <= found
    tutorial = (site / "tutorial.html").read_text(encoding="utf-8")
    assert all(f'href="{page}.html"' in tutorial for page in pages - {"tutorial"})


def test_the_first_page_is_the_readme_with_its_links_and_images(site: Path):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="images/demo.png"' in page and (site / "images/demo.png").is_file()
    assert 'href="ops.html"' in page and "docs/ops.md)" not in page
    results = (site / "results.html").read_text(encoding="utf-8")
    assert 'src="benchmarks/results/recall-mqar.png"' in results
    assert (site / "benchmarks/results/recall-mqar.png").is_file()


def test_nothing_is_fetched_from_elsewhere(site: Path):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "fonts.googleapis" not in text and '<script src="http' not in text, page.name
