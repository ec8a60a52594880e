"""What the header of a report says about several sources."""

import math

from fusedlm.report.facts import header_facts


def test_a_header_of_several_sources():
    source = {"source": {"type": "text", "path": "some/where/web.txt"}}
    recipe = {"data": {"source": None, "sources": {"web": source, "old": {"source": {"type": "sotu"}}}}}
    assert header_facts(recipe, {}, 15.0, {"old": (1000.0, math.nan), "web": (2.5e6, 0.75)}) == [
        ("Text", "web.txt, sotu"),
        ("Source old", "1.00 k tokens read"),
        ("Source web", "2.50 M tokens read, 0.75 epochs"),
    ]
