"""Style and script of a page. The script shows values under the pointer; without it a page is complete."""

from fusedlm.report.style import variables

STYLE = f"""
:root {{ color-scheme: light dark; --muted: #656d76; --page: #fff; --soft: #f6f8fa;
  {variables(dark=False)} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --muted: #8d96a0; --page: #101418; --soft: #171c22;
  {variables(dark=True)} }}
}}
""" + """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 61rem; padding: 3rem 1.5rem 4rem; background: var(--page); color: var(--ink);
  overflow-wrap: break-word;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; font-weight: 600; letter-spacing: -0.015em;
  overflow-wrap: anywhere; }
h2 { margin: 3rem 0 0.75rem; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
header p { margin: 0.5rem 0 0; max-width: 44rem; color: var(--muted); overflow-wrap: anywhere; }
header dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.15rem 1.2rem; margin: 1rem 0 0; }
header dd { margin: 0; overflow-wrap: anywhere; }
dt { color: var(--muted); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1.4rem 1.5rem;
  margin: 2rem 0 0; padding: 1.4rem 0; border: solid var(--line); border-width: 1px 0; }
.figures div { display: flex; flex-direction: column; min-width: 0; }
.figures dt { font-size: 0.8rem; }
.figures dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
.figures small { color: var(--muted); font-size: 0.8rem; letter-spacing: 0; display: block; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2.2rem 1.5rem; margin-top: 2.2rem; }
.plots .wide { grid-column: 1 / -1; }
figure { margin: 0; position: relative; }
figure h3 { margin: 0 0 0.4rem; font-size: 0.95rem; font-weight: 600; overflow-wrap: anywhere; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
figure svg.narrow, .tip[hidden] { display: none; }
figcaption { margin-top: 0.4rem; color: var(--muted); font-size: 0.85rem; overflow-wrap: anywhere; }
.rule { stroke: var(--soft-ink); stroke-width: 0.7; pointer-events: none; }
.tip { position: absolute; z-index: 1; pointer-events: none; max-width: 17rem; padding: 0.35rem 0.6rem;
  background: var(--page); border: 1px solid var(--line); border-radius: 5px; font-size: 0.8rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; box-shadow: 0 2px 8px rgb(0 0 0 / 15%); }
.tip div { display: flex; gap: 0.45rem; align-items: baseline; }
.tip i { flex: none; width: 0.6rem; height: 0.6rem; border-radius: 50%; }
.tip b { margin-left: auto; font-weight: 600; white-space: nowrap; }
pre { margin: 0; padding: 1rem 1.2rem; background: var(--soft); border-radius: 6px; overflow-x: auto;
  font: 12.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 44rem; padding-left: 1.1rem;
  border-left: 2px solid var(--line); font-family: Charter, Georgia, "DejaVu Serif", serif; font-size: 1rem; }
.scroll { overflow-x: auto; margin-bottom: 1.2rem; }
table { border-collapse: collapse; font-size: 0.87rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 1.6rem 0.28rem 0; border-bottom: 1px solid var(--line); vertical-align: baseline;
  text-align: left; }
th { color: var(--muted); font-weight: 400; }
.facts th { min-width: 7rem; max-width: 16rem; overflow-wrap: anywhere; }
.facts td { min-width: 9rem; overflow-wrap: anywhere; }
.facts th:last-child, .facts td:last-child { padding-right: 0; }
.numbers th, .numbers td { text-align: right; padding: 0.28rem 0 0.28rem 1.5rem; }
.numbers td { white-space: nowrap; }
.numbers th:first-child, .numbers td:first-child { padding-left: 0; text-align: left; }
.named td:first-child { white-space: normal; min-width: 7rem; max-width: 18rem; overflow-wrap: anywhere; }
.verdicts { margin: 0; padding-left: 1.2rem; font-size: 1.05rem; }
.verdicts li { margin-bottom: 0.3rem; overflow-wrap: anywhere; }
.remark { color: var(--muted); font-size: 0.9rem; max-width: 50rem; }
.best td { font-weight: 600; }
details summary { margin: 3rem 0 0.75rem; cursor: pointer; }
details summary h2 { display: inline; }
footer { margin-top: 3.5rem; color: var(--muted); font-size: 0.8rem; }
@media screen and (max-width: 44rem) {
  body { padding: 1.5rem 1rem 3rem; }
  header dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  header dd { margin-bottom: 0.4rem; }
  .plots { grid-template-columns: minmax(0, 1fr); }
  figure svg.narrow { display: block; }
  figure svg.full { display: none; }
}
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .figures div { break-inside: avoid; }
  h2, figure h3, summary { break-after: avoid; }
  h2, details summary { margin-top: 1.6rem; }
  .scroll { overflow: visible; }
  table { font-size: 0.72rem; }
  .numbers th, .numbers td { padding-left: 0.7rem; white-space: normal; }
  .numbers th:first-child, .numbers td:first-child { padding-left: 0; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 8pt; }
  .tip { display: none; }
}
"""

