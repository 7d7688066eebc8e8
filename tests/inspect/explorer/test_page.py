"""The page in a real browser, opened from disk: what it shows is what the data say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from watched_page import Watched

import graphopt
from graphopt.inspect.explorer.data import page_data
from graphopt.inspect.explorer.page import render
from graphopt.inspect.explorer.subject import Subject, subject_of
from graphopt.program.program import Program
from graphopt.record.diff import align, is_change, read_line
from graphopt.record.layers import layer_block
from graphopt.record.report import Report
from graphopt.record.trace import Trace


def go(page: Any, name: str) -> None:
    page.locator(f"#passes .pass:has-text('{name}')").click()


def texts_of(program: Program, name: str) -> tuple[str, str]:
    """The graph texts before and after a pass."""
    steps = program.trace.steps
    index = [step.name for step in steps].index(name)
    return steps[index - 1].text, steps[index].text


def code(text: str | None) -> str:
    """A line without its comment."""
    return "" if text is None else text.partition("  # ")[0]


def test_the_timeline_lists_every_pass(opened: Any, program: Program) -> None:
    records = program.report.passes
    shown = opened.locator("#passes .pass")
    assert shown.count() == len(records)
    assert shown.locator(".label").all_inner_texts() == [record.name for record in records]
    assert [int(n) for n in shown.locator(".number:nth-child(3)").all_inner_texts()] == [
        len(record.sites) for record in records
    ]
    idle = [r.name for r in records if not r.sites and r.nodes_before == r.nodes_after]
    assert opened.locator("#passes .idle .label").all_inner_texts() == idle
    assert idle
    assert (
        f"{records[0].nodes_before} → {records[-1].nodes_after} nodes"
        in opened.locator("#facts").inner_text()
    )


def test_a_pass_that_changed_nothing_says_so(opened: Any) -> None:
    go(opened, "dead_code")
    assert "changed nothing" in opened.locator("#panel-changes").inner_text()


@pytest.mark.parametrize("name", ["remove_noops", "fuse_norm", "fuse_rope", "insert_kv_cache"])
def test_the_diff_is_that_of_the_data(opened: Any, program: Program, name: str) -> None:
    go(opened, name)
    changed = [pair for pair in align(*texts_of(program, name)) if is_change(pair)]
    counts = {
        "removed": sum(after is None for _, after in changed),
        "added": sum(before is None for before, _ in changed),
        "changed": sum(None not in pair for pair in changed),
    }
    for kind, count in counts.items():
        shown = opened.locator(f"[data-count={kind}]").inner_text()
        assert int(re.sub(r"\D", "", shown)) == count
    while (fold := opened.locator(".diff .alike button")).count():
        fold.first.click()
    cells = opened.evaluate(
        """() => [...document.querySelectorAll('.diff tr[data-change]:not(.same)')].map(
             (row) => [...row.cells].map((cell) => {
               const code = cell.querySelector('code')?.cloneNode(true);
               code?.querySelector('.place')?.remove();
               return code?.textContent ?? ''; }))"""
    )
    assert cells == [[code(before), code(after)] for before, after in changed]


def test_signs_stand_beside_colours(opened: Any) -> None:
    go(opened, "fuse_norm")
    for kind, sign in (("removed", "−"), ("changed", "~")):
        row = opened.locator(f".diff tr.{kind}").first
        assert row.locator(".sign").first.inner_text() == sign
        assert row.locator(".sign").first.get_attribute("aria-label") == kind


def test_unchanged_lines_unfold(opened: Any) -> None:
    go(opened, "fuse_norm")
    before = opened.locator(".diff tr.same").count()
    opened.locator(".diff .fold:not(.alike) button").first.click()
    assert opened.locator(".diff tr.same").count() > before


def test_layers_that_changed_alike_are_one(opened: Any) -> None:
    go(opened, "fuse_norm")
    text = opened.locator(".diff .alike button").first.inner_text()
    assert re.search(r"[23] more layers changed alike: model\.layers\.\{\d-3\}", text)


def test_the_drawing_has_the_nodes_of_the_layer(opened: Any, program: Program) -> None:
    go(opened, "fuse_norm")
    opened.keyboard.press("2")
    opened.locator("#region").select_option("model.layers.0")
    for side, text in enumerate(texts_of(program, "fuse_norm")):
        lines = [read_line(line) for line in text.splitlines()]
        names = {line.key for line in lines if layer_block(line.layer) == "model.layers.0"}
        drawn = opened.locator("figure").nth(side).locator(".node:not(.outside)")
        labels = [node.get_attribute("aria-label").partition(",")[0] for node in drawn.all()]
        assert set(labels) == names
        assert len(labels) == len(names)
        assert f"{len(names)} nodes" in opened.locator("figcaption").nth(side).inner_text()
    assert (
        opened.locator("figure").nth(0).locator(".node.removed .badge").first.text_content() == "−"
    )


def test_layers_that_are_alike_are_one_choice(opened: Any) -> None:
    go(opened, "fuse_norm")
    opened.keyboard.press("2")
    options = opened.locator("#region option").all_inner_texts()
    assert any(re.match(r"model\.layers\.\{\d-3\} ×[234]", option) for option in options)


def test_a_found_node_is_drawn_in_its_own_layer(opened: Any) -> None:
    """Layers 1 to 3 are one choice; a node of layer 3 is shown there all the same."""
    opened.keyboard.press("/")
    opened.keyboard.type("rms_norm layers.3.post")
    opened.locator(".found button").first.click()
    selected = opened.locator(".node.selected:not(.outside)")
    assert selected.count() >= 1
    assert "model.layers.3" in opened.locator("figcaption").first.inner_text()
    box, view = selected.first.bounding_box(), opened.locator(".canvas").first.bounding_box()
    assert box["y"] >= view["y"] - 1
    assert box["y"] < view["y"] + view["height"]


def test_drawings_zoom(opened: Any) -> None:
    opened.keyboard.press("2")
    scene = opened.locator(".canvas svg > g").first
    before = scene.get_attribute("transform")
    opened.get_by_role("button", name=re.compile("^zoom in")).first.click()
    assert scene.get_attribute("transform") != before


def test_a_node_tells_everything(opened: Any, data: dict[str, Any]) -> None:
    go(opened, "fuse_norm")
    opened.keyboard.press("2")
    opened.locator("#region").select_option("model.layers.0")
    opened.locator("figure").nth(1).locator(
        ".node[aria-label*='mlp'], .node[aria-label*='linear']"
    ).first.dispatch_event("click")
    details = opened.locator("#details")
    name = details.locator(".value").inner_text()
    step = next(p["step"] for p in data["passes"] if p["name"] == "fuse_norm")
    row = next(
        data["entries"][e] for e in data["steps"][step]["lines"] if data["entries"][e][1] == name
    )
    facts = {key: details.locator(f"[data-fact='{key}']").inner_text()
             for key in ("type", "layer", "source", "FLOPs", "bytes", "bound")}  # fmt: skip
    assert facts["type"] == data["types"][row[2]]
    assert facts["layer"] == data["layers"][row[6]]
    assert facts["source"] == data["sources"][row[7]]
    assert float(facts["FLOPs"].split()[0]) == pytest.approx(row[9] / 1e3, rel=1e-2)
    assert float(facts["bytes"].split()[0]) == pytest.approx(row[10] / 1e3, rel=1e-2)
    assert "H200" in facts["bound"]
    opened.locator("#machine").select_option(label="L4")
    assert "L4" in details.locator("[data-fact='bound']").inner_text()
    assert "native linear" in details.inner_text()
    opened.keyboard.press("Escape")
    assert details.is_hidden()


def test_history_goes_both_ways(opened: Any, program: Program) -> None:
    go(opened, "fuse_norm")
    opened.locator(".diff tr.changed td:last-child code").first.click()
    details = opened.locator("#details").inner_text()
    assert "Comes from (captured)" in details
    assert "fuse_norm#0" in details
    assert "Became (last graph)" in details
    opened.locator(".diff tr.removed code").first.click()
    details = opened.locator("#details").inner_text()
    assert "removed by fuse_norm" in details
    assert "graphopt.rms_norm" in details.partition("Became (last graph)")[2]


def test_candidates_filter_and_jump(opened: Any, program: Program) -> None:
    opened.keyboard.press("3")
    opened.locator("#filter-pass").select_option("all")
    total = sum(len(record.candidates) for record in program.report.passes)
    assert f"{total} in" in opened.locator("#panel-candidates h2").inner_text()
    index = [record.name for record in program.report.passes].index("fuse_norm")
    opened.locator("#filter-pass").select_option(str(index))
    assert set(
        opened.locator(".candidates tbody tr[data-outcome] td:first-child").all_inner_texts()
    ) == {"fuse_norm"}
    opened.locator(".candidates tr[data-outcome] button.link").first.click()
    assert "graphopt.rms_norm" in opened.locator("#details h2").inner_text()
    assert opened.locator("#tab-graph").get_attribute("aria-selected") == "true"
    assert opened.locator(".node.selected").count() >= 1


def test_rejections_say_why_and_where(browser: Any, rejected: Program, tmp_path: Path) -> None:
    watched = Watched(browser, graphopt.explore(rejected, tmp_path / "page.html"))
    page = watched.page
    page.keyboard.press("3")
    page.locator("#filter-pass").select_option("all")
    page.locator("#filter-outcome").select_option("rejected")
    shown = page.locator(".candidates tr[data-outcome]")
    assert shown.count() == 1
    (reason,) = rejected.report.rejections("fuse_attention")
    assert f"{reason.code}: {reason.text}" in shown.inner_text()
    shown.locator("button.link").click()
    assert "aten.softmax" in page.locator("#details h2").inner_text()
    watched.close()


def test_costs_add_up(opened: Any, data: dict[str, Any]) -> None:
    go(opened, "fuse_norm")
    opened.keyboard.press("4")
    step = next(p["step"] for p in data["passes"] if p["name"] == "fuse_norm")
    total = sum(data["entries"][entry][9] or 0 for entry in data["steps"][step]["lines"])
    shown = opened.locator("[data-total=flops] b").inner_text()
    assert float(shown.split()[0]) == pytest.approx(total / 1e6, rel=1e-2)
    assert opened.locator(".chart svg").count() == 4
    points = opened.locator("circle.point")
    assert points.count() == len(data["passes"]) + 1
    opened.locator("circle.point").last.click()
    assert (
        opened.locator("#passes [aria-current] .label").inner_text() == data["passes"][-1]["name"]
    )


def test_search(opened: Any, program: Program) -> None:
    opened.keyboard.press("/")
    opened.keyboard.type("%12")
    first = opened.locator(".found tbody tr").first
    assert first.locator("td").first.inner_text() == "%12"
    assert not any(
        re.fullmatch(r"%12\d", text)
        for text in opened.locator(".found td:first-child").all_inner_texts()[:1]
    )
    opened.locator("#query").fill("rms_norm layers.2")
    layers = opened.locator(".found td:nth-child(4)").all_inner_texts()
    assert layers
    assert all(layer.startswith("model.layers.2") for layer in layers)
    opened.locator(".found button").first.click()
    assert "rms_norm" in opened.locator("#details h2").inner_text()
    opened.locator("#query").fill("no such thing")
    assert "Nothing found" in opened.locator("#panel-search").inner_text()


def test_the_keyboard_reaches_everything(opened: Any, program: Program) -> None:
    for key, name in zip(
        "12345", ("changes", "graph", "candidates", "costs", "search"), strict=True
    ):
        opened.keyboard.press(key)
        assert opened.locator(f"#panel-{name}").is_visible()
        assert opened.locator("[role=tabpanel]:visible").count() == 1
    opened.keyboard.press("1")
    names = [record.name for record in program.report.passes]
    current = opened.locator("#passes [aria-current] .label")
    at = names.index(current.inner_text())
    opened.keyboard.press("k")
    assert current.inner_text() == names[at - 1]
    opened.keyboard.press("j")
    assert current.inner_text() == names[at]
    # In the search field keys are text.
    opened.keyboard.press("/")
    opened.keyboard.type("j1")
    assert opened.locator("#query").input_value() == "j1"
    opened.keyboard.press("Escape")
    opened.keyboard.press("2")
    opened.locator(".node").first.focus()
    opened.keyboard.press("Enter")
    assert opened.locator("#details").is_visible()


def test_dark_is_dark(browser: Any, page_file: Path) -> None:
    watched = Watched(browser, page_file, scheme="dark")
    colour = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in re.findall(r"\d+", colour)) < 64
    watched.close()


HOSTILE = '</script><img src=x onerror="document.title=1"><script>document.title=1</script>'


def test_names_never_run(browser: Any, program: Program, tmp_path: Path) -> None:
    """A layer, a source, an op and the model's name with markup in them are text."""
    subject = subject_of(program)
    names = re.compile(r"model\.layers\.1|modeling_llama\.py")
    steps = tuple(
        replace(step, text=names.sub(lambda _: HOSTILE, step.text)) for step in subject.trace.steps
    )
    image = "<img src=x onerror=alert(1)>"
    records = json.dumps(subject.report.to_dict()).replace("model.layers.1", image)
    report = Report.from_dict(json.loads(records))
    file = tmp_path / "hostile.html"
    hostile = Subject(f"{HOSTILE}{{{{data}}}}", Trace(steps), report)
    file.write_text(render(page_data(hostile)), encoding="utf-8")
    watched = Watched(browser, file)
    page = watched.page
    for key in "12345":
        page.keyboard.press(key)
    page.keyboard.press("/")
    page.keyboard.type("onerror")
    page.locator(".found button").first.click()
    assert HOSTILE in page.locator("#details").inner_text()
    assert page.locator("#name").inner_text().startswith(HOSTILE)
    assert page.locator("img").count() == 0
    assert page.title() != "1"
    watched.close()


