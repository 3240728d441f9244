"""The report page in a browser: what fits, what a hand and a keyboard reach, and that axe-core finds nothing."""

import base64
import csv
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from browsing import browsing, needs_browser

from mopl.pareto import Front, weight_grid
from mopl.report import plot_front, write_csv, write_page

pytestmark = [needs_browser, pytest.mark.slow]
NAMES = ["helpful", "harmless", "brief", "polite", "true"]


def made(m, method="weight-cos-dpo", points=None, shift=0.0):
    """A front whose figures are linear in the weights, so that interpolated ones are known."""
    weights = weight_grid(m, points)
    auxiliary = [[0.3 + shift + 0.4 * w + 0.05 * j for j, w in enumerate(row)] for row in weights.tolist()]
    main = [0.8 - 0.1 * row[0] + shift for row in weights.tolist()]
    rows = [{"weights": w, "main": x, "auxiliary": a, "interval": {"main": [x - 0.01, x + 0.02]}} for w, x, a in
            zip(weights.tolist(), main, auxiliary, strict=True)]  # fmt: skip
    return Front.from_dict(
        {"method": method, "objectives": NAMES[:m], "main": "choice", "points": rows, "hypervolume": 0.4,
         "reference_point": [0.0] * m, "seconds": 2.0, "parameters": 10, "seed": 0, "data": "made", "interval": {},
         "regret": 0.01}
    )  # fmt: skip