SCRIPT = """
'use strict';
for (const figure of document.querySelectorAll('figure[data-curves]')) {
  const curves = JSON.parse(figure.dataset.curves), labels = JSON.parse(figure.dataset.labels);
  const tip = figure.appendChild(document.createElement('div'));
  tip.className = 'tip';
  tip.hidden = true;
  for (const svg of figure.querySelectorAll('svg')) {
    const axes = JSON.parse(svg.dataset.axes);
    const rule = svg.appendChild(document.createElementNS(svg.namespaceURI, 'line'));
    rule.setAttribute('class', 'rule');
    rule.style.display = 'none';
    const hide = () => { tip.hidden = true; rule.style.display = 'none'; };
    const show = (event) => {
      const area = svg.getBoundingClientRect(), zoom = area.width / svg.viewBox.baseVal.width;
      const x = (event.clientX - area.left) / zoom, y = (event.clientY - area.top) / zoom;
      const at = axes.findIndex(({box: [left, top, width, height]}) =>
        x >= left - 3 && x <= left + width + 3 && y >= top - 3 && y <= top + height + 3);
      if (at < 0) return hide();
      const {box: [left, top, width, height], x: [low, high, isLog]} = axes[at];
      const place = (value) => left + width * (isLog ? Math.log(value / low) / Math.log(high / low)
                                                     : (value - low) / (high - low));
      let nearest = null;
      const found = curves[at].map(([label, colour, xs, ys, texts]) => {
        let best = -1, gap = Infinity;
        xs.forEach((value, i) => {
          const distance = Math.abs(place(value) - x);
          if (distance < gap) { gap = distance; best = i; }
        });
        if (best >= 0 && (nearest === null || gap < nearest.gap)) nearest = {gap, value: xs[best]};
        return {label, colour, gap, value: xs[best], text: texts ? texts[best] : ys[best]};
      });
      const near = nearest && found.filter((entry) => Math.abs(place(entry.value) - place(nearest.value)) < 9);
      if (!near || !near.length) return hide();
      tip.replaceChildren();
      const head = tip.appendChild(document.createElement('div'));
      head.textContent = labels[at] + ': ' + nearest.value.toLocaleString('en', {maximumSignificantDigits: 5});
      for (const {label, colour, text} of near) {
        const row = tip.appendChild(document.createElement('div'));
        row.appendChild(document.createElement('i')).style.background = `var(--${colour})`;
        row.appendChild(document.createElement('span')).textContent = label;
        row.appendChild(document.createElement('b')).textContent =
          typeof text === 'number' ? text.toLocaleString('en', {maximumSignificantDigits: 5}) : text;
      }
      const line = place(nearest.value);
      for (const [name, value] of [['x1', line], ['x2', line], ['y1', top], ['y2', top + height]])
        rule.setAttribute(name, value);
      rule.style.display = '';
      tip.hidden = false;
      const around = figure.getBoundingClientRect(), right = area.left - around.left + line * zoom;
      const fits = right + 14 + tip.offsetWidth <= around.width;
      tip.style.left = Math.max(0, fits ? right + 14 : right - 14 - tip.offsetWidth) + 'px';
      tip.style.top = area.top - around.top + (top + 4) * zoom + 'px';
    };
    svg.addEventListener('pointermove', show);
    svg.addEventListener('pointerdown', show);
    svg.addEventListener('pointerleave', hide);
  }
}
let closed = [];
addEventListener('beforeprint', () => {
  closed = [...document.querySelectorAll('details:not([open])')];
  for (const part of closed) part.open = true;
});
addEventListener('afterprint', () => { for (const part of closed) part.open = false; });
"""
