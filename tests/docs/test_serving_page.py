"""What docs/serving.md says of other servers is so: variables of the resolver, bodies of requests, names."""

import json
import re

import pytest
from doc_pages import ROOT, blocks_of

from mopl.conditioning import weights_name, weights_of_name

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
TEXTS = [block.text for block in blocks_of(ROOT / "docs" / "serving.md")]


def test_the_variables_of_the_resolver_are_those_of_the_table():
    source = (ROOT / "mopl" / "integrations" / "vllm.py").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `(MOPL_\w+)` \|", PAGE, re.MULTILINE))
    read = {word for word in re.findall(r"\"(MOPL_VLLM_\w+)\"", source)}
    assert described == read == set(re.findall(r"MOPL_VLLM_\w+", PAGE))
    assert described == set(re.findall(r"^    (MOPL_VLLM_\w+)  ", source, re.MULTILINE))  # its own list
    from mopl.conditioning.adapter_cache import MAX_CACHED
    from mopl.conditioning.adapter_files import VLLM_RANKS

    assert f"in one life of the server | {MAX_CACHED} |" in PAGE
    assert f"one of {', '.join(map(str, VLLM_RANKS))};" in PAGE


def test_bodies_of_requests_are_json_and_names_of_trade_offs_are_as_they_are_written():
    bodies = [body for text in TEXTS for body in re.findall(r"-d '(\{.*?\})'", text, re.DOTALL)]
    bodies += [body for text in TEXTS for body in re.findall(r"'(\{\"name\".*?\})'", text)]
    assert len(bodies) >= 6 and all(isinstance(json.loads(body), dict) for body in bodies)
    (merged,) = (json.loads(body)["parameters"]["merged_adapters"] for body in bodies if "merged_adapters" in body)
    assert sum(c * c for c in merged["weights"]) == pytest.approx(1, abs=2e-6)
    names = set(re.findall(r"w=[\d.]+,[\d.]+", PAGE)) - {"w=0.70,0.30"}  # which the page says is not how it is written
    assert names and all(weights_name(weights_of_name(name.rstrip("."), 2)) == name.rstrip(".") for name in names)
