"""No text of any file runs as a script in the page, in a real browser; the page's links lead to its files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes
from xml.etree import ElementTree

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmscope.report import gallery, write_report
from vlmscope.report.page import MANIFEST
from vlmscope.studies.run_folder import read_run

sys.path[:0] = [str(Path(__file__).parent / "fuzz"), str(Path(__file__).parent / "fuzz" / "wrong")]

from folders import list_anew  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CODE = "document.title='pwned';document.body.id='pwned'"
PAYLOADS = (
    f"<script>{CODE}</script>",
    f'"><img src=x onerror="{CODE}">',
    f'\'><svg onload="{CODE}">',
    f"</style></title></textarea></code></figcaption><script>{CODE}</script>",
    f"--><iframe srcdoc='<script>parent.{CODE}</script>'></iframe>",
    f'" onmouseover="{CODE}" autofocus onfocus="{CODE}" x="',
    f"javascript:{CODE}",
    f"{{{{ ''.__class__ }}}}{{% raw %}}<script>{CODE}</script>",
    f"<meta http-equiv=refresh content=\"0;url=javascript:{CODE}\"><base href='//x/'>",
    "$\\frac{$ $\\unknown$ _^",
)
ALL = " ".join(PAYLOADS)
KEPT = {"format", "what", "severity", "file", "tower", "kind", "unit", "set", "knockout", "measure", "method"}
"""Fields and columns in which another text is refused, or has no place on the page."""


def with_payloads(value: Any, name: str = "") -> Any:
    """JSON with the payloads behind each text, and in each key of a name."""
    if isinstance(value, dict):
        is_names = name in ("gaps", "known", "versions")
        return {key + ALL if is_names else key: with_payloads(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_payloads(inner, name) for inner in value]
    return value + ALL if isinstance(value, str) and name not in KEPT else value


def poison(folder: Path) -> None:
    """Put the payloads into every text of every file of a folder."""
    for file in folder.rglob("*.json"):
        about = with_payloads(json.loads(file.read_text("utf-8")))
        if isinstance(about.get("spec"), dict):
            about["spec"] |= {"direction": "denoise", "patch": "clean"}
        file.write_text(json.dumps(about), "utf-8")
    for file in folder.rglob("*.csv"):
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
        for name in table:
            if name not in KEPT and not table[name].str.fullmatch(r"[-+.e\d]*|nan|inf|True|False").all():
                table[name] += ALL
        table.to_csv(file, index=False)
    for file in folder.rglob("*.parquet"):
        table = pq.read_table(file)
        for number, field in enumerate(table.schema):
            is_text = pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            if is_text and field.name not in KEPT:
                texts = [None if text is None else text + ALL for text in table[field.name].to_pylist()]
                table = table.set_column(number, field, pa.array(texts, field.type))
        pq.write_table(table, file)
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".json":
            list_anew(file)


@pytest.fixture(scope="module")
def page(good: Path, tmp_path_factory) -> Path:
    top = tmp_path_factory.mktemp("poisoned")
    folders = []
    for kind in ("run", "circuits", "heads", "tracing", "find", "describe", "perturb", "edit"):
        folder = top / f"{kind}<img src=x onerror={CODE}>"
        shutil.copytree(good / kind, folder)
        poison(folder)
        folders.append(folder)
    return write_report(folders, top / f"<img src=x onerror={CODE}>.html", formats=["svg"])


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def dom(page: Path) -> str:
    """The document that a browser makes of a page, after its scripts have run."""
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run([*command, profile, "--dump-dom", page.as_uri()], capture_output=True, timeout=120)
    return done.stdout.decode()


def test_payloads_are_text(page):
    text = page.read_text("utf-8")
    shown = Tags(text)
    assert text.count("&lt;script&gt;document.title") > 100
    assert not {"script", "svg", "iframe", "base", "object", "embed", "link"} & set(shown.tags)
    names = {name for name, _ in shown.attributes}
    assert not [name for name in names if name.startswith("on")]
    assert all(
        value.startswith("data:image/png;base64,") for name, value in shown.attributes if name == "src"
    )
    assert not any(value.strip().startswith("javascript:") for _, value in shown.attributes)


def test_svg_figures_hold_no_script(page):
    for file in page.with_name(f"{page.stem}-figures").glob("*.svg"):
        for element in ElementTree.parse(file).iter():
            assert not element.tag.endswith(("script", "foreignObject", "}a"))
            assert not [name for name in element.attrib if name.startswith("on")]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("has_policy", [True, False])
def test_no_payload_runs_in_a_browser(page, tmp_path, has_policy):
    text = page.read_text("utf-8")
    policy = re.search(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", text)
    assert policy
    shown = tmp_path / "page.html"
    shown.write_text(text if has_policy else text.replace(policy[0], ""), "utf-8")
    found = dom(shown)
    assert "<title>vlmscope report</title>" in found and 'id="pwned"' not in found
    assert '<img src="x"' not in found and found.count("<script") == 0


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_policy_alone_stops_a_script_and_lets_the_style_through(page, tmp_path):
    text = page.read_text("utf-8")
    script = f'<script>{CODE}</script><img src=x onerror="{CODE}"></body>'
    with_script = tmp_path / "script.html"
    with_script.write_text(text.replace("</body>", script), "utf-8")
    assert "<title>vlmscope report</title>" in dom(with_script)
    without = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", text).replace("</body>", script)
    with_script.write_text(without, "utf-8")
    assert "<title>pwned</title>" in dom(with_script)  # so this test can fail
    probe = "<p id=probe></p><script>document.title=getComputedStyle(document.body).maxWidth</script></body>"
    policy = re.search(r"style-src ([^;]*);", text)
    assert policy and "unsafe" not in policy[1]
    opened = text.replace("style-src", "script-src 'unsafe-inline'; style-src").replace("</body>", probe)
    with_script.write_text(opened, "utf-8")
    assert re.search(r"<title>\d{3,4}px</title>", dom(with_script))


def test_links_lead_to_the_files_beside_the_page(page):
    links = [value for name, value in Tags(page.read_text("utf-8")).attributes if name == "href"]
    files = [link for link in links if not link.startswith("#")]
    beside = {file.name for file in page.with_name(f"{page.stem}-figures").iterdir()} - {MANIFEST}
    assert len(files) == len(beside) > 15
    assert all((page.parent / unquote_to_bytes(link).decode()).is_file() for link in files)


@pytest.mark.parametrize("stem", ["a#b", "a?b", "100%41", "it's", 'a"b', "a b", "größe", "&amp;", "b\udc80"])
def test_names_of_reports_do_not_break_their_links(good, tmp_path, stem):
    out = write_report([good / "circuits"], tmp_path / f"{stem}.html")
    links = [value for name, value in Tags(out.read_text("utf-8")).attributes if name == "href"]
    assert links
    for link in links:
        assert (tmp_path / os.fsdecode(unquote_to_bytes(link))).is_file()
        assert not set(link) & set("#?\"' <>")


def test_text_is_escaped_by_construction():
    templates = Path(gallery.__file__).parent / "templates"
    for file in templates.iterdir():
        text = file.read_text("utf-8")
        assert not re.search(r"\|\s*safe|autoescape|Markup|style=", text), file.name
    makes = [
        file.name for file in Path(gallery.__file__).parent.glob("*.py") if "Markup(" in file.read_text()
    ]
    assert makes == ["gallery.py"]
    text = Path(gallery.__file__).read_text("utf-8")
    assert re.findall(r"Markup\(.*", text) == [
        'Markup(" ").join(text.split()), data_address(self.files[f"{stem}.png"]), files)',
        "Markup(_templates().get_template(template).render(values))",
    ]
    assert gallery._templates().autoescape is True


def test_a_run_in_a_folder_whose_name_is_not_utf_8_is_good(good, tmp_path):
    folder = Path(str(tmp_path / "run-\udc80"))
    shutil.copytree(good / "run", folder)
    run = read_run(folder)
    assert len(run.effects()) == run.patches() == 894
    assert "run-\\udc80" in write_report([folder], tmp_path / "r.html").read_text("utf-8")