def test_a_model_without_layers(browser: Any, projection: torch.nn.Module, tmp_path: Path) -> None:
    program = graphopt.compile(projection, torch.randn(2, 8), serving="off")
    watched = Watched(browser, graphopt.explore(program, tmp_path / "page.html"))
    for key in "12345":
        watched.page.keyboard.press(key)
    watched.page.keyboard.press("2")
    assert watched.page.locator(".node").count() >= 2
    watched.close()


@pytest.mark.real_model
def test_the_real_model_is_small_and_fast(
    browser: Any, tmp_path: Path, screenshot: Callable[[Any, str], None]
) -> None:
    program = graphopt.compile("smollm2-135m", backend="reference")
    file = graphopt.explore(program, tmp_path / "page.html")
    size = file.stat().st_size / 1e6
    watched = Watched(browser, file)
    page = watched.page
    shown = page.evaluate("performance.getEntriesByName('shown')[0].startTime")
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    seconds = max(shown, painted) / 1e3
    assert page.locator(".diff tbody tr").count() > 10
    print(f"{size:.2f} MB, first view after {seconds:.2f} s")  # noqa: T201
    assert size <= 5
    assert seconds < 2
    go(page, "fuse_norm")
    screenshot(page, "changes")
    page.keyboard.press("2")
    page.locator("#region").select_option("model.layers.0")
    page.locator("figure").nth(1).locator(".node.changed").first.click()
    screenshot(page, "graph")
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    page.locator("#filter-pass").select_option("all")
    screenshot(page, "candidates")
    page.keyboard.press("4")
    screenshot(page, "costs")
    watched.close()
