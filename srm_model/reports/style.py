"""The style sheet of the pages.

The colours --s0 to --s3 are for data series such as necks, and are based on the palette of Okabe and Ito. The colours
--s4 to --s7 are an ordered ramp, for example for the stages of the backbone.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fcfcfb; --panel: #f3f4f2; --ink: #1b1f24; --soft: #5a626b; --rule: #d9dcd8; --grid: #e6e8e5;
  --warn: #8a4b00; --warn-ground: #fff3dc; --warn-rule: #d88a00;
  --s0: #0072b2; --s1: #c8540a; --s2: #00805f; --s3: #9a4f80;
  --s4: #23104f; --s5: #5f45a8; --s6: #8c78cc; --s7: #b09adf;
}
@media (prefers-color-scheme: dark) { :root {
  --ground: #15181b; --panel: #1e2226; --ink: #e8eaeb; --soft: #a3abb3; --rule: #363c42; --grid: #2a2f34;
  --warn: #ffd08a; --warn-ground: #33260f; --warn-rule: #b97f1d;
  --s0: #56b4e9; --s1: #f08a4b; --s2: #35c79d; --s3: #d98cbd;
  --s4: #f1edff; --s5: #c3b5f6; --s6: #9786dc; --s7: #7564b8;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.015em; text-wrap: balance;
  overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .4rem; padding-top: 1.1rem; border-top: 1px solid var(--rule);
  letter-spacing: -.01em; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .4rem; }
p, ul.notes { max-width: 46rem; margin: .4rem 0 .9rem; }
ul.notes { padding-left: 1.2rem; } ul.notes li { margin: .3rem 0; }
.meta, .caption, figcaption small { color: var(--soft); font-size: .88rem; }
.lede { font-size: 1.1rem; line-height: 1.5; }
.fail { color: var(--warn); font-weight: 600; }
.missing { color: var(--soft); font-style: italic; }
.notice { background: var(--warn-ground); color: var(--ink); border: 1px solid var(--warn-rule);
  border-left-width: 6px; border-radius: 4px; padding: .8rem 1rem; margin: 1.2rem 0; max-width: 46rem; }
.notice strong { color: var(--warn); }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding-bottom: .3rem; }
th, td { padding: .32rem .8rem .32rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; color: var(--soft); font-size: .84rem; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 8.5rem; }
tbody th.neck { white-space: nowrap; min-width: 0; }
tbody td:last-child:not(.n) { min-width: 9rem; }
td.n, th.n { text-align: right; white-space: nowrap; padding-left: .5rem; }
tr.group th { padding-top: 1rem; font-weight: 650; }
tr.total > * { font-weight: 650; border-bottom-width: 2px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .5rem 2rem;
  align-items: start; }
.results { display: grid; grid-template-columns: minmax(0, 1fr); gap: .5rem 2.5rem; align-items: start; }
@media (min-width: 62rem) { .results { grid-template-columns: auto minmax(20rem, 1fr); } }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: .8rem 1.4rem; margin: .4rem 0; align-items: end; }
figure { margin: .4rem 0; min-width: 0; }
figcaption { font-size: .92rem; font-weight: 600; margin-bottom: .25rem; }
figcaption small { display: block; font-weight: 400; }
.chart > svg { display: block; width: 100%; max-width: 27rem; height: auto; }
svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.s4 { color: var(--s4); } .s5 { color: var(--s5); } .s6 { color: var(--s6); } .s7 { color: var(--s7); }
.swatch { margin-right: .4rem; }
.s0::before, .s4::before { content: "●"; } .s1::before, .s5::before { content: "■"; }
.s2::before, .s6::before { content: "▲"; } .s3::before, .s7::before { content: "◆"; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: 0 0 .2rem; padding: 0;
  font-size: .86rem; }
.example { margin: 1.1rem 0 1.6rem; }
.strip { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 12.5rem)); gap: .7rem; }
.strip figure { margin: 0; }
.strip img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--panel); }
.strip figcaption { font-weight: 400; font-size: .84rem; line-height: 1.35; margin: .3rem 0 0; }
.strip b { font-variant-numeric: tabular-nums; }
code, pre { font: .86rem/1.5 ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace; }
pre { background: var(--panel); border-radius: 4px; padding: .7rem .9rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
td code { overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; }
footer { margin-top: 3rem; color: var(--soft); font-size: .84rem; }
@media (max-width: 34rem) {
  main { padding: 1.4rem 1rem 3rem; } h1 { font-size: 1.5rem; } .lede { font-size: 1.02rem; }
  th, td { padding-right: .55rem; }
  .strip { grid-template-columns: 1fr 1fr; } .strip figure:first-child { grid-column: 1 / -1; max-width: 50%; }
}
@media print {
  :root { --ground: #fff; --panel: #f4f4f4; --ink: #000; --soft: #444; --rule: #bbb; --grid: #ddd;
    --warn: #6b3a00; --warn-ground: #fff; --s0: #0072b2; --s1: #c8540a; --s2: #00805f; --s3: #9a4f80;
    --s4: #23104f; --s5: #5f45a8; --s6: #8c78cc; --s7: #b09adf; }
  .scroll { overflow: visible; } table { font-size: .84rem; }
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; }
  figure, .example, tr, .notice { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""
