"""Trees of plain values to YAML text, which `fusedlm.config.reading` reads back as the same values."""

import json
import re

import yaml

from fusedlm.config import scalars
from fusedlm.config.reading import CoreSchema

# Characters that YAML takes for a line break, that it does not allow, or that reorder the text around them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff]")


class _Dumper(CoreSchema, yaml.SafeDumper):
    """Strings with unsafe characters are quoted, and these escaped; mappings that occur twice are written twice.

    What YAML 1.1 would not read as a string is quoted too, such as dates.
    """

    def resolve(self, kind, value, implicit):
        tag = super().resolve(kind, value, implicit)
        return yaml.SafeDumper.resolve(self, kind, value, implicit) if tag == scalars.STR else tag

    def analyze_scalar(self, scalar):
        analysis = super().analyze_scalar(scalar)
        if _UNSAFE.search(scalar):
            analysis.allow_flow_plain = analysis.allow_block_plain = False
            analysis.allow_single_quoted = analysis.allow_block = False
        return analysis

    def write_double_quoted(self, text, split=True):
        self.write_indicator(inline_yaml(text), True)

    def ignore_aliases(self, data):
        return True


def dump_yaml(tree) -> str:
    """A tree of plain values as YAML, one key per line."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def inline_yaml(tree) -> str:
    """A tree of plain values as JSON, which is YAML in one line, with unsafe characters escaped."""
    text = json.dumps(tree, ensure_ascii=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
