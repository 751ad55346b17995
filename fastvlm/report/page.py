"""The page around the sections: one file without scripts or external resources, in the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Collection
from html import escape

LIGHT = ("#3b6fd4", "#d9680f", "#2b8a5f", "#b03a8c", "#7a54d1", "#0e8fa6", "#b8860b", "#c2413b", "#5d7a1f", "#6b7280")
DARK = ("#7aa5f7", "#f0964e", "#5cc795", "#e07cc0", "#a98bf0", "#4fc3d6", "#e0b84c", "#f0857f", "#a3c45c", "#9aa4b2")

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2127;--soft:#5b6470;--line:#e2e4e8;--track:#edeff2;
--good:#1a7f4b;--bad:#b4470b;--accent:#2f5fc4;LIGHT}
@media(prefers-color-scheme:dark){:root{--bg:#111418;--card:#191d23;--ink:#e6e9ee;--soft:#9aa4b2;--line:#2b313a;
--track:#262c35;--good:#5cc795;--bad:#f0964e;--accent:#8db1ff;DARK}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1060px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:clamp(1.5rem,4.5vw,2.1rem);line-height:1.2;margin:0 0 .3rem;letter-spacing:-.01em}
h2{font-size:1.3rem;margin:2.8rem 0 .6rem;padding-top:1.1rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.8rem 0 .5rem}h4{font-size:.95rem;margin:1.3rem 0 .4rem}
p{margin:.5rem 0;max-width:72ch}.soft,figcaption em,small{color:var(--soft)}small{font-size:.85em}
.none{color:var(--soft);font-style:italic;font-size:.92rem}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:1.1rem 0 0;font-size:.95rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
code,pre,.mono{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow:auto;
max-height:70vh}
.command{white-space:pre-wrap;word-break:break-word}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:1.4rem 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:13px 16px}
.card b{display:block;font-size:1.65rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:.88rem;line-height:1.35;display:block}
.scroll{overflow-x:auto;margin:.6rem 0;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:middle}
tr:last-child td{border-bottom:0}th{font-weight:600;color:var(--soft);font-size:.84rem}
td.n,th.n{text-align:right}td.wide{min-width:140px;width:30%}
td:first-child{white-space:normal;min-width:120px}td b+small{color:var(--soft)}
tr.sum td{font-weight:650}td small{margin-left:.35em}
.good{color:var(--good)}.bad{color:var(--bad)}
.pill{display:inline-block;border-radius:99px;padding:0 .6em;font-size:.84em;border:1px solid currentColor}
.bar{position:relative;height:14px;background:var(--track);border-radius:3px}
.bar i{position:absolute;top:0;bottom:0}.bar .fill{left:0;background:var(--c);border-radius:3px;opacity:.85}
.bar .whisker{top:6px;bottom:6px;background:var(--ink)}
.bar .mark{width:3px;margin-left:-1.5px;top:-3px;bottom:-3px;border-radius:2px;background:var(--soft)}
.bar .removed,.key.removed{background:var(--c1)}.bar .swapped,.key.swapped{background:var(--c3)}
.bar .majority,.key.majority{background:var(--c9)}.bar .target,.key.target{background:var(--ink)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:12px;margin:.6rem 0}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 12px 9px;
min-width:0}
figcaption{font-weight:600;font-size:.92rem;margin:0 4px 4px}figcaption em{font-style:normal;font-weight:400}
svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--soft);font-family:inherit}
svg .grid{stroke:var(--line);stroke-width:1}svg path{fill:none}svg .line{stroke-width:1.9;stroke-linejoin:round}
svg .faint{stroke-width:1;opacity:.28}svg .points{stroke-width:1.3;stroke-dasharray:3 3}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.82rem;color:var(--soft);margin:4px 4px 0}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.key{display:inline-block;width:14px;height:3px;margin-right:6px;vertical-align:middle;border-radius:2px;
background:var(--c)}
.key.points{height:7px;width:7px;border-radius:50%}.key.removed,.key.swapped,.key.majority,.key.target{width:3px;
height:13px}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:12px;margin:.6rem 0}
.answer{display:flex;gap:12px;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px;
min-width:0}
.answer img,.answer .blank{width:112px;height:112px;flex:none;object-fit:contain;border-radius:6px;
background:var(--track);
image-rendering:auto}.answer .blank{display:grid;place-items:center;font-size:.78rem;color:var(--soft)}
.answer div{min-width:0;font-size:.9rem;line-height:1.4;overflow-wrap:anywhere}.answer p{margin:0 0 .35rem}
.answer .type{color:var(--soft);font-size:.8rem}.answer dl{margin:0;display:grid;grid-template-columns:auto 1fr;
gap:0 .6rem}
.answer dt{color:var(--soft);font-size:.82rem}.answer dd{margin:0}
img.sheet{width:100%;border:1px solid var(--line);border-radius:8px;background:#fff;margin:.4rem 0}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--accent);font-size:.94rem}
.chain{display:flex;flex-wrap:wrap;align-items:stretch;gap:8px;margin:1rem 0}
.chain .card{padding:9px 14px;flex:1 1 130px}.chain .card b{font-size:1.02rem}
.chain .arrow{align-self:center;color:var(--soft)}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.1rem;font-size:.93rem;margin:.6rem 0}
dl.facts dt{color:var(--soft)}dl.facts dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
@media(max-width:560px){main{padding:20px 14px 40px}body{font-size:15px}th,td{padding:6px 9px}
.chain{flex-direction:column}.chain .card{flex:none}.chain .arrow{transform:rotate(90deg)}
.answer img,.answer .blank{width:92px;height:92px}.cards{grid-template-columns:1fr 1fr}.card b{font-size:1.35rem}
td.wide{min-width:110px}dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:.4rem}}
@media print{details{display:block}.scroll{overflow:visible}}
"""


def make_page(title: str, sections: list[tuple[str, str, str]], *, lead: str, footer: str) -> str:
    """Build the whole document from (anchor, heading, HTML) sections."""
    style = STYLE.replace("LIGHT", _variables(LIGHT)).replace("DARK", _variables(DARK))
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    body = "".join(f'<section id="{anchor}"><h2>{escape(name)}</h2>{html}</section>' for anchor, name, html in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An empty icon keeps a browser from asking the server for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head>\n'
        f"<body><main><header><h1>{escape(title)}</h1>{lead}<nav>{links}</nav></header>\n{body}\n"
        f"<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def _variables(colours: tuple[str, ...]) -> str:
    return ";".join(f"--c{i}:{colour}" for i, colour in enumerate(colours))


def table(columns: list[str], rows: list[list[str]], *, numeric: Collection[int] = (), num_sums: int = 0) -> str:
    """Render a table that scrolls sideways on a narrow screen; its cells are HTML.

    Columns in `numeric` are right-aligned, the last `num_sums` rows are in bold.
    """
    head = "".join(f"<th{' class=n' if i in numeric else ''}>{escape(c)}</th>" for i, c in enumerate(columns))
    body = []
    for r, row in enumerate(rows):
        cells = "".join(
            f"<td{' class=n' if i in numeric else ' class=wide' if cell.startswith('<div') else ''}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        body.append(f"<tr{' class=sum' if r >= len(rows) - num_sums else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def none(text: str) -> str:
    """Say that a piece is missing."""
    return f'<p class="none">{escape(text)}</p>'