def base(m):
    point = {"weights": [], "main": 0.75, "auxiliary": [0.42 + 0.05 * j for j in range(m)], "interval": {}}
    return Front.from_dict(
        {"method": "base", "objectives": NAMES[:m], "main": "choice", "points": [point], "hypervolume": 0.1,
         "reference_point": [0.0] * m, "seconds": 1.0, "parameters": 10, "seed": 0, "data": "made", "interval": {},
         "regret": None}
    )  # fmt: skip


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page for each number of objectives, with several methods, answers, accuracies and a true front."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for m, points in ((2, None), (3, 28), (5, 12)):
        fronts = [base(m), made(m, points=points), made(m, "dpo-ls", points, shift=-0.02)]
        picture = plot_front(fronts, folder / f"{m}.png")
        count = len(fronts[1].points)
        found[m] = write_page(
            fronts, folder / f"{m}.html", picture=picture, continuous=["weight-cos-dpo"],
            truth=[[0.8] * m, [0.7] * m], accuracy={"weight-cos-dpo": [[0.5 + 0.01 * i] * m for i in range(count)]},
            samples=[{"prompt": "why?", "method": "weight-cos-dpo", "responses": [f"at {i}" for i in range(count)]}],
        )  # fmt: skip
    return found


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_page_scrolls_sideways(tab, pages, m, width):
    tab.resize(width, 800)
    tab.open(pages[m].as_uri())
    tab.do("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert tab.do("document.scrollingElement.scrollWidth") == width
    assert tab.complaints() == []


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("width", [390, 1280])
def test_labels_cover_no_point_and_no_other_label(tab, pages, m, width):
    tab.resize(width, 800)
    tab.open(pages[m].as_uri())
    found = tab.do(
        """(() => {
          const box = (node) => { const b = node.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
          const clash = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
          let places = 0, covered = 0;
          const slider = document.querySelector('[type=range]');
          for (let i = Number(slider.min); i <= Number(slider.max) + 1e-9; i += (slider.max - slider.min) / 10) {
            slider.value = i;
            slider.dispatchEvent(new Event('input'));
            const labels = [...document.querySelectorAll('#chart .halo')].map(box);
            const marks = [...document.querySelectorAll('#chart path')].map(box);
            places += labels.length;
            labels.forEach((one, k) => {
              covered += marks.filter((mark) => clash(one, mark)).length;
              covered += labels.slice(k + 1).filter((other) => clash(one, other)).length;
            });
          }
          return [places, covered];
        })()"""
    )
    assert found[0] == 22 and found[1] == 0


def test_figures_between_evaluated_points_are_interpolated_and_said_to_be(tab, pages):
    tab.resize(1280, 800)
    tab.open(pages[3].as_uri() + "#w=0.41,0.37,0.22")
    assert "Interpolated between the evaluated points #" in tab.do("document.getElementById('status').textContent")
    shown = tab.do(
        "[...document.querySelectorAll('.value')].map((v) => [v.dataset.axis, v.querySelector('b').textContent])"
    )
    expected = [0.3 + 0.4 * w + 0.05 * j for j, w in enumerate((0.41, 0.37, 0.22))] + [0.8 - 0.041]
    assert all(x.startswith("≈ ") for _, x in shown)
    assert {int(k): float(x[2:]) for k, x in shown} == {k: pytest.approx(x, abs=6e-4) for k, x in enumerate(expected)}
    assert "interpolated" in tab.do("document.getElementById('bars-key').textContent")
    # Answers are those of an evaluated point, and of a method with a model for each point nothing is interpolated.
    assert tab.do("document.getElementById('sample-list').textContent").startswith("why?at ")
    tab.open(pages[3].as_uri() + "#w=0.41,0.37,0.22&method=dpo-ls")
    assert tab.do("document.getElementById('status').textContent").startswith("Evaluated point #")


@pytest.mark.parametrize(("m", "points"), [(3, 10), (3, 16), (4, 11), (4, 35), (5, 6)])
def test_figures_that_are_linear_in_the_weights_are_interpolated_without_an_error(tab, pages, m, points):
    tab.open(pages[3].as_uri())
    weights = weight_grid(m, points)
    asked = torch.rand(50, m, dtype=torch.float64, generator=torch.Generator().manual_seed(m)).log()
    asked = torch.cat([asked / asked.sum(1, keepdim=True), weights])
    found = tab.do(f"{asked.tolist()}.map((w) => figures.around(w, {weights.tolist()}))")
    for w, corners in zip(asked, found, strict=True):
        index, shares = zip(*corners, strict=True)
        assert all(share > 0 for share in shares) and len(corners) <= m
        torch.testing.assert_close(
            torch.tensor(shares, dtype=torch.float64) @ weights[list(index)], w, rtol=0, atol=1e-9
        )


def test_an_added_centre_is_a_corner_of_what_lies_around_it(tab, pages):
    tab.open(pages[3].as_uri())
    weights = weight_grid(4, 11)  # the middles of edges, and equal weights at the end
    found = tab.do(f"figures.around([0.251, 0.25, 0.25, 0.249], {weights.tolist()})")
    assert dict(map(tuple, found))[10] == pytest.approx(0.996)  # without it, figures would jump there


def test_a_grid_that_is_no_lattice_is_not_interpolated(tab, pages):
    tab.open(pages[3].as_uri())
    assert tab.do(f"figures.around([0.3, 0.3, 0.2, 0.1, 0.1], {weight_grid(5, 12).tolist()})") is None


def test_the_link_to_a_point_leads_back_to_it(tab, tmp_path):
    def with_points(m, rows):
        content = made(m, points=2 if m == 2 else None).to_dict()
        points = [{"weights": w, "main": 0.5 + 0.01 * i, "auxiliary": [0.4] * m, "scale": scale}
                  for i, (w, scale) in enumerate(rows)]  # fmt: skip
        return Front.from_dict({**content, "points": points})

    for name, front in {
        "one": with_points(1, [([1.0], 1.0), ([1.0], 2.0), ([1.0], 4.0)]),
        "alone": with_points(1, [([1.0], 1.0)]),
        "without": with_points(2, [([], 1.0), ([], 1.0)]),
        "twins": with_points(2, [([0.5, 0.5], 1.0), ([1.0, 0.0], 1.0), ([0.5, 0.5], 1.0)]),
    }.items():
        page = write_page([front], tmp_path / f"{name}.html").as_uri()
        for i in range(len(front.points)):
            tab.open(f"{page}?number={i}#w={i}")
            link = tab.do("document.querySelector('#status a').hash")
            tab.open(f"{page}?link={i}{link}")
            said = tab.do("document.getElementById('status').textContent")
            assert said.startswith(f"Evaluated point #{i} of"), (name, link)
            assert ("no weights" in said) == (name == "without")


def test_answers_beside_interpolated_figures_are_said_to_be_those_of_an_evaluated_point(tab, pages):
    note = "document.getElementById('samples-note')"
    tab.open(pages[3].as_uri() + "#w=0.41,0.37,0.22")
    nearest = tab.do("document.querySelector('#chart [aria-checked=true]').dataset.point")
    said = f"Answers are not interpolated: these are of the nearest evaluated point #{nearest} at weights"
    assert tab.do(f"{note}.hidden") is False
    assert tab.do(f"{note}.textContent").startswith(said.replace("weights", "helpful"))
    tab.open(pages[3].as_uri() + "?evaluated#w=1,0,0")
    assert tab.do(f"{note}.hidden")


def test_a_label_without_a_free_place_is_left_out(tab, pages):
    tab.open(pages[2].as_uri())
    svg = "document.getElementById('chart')"
    taken = "[[0, 0, 1000, 1000]]"
    before = tab.do(f"{svg}.querySelectorAll('.halo').length")
    tab.do(f"figures.label({svg}, 'label', 100, 100, {taken}, [0, 0, 400, 400]); 0")
    assert tab.do(f"{svg}.querySelectorAll('.halo').length") == before
    tab.do(f"figures.label({svg}, 'label', 100, 100, [], [0, 0, 400, 400]); 0")
    assert tab.do(f"{svg}.querySelectorAll('.halo').length") == before + 1
    words = tab.do("[[123456.1, 123456.9], [0.00051, 0.000518]].map((ends) => figures.ticks(ends, 4).map((t) => t[1]))")
    assert all(len(set(each)) == len(each) >= 3 for each in words)


@pytest.mark.parametrize("ends", [[0.794, 0.9252], [-1.2300001e-6, -1.2295e-6], [99999.499994, 99999.500106]])
@pytest.mark.parametrize("width", [320, 1280])
def test_numbers_of_an_axis_are_whole_and_apart(tab, pages, ends, width):
    tab.resize(width, 800)
    tab.open(pages[2].as_uri())
    found = tab.do(
        f"""(() => {{
          const svg = document.getElementById('chart'), whole = svg.getBoundingClientRect();
          svg.replaceChildren();
          paperOf(svg, [{ends}, [0, 9.2]], whole.width, whole.height);
          const boxes = [...svg.querySelectorAll('.tick')].map((text) => text.getBoundingClientRect());
          const below = boxes.filter((b) => b.top > whole.bottom - 42).sort((a, b) => a.left - b.left);
          return [below.length, boxes.filter((b) => b.left < whole.left || b.right > whole.right || b.top < whole.top),
                  below.filter((b, k) => k && b.left < below[k - 1].right)];
        }})()"""
    )
    assert found[0] > 1 and found[1:] == [[], []]


@pytest.mark.parametrize(
    ("ends", "count"), [([95000, 105000], 4), ([-131000, 7500], 6), ([2.1e-4, 3.3e-4], 7), ([1e5, 1e5 + 1e-3], 4)]
)
def test_numbers_of_an_axis_stand_where_they_say(tab, pages, ends, count):
    tab.open(pages[2].as_uri())
    marks = tab.do(f"figures.ticks({ends}, {count})")
    step = marks[1][0] - marks[0][0]
    assert all(abs(float(text) - place) < step / 100 for place, text in marks)


def test_long_names_in_one_word_do_not_scroll_the_page(tab, tmp_path):
    content = made(2, points=3).to_dict() | {"method": "m" * 80, "objectives": ["a" * 80, "b" * 80], "main": "c" * 80}
    tab.resize(320, 800)
    tab.open(write_page([Front.from_dict(content)], tmp_path / "long.html").as_uri())
    assert tab.do("document.scrollingElement.scrollWidth") == 320


def test_lines_across_all_figures_break_where_one_is_missing_and_ends_tell_apart(tab, tmp_path):
    content = made(3, points=10).to_dict()
    content["points"][4]["auxiliary"][1] = None
    for i, point in enumerate(content["points"]):
        point["main"] = 0.9001 + 0.0003 * i / 9
    tab.open(write_page([Front.from_dict(content, missing=True)], tmp_path / "gap.html").as_uri())
    path = tab.do("document.querySelector('[data-line=\"4\"]').getAttribute('d')")
    assert path.count("M") == 2 and "NaN" not in path
    assert tab.do("document.querySelector('[data-line=\"3\"]').getAttribute('d')").count("M") == 1
    ticks = tab.do("[...document.querySelectorAll('#parallel .tick')].map((t) => t.textContent)")
    assert ticks[-2:] == ["0.9004", "0.9001"]
    words = tab.do("[[0, 1], [1234, 1235], [1.2e30, 1.3e30], [0, 2e-5], [-1, 1]].map(figures.endsInWords)")
    assert words == [["0", "1"], ["1234", "1235"], ["1.200e30", "1.300e30"], ["0", "2.0e-5"], ["-1", "1"]]


def test_every_step_of_a_slider_changes_a_figure(tab, pages):
    tab.resize(1280, 800)
    tab.open(pages[3].as_uri())
    seen = tab.do(
        """[...Array(100).keys()].map((i) => {
          const slider = document.getElementById('weight-0');
          slider.value = i / 100;
          slider.dispatchEvent(new Event('input'));
          return [...document.querySelectorAll('.value b')].map((b) => b.textContent).join();
        })"""
    )
    assert len(set(seen)) == 100


def test_points_are_chosen_by_keyboard_and_by_a_tap_beside_them(tab, pages):
    tab.resize(390, 800)
    tab.open(pages[2].as_uri() + "#w=0.5,0.5")
    tab.do("document.querySelector('#chart [tabindex=\"0\"]').focus()")
    tab.key("ArrowRight")
    chosen = "document.querySelector('#chart [aria-checked=true]').dataset.point"
    assert tab.do(chosen) == "6" and tab.do(f"document.activeElement.dataset.point === {chosen}")
    tab.key("Home")
    assert tab.do(chosen) == "0"
    x, y = tab.do(
        """(() => { document.getElementById('chart').scrollIntoView({ block: 'center' });
        const b = document.querySelector('[data-point="8"]').getBoundingClientRect();
        return [b.left + b.width / 2 + 3, b.top + b.height / 2 - 16]; })()"""
    )
    for kind in ("mousePressed", "mouseReleased"):
        tab.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert tab.do(chosen) in ("7", "8", "9")


def test_a_line_across_all_figures_is_there_for_three_objectives_and_more(tab, pages):
    tab.resize(1280, 800)
    tab.open(pages[2].as_uri())
    assert tab.do("document.getElementById('parallel-box').hidden")
    tab.open(pages[3].as_uri())
    assert tab.do("document.querySelectorAll('[data-line]').length") == 28
    tab.do("document.querySelector('[data-line=\"4\"]').dispatchEvent(new Event('click'))")
    assert "Evaluated point #4 of 28" in tab.do("document.getElementById('status').textContent")


def test_the_points_are_saved_as_the_csv_of_the_command_and_the_chart_as_a_picture(tab, pages, tmp_path):
    tab.open(pages[2].as_uri())
    text = tab.do("JSON.parse(document.getElementById('mopl-data').textContent).csv")
    fronts = [base(2), made(2), made(2, "dpo-ls", shift=-0.02)]
    assert text == Path(write_csv(fronts, tmp_path / "points.csv")).read_text()
    assert len(list(csv.reader(io.StringIO(text)))) == 1 + 1 + 11 + 11
    tab.do("downloads.save = (blob, name) => { window.saved = [blob, name]; }; 0")
    tab.do("document.getElementById('save-png').click()")
    tab.until("window.saved")
    found = tab.do(
        "new Promise((done) => { const r = new FileReader(); r.onload = () => done([r.result, saved[1]]);"
        "r.readAsDataURL(saved[0]); })"
    )
    picture = base64.b64decode(found[0].split(",")[1])
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000 and found[1] == "made-choose-the-trade-off.png"


def test_without_a_script_there_is_a_picture_and_headings_say_what_they_mean(tab, pages):
    text = pages[2].read_text(encoding="utf-8")
    assert '<noscript><p class="notice">' in text and '<img src="data:image/png;base64,' in text.split("</noscript>")[0]
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    tab.open(pages[2].as_uri())
    tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert tab.do("document.querySelector('noscript img').naturalWidth") == 1200
    links = tab.do("[...document.querySelectorAll('a.about')].map((a) => [a.textContent, a.hash, a.title.length > 20])")
    assert {hash for _, hash, _ in links} >= {"#weights", "#pareto-front", "#hypervolume", "#steering-regret"}
    assert all(told for _, _, told in links)


def test_accuracy_stands_beside_the_figures(tab, pages):
    tab.open(pages[2].as_uri() + "#w=0.3,0.7")
    assert "accuracy 53 %" in tab.do("document.querySelector('[data-axis=\"0\"]').textContent")
    assert "accuracy helpful" in pages[2].read_text(encoding="utf-8")


def axe():
    """Return the script of axe-core out of a package that brings it, without importing that package."""
    for package in ("axe_playwright_python", "axe_core_python"):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(place).rglob("axe.min.js")):
                return file.read_text(encoding="utf-8")
    pytest.skip("axe-core is not installed: pip install --no-deps axe-playwright-python")


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing(tab, pages, m, dark):
    script = axe()
    tab.resize(390 if dark else 1280, 800, dark=dark)
    tab.open(pages[m].as_uri())
    tab.do("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    tab.call("Page.setBypassCSP", enabled=True)
    tab.do(f"{script}; 0")
    found = tab.do("axe.run(document).then((r) => r.violations.map((v) => [v.id, v.help, v.nodes.map((n) => n.html)]))")
    assert found == [], json.dumps(found, indent=1)[:3000]
