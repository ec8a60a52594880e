"""Check that imports between the packages of fusedlm run downwards only, and draw them.

Writes docs/images/import-graph.png and the edges it shows to docs/images/import-graph.json, which a test compares with
the source. Exits with 1 and one line an import when the layering is broken.
"""

import ast
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# From the top: a package imports packages of lower layers only. "" leaves a place free in the picture.
LAYERS = [
    ["cli"],
    ["compare", "harness"],
    ["probes", ""],
    ["report"],
    ["train"],
    ["export", "quant", "serve"],
    ["runs", "evaluate", "generation"],
    ["data", "model", "optim"],
    ["nn"],
    ["files", "strict_json", "distributed", "terminal", "ops"],
]
READ_BY_ALL = "config"
PLAIN = ("model", "nn", "ops", "distributed", "files", "terminal")  # take plain arguments: a model needs no recipe
FOR_TESTS = "testing"
ROOT = "fusedlm"
DEPTH = {package: depth for depth, layer in enumerate(LAYERS) for package in layer if package}

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURE = REPOSITORY / "docs/images/import-graph.png"
RECORD = PICTURE.with_suffix(".json")


@dataclass(frozen=True)
class Import:
    """One import of another package of ours: where it stands, who imports, and what."""

    file: str
    line: int
    importer: str
    imported: str  # a package, or `fusedlm` for the library face itself

    def problem(self) -> str | None:
        """Why the layering forbids it, None when it does not."""
        where = f"{self.file}:{self.line}: {self.importer} imports {self.imported}"
        if self.imported == ROOT:
            return f"{where}, the library face; import from the package that defines the name"
        if self.imported == READ_BY_ALL and self.importer in PLAIN:
            return f"{where}; {self.importer} takes plain arguments"
        if self.imported == FOR_TESTS:
            return f"{where}, which is for tests only"
        if self.importer == READ_BY_ALL:
            return f"{where}, but {READ_BY_ALL} imports none of ours"
        if self.importer in (ROOT, FOR_TESTS) or self.imported == READ_BY_ALL:
            return None
        for package in (self.importer, self.imported):
            if package not in DEPTH:
                return f"{where}, but {package} has no layer; give it one in LAYERS"
        if DEPTH[self.imported] <= DEPTH[self.importer]:
            return f"{where}, which is not in a lower layer"
        return None


def find_imports(repository: Path) -> list[Import]:
    """Every import between packages, at module level or inside functions, sorted by place."""
    found = []
    for path in sorted((repository / ROOT).rglob("*.py")):
        parts = path.relative_to(repository).with_suffix("").parts
        importer = parts[1] if len(parts) > 2 else ROOT if parts[1] in ("__init__", "__main__") else parts[1]
        package = parts[:-1]  # what a relative import starts from
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for imported in _imported_packages(node, package):
                if imported != importer:
                    found.append(Import(str(path.relative_to(repository)), node.lineno, importer, imported))
    return found


def edges(imports: list[Import]) -> list[list[str]]:
    """Which package imports which, each pair once."""
    return sorted({(i.importer, i.imported) for i in imports if i.importer != ROOT})


def _imported_packages(node: ast.AST, package: tuple[str, ...]) -> set[str]:
    if isinstance(node, ast.Import):
        modules = [alias.name.split(".") for alias in node.names]
        return {m[1] if len(m) > 1 else ROOT for m in modules if m[0] == ROOT}
    if not isinstance(node, ast.ImportFrom):
        return set()
    module = node.module.split(".") if node.module else []
    if node.level:
        module = [*package[: len(package) - node.level + 1], *module]
    if module[:1] != [ROOT]:
        return set()
    if len(module) > 1:
        return {module[1]}
    known = {*DEPTH, READ_BY_ALL, FOR_TESTS}
    return {alias.name if alias.name in known else ROOT for alias in node.names if alias.name != "__version__"}


def _direct(pairs: list[tuple[str, str]]) -> set[tuple[str, str]]:
    """The pairs that no longer path implies."""
    below = defaultdict(set)
    for importer, imported in pairs:
        below[importer].add(imported)

    def reachable(start: str) -> set[str]:
        return below[start].union(*(reachable(package) for package in below[start]))

    return {(a, b) for a, b in pairs if not any(b in reachable(other) for other in below[a] - {b})}


def draw(pairs: list[tuple[str, str]], path: Path) -> None:
    """The layers as rows, and the arrows from importer to imported that no longer path implies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    width, height, row_gap = 2.0, 0.56, 1.1
    center = {}
    for depth, layer in enumerate(LAYERS):
        for column, package in enumerate(layer):
            if package:
                column_gap = 3.0 if len(layer) == 3 else 2.3
                center[package] = ((column - (len(layer) - 1) / 2) * column_gap, -depth * row_gap)
    bottom = -(len(LAYERS) - 1) * row_gap
    figure, axes = plt.subplots(figsize=(10, 8))

    def box(x, y, w, h, label, face, edge, **text):
        shape = "round,pad=0,rounding_size=0.1"
        axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=shape, fc=face, ec=edge, lw=1.3, zorder=3))
        axes.text(x, y, label, ha="center", va="center", family="monospace", zorder=4, **text)

    def arrow(importer, imported):
        (x0, y0), (x1, y1) = center[importer], center[imported]
        top = y1 + height / 2 + 0.02
        if DEPTH[imported] == DEPTH[importer] + 1:
            enter = x1 + 0.18 * (x0 - x1)
            curve = Curve([(x0 + 0.18 * (x1 - x0), y0 - height / 2), (enter, top)])
        else:  # out at the side and down past the rows between
            side = 1 if x1 >= x0 else -1
            if x1 == x0:
                lane = x0 + side * (width / 2 + 0.5)
                points = [(x0 + width / 2, y0), (lane, y0), (lane, y1), (x1 + width / 2 + 0.02, y1)]
            else:
                down = x1 - side * 0.3
                points = [(x0 + side * width / 2, y0), (down, y0), (down, y0 - 0.3 * row_gap), (down, top)]
            curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        axes.add_patch(
            FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=14, lw=1.5, color="#334155", zorder=2)
        )

    for importer, imported in sorted(_direct([pair for pair in pairs if set(pair) <= DEPTH.keys()])):
        arrow(importer, imported)
    for package, (x, y) in center.items():
        box(x, y, width, height, package, "#e8f0fe", "#3b6fd4", fontsize=13)
    bar = max(x for x, _ in center.values()) + width / 2 + 0.9
    label = f"{READ_BY_ALL}: imports none; read by all but {', '.join(PLAIN[:3])}"
    box(bar, bottom / 2, 0.6, height - bottom, label, "#f3f4f6", "#9ca3af", fontsize=12, rotation=270)
    axes.set_xlim(min(x for x, _ in center.values()) - width / 2 - 0.1, bar + 0.4)
    axes.set_ylim(bottom - height / 2 - 0.1, height / 2 + 0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    imports = find_imports(REPOSITORY)
    problems = [problem for i in imports if (problem := i.problem())]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    pairs = edges(imports)
    draw(pairs, PICTURE)
    RECORD.write_text("[\n" + ",\n".join(f"  {json.dumps(pair)}" for pair in pairs) + "\n]\n", encoding="utf-8")
    print(f"{PICTURE.relative_to(REPOSITORY)}: {len(pairs)} edges")
    return 0


if __name__ == "__main__":
    sys.exit(main())
