"""The unchanging parts of report.html: its frame, its style, and the script that draws and switches."""

FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; form-action 'none'; img-src data: blob:; \
style-src 'unsafe-inline'; script-src {hashes}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
{scripts}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --line: #ddd; --pale: #f6f6f4; --paper: #fff;
  --warn: #fdf3ec; --mark: #fdf6e3; --good: #00664b; --bad: #a84400; --open: #7a5200; --edge: #d55e00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #b0b0ac; --line: #3c3c3a; --pale: #262624; --paper: #121212;
    --warn: #33200f; --mark: #332b12; --good: #5fd0a8; --bad: #ff9d5c; --open: #e2b34d; }
  /* Light and dark change places and hues stay, so that white becomes the paper. */
  .chart, svg.sample { filter: invert(.93) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .1rem; }
.said { font-size: 1.1rem; font-weight: 600; } summary h2 { display: inline; }
sup { line-height: 0; }
p, ul { max-width: 78ch; margin: .4rem 0; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; } li { margin: .2rem 0; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.caption { color: var(--soft); font-size: .9rem; }
.notice { border-left: 4px solid var(--edge); background: var(--warn); padding: .5rem .9rem; margin: .8rem 0;
  max-width: 78ch; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .38rem .55rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--ink); line-height: 1.25; }
tbody th { font-weight: 400; }
.results td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.results .right { text-align: right; }
.results .mode { font-weight: 600; white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }
@media (max-width: 640px) { .results .mode { min-width: 6.5rem; } svg.sample { display: block; } }
.results .worst > * { border-bottom-width: 2px; color: var(--soft); } .results .first > * { border-bottom: 0; }
.results small { display: block; font-weight: 400; color: var(--soft); }
.verdict { font-weight: 600; }
.better, .equivalent { color: var(--good); } .worse, .diverged { color: var(--bad); }
.undecided, .incomplete { color: var(--open); }
svg.sample { width: 34px; height: 10px; vertical-align: middle; margin-right: .45rem; flex: none; }
nav { position: sticky; top: 0; z-index: 10; background: var(--paper); border-bottom: 1px solid var(--line);
  padding: .5rem 0; display: flex; flex-wrap: wrap; gap: .35rem; align-items: center; }
nav button { font: inherit; font-size: .85rem; color: inherit; background: var(--pale); border: 1px solid var(--line);
  border-radius: 6px; padding: .15rem .6rem; cursor: pointer; display: flex; align-items: center;
  overflow-wrap: anywhere; text-align: left; max-width: 100%; }
nav button[aria-pressed=false] { opacity: .5; text-decoration: line-through; background: var(--paper); }
nav button:focus-visible, summary:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
.chart { height: 420px; margin: .3rem 0; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0; padding: .35rem .8rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
details td { overflow-wrap: anywhere; } tbody th { white-space: nowrap; color: var(--soft); }
.results tbody th { color: inherit; }
tr.differs > * { background: var(--mark); } tr.differs td { font-weight: 600; }
@media (max-width: 640px) { main { padding: 16px 12px 48px; } .chart { height: 330px; } }
@media print { nav { position: static; } .chart { break-inside: avoid; } }
"""

SCRIPT = """"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const config = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
    showSendToCloud: false, plotlyServerURL: ""};  // Plotly offers to upload the figure otherwise
  const divs = new Map(charts.map(chart => [chart, document.getElementById(chart.id)]));
  const buttons = [...document.querySelectorAll("nav button[data-mode]")];
  const pressed = button => button.getAttribute("aria-pressed") === "true";

  function apply(states) {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", states[i]));
    const on = new Map(buttons.map((button, i) => [Number(button.dataset.mode), states[i]]));
    for (const [, div] of divs) {
      if (div.data.length) Plotly.restyle(div, {visible: div.data.map(trace => on.get(trace.meta))});
    }
  }

  // Zoom is copied to every figure over steps, so that all show the same stretch of the data.
  let following = false;
  async function follow(source, event) {
    if (following || !Object.keys(event).some(key => key.startsWith("xaxis"))) return;
    following = true;
    const range = [...source.layout.xaxis.range];
    const others = charts.filter(chart => chart.over_steps && divs.get(chart) !== source);
    try {
      await Promise.all(others.map(chart => Plotly.relayout(divs.get(chart), {"xaxis.range": [...range]})));
    } finally {
      following = false;
    }
  }

  async function start() {
    const touch = matchMedia("(pointer: coarse)").matches;  // where a finger that drags wants to scroll the page
    for (const [chart, div] of divs) {
      if (touch) chart.figure.layout.dragmode = false;
      await Plotly.newPlot(div, chart.figure.data, chart.figure.layout, config);
      if (chart.over_steps) div.on("plotly_relayout", event => follow(div, event));
    }
    buttons.forEach((button, clicked) => {
      button.addEventListener("click", () => apply(buttons.map((b, i) => pressed(b) !== (i === clicked))));
      button.addEventListener("dblclick", () => {
        const alone = buttons.every((b, i) => pressed(b) === (i === clicked));
        apply(buttons.map((b, i) => alone || i === clicked));
      });
    });
    document.body.dataset.drawn = charts.length;
  }
  start();
})();
"""
