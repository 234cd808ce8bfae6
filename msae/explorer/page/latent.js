// In the middle: all that is known of a latent.

const ROWS_AT_FIRST = 25; // of a long table

function head(latent) {
  const level = core.level[latent];
  const above = ancestors(latent);
  const rate = core.rate[latent];
  const name = core.label[latent];
  const terms = [
    [
      "fires on",
      rate > 0 ? `${percent(rate)} of tokens` : "no token",
      rate > 0 ? `1 in ${count(Math.round(1 / rate))}` : null,
    ],
    ["largest activation", number(core.largest[latent])],
    ["level", `${level} of ${levels.at(-1)}`, range(level)],
    ["descendants", count(descendants[latent])],
  ];
  return el(
    "div.head",
    above.length > 0 &&
      el(
        "ol.path",
        { "aria-label": "Ancestors" },
        above.map((at) => el("li", link(at))),
      ),
    el(
      "div.heading",
      el(
        "h1",
        { tabindex: -1, id: "title" },
        dot(level),
        el("span.number", `#${latent}`),
        name && el("span.label", visible(name)),
      ),
      moves(latent),
    ),
    el(
      "dl.terms",
      terms.map(([term, value, more]) =>
        el("div", el("dt", term), el("dd", value, more && el("span.quiet", ` ${more}`))),
      ),
    ),
  );
}

function range(level) {
  const latents = ofLevel.get(level);
  const [first, last] = [latents[0], latents.at(-1)];
  return last - first + 1 === latents.length ? `latents ${first}–${last}` : plural(latents.length, "latent");
}

function moves(latent) {
  const to = neighbours(latent);
  const sibling = core.parent[latent] >= 0 ? "sibling" : inForest(latent) ? "tree" : "latent";
  const ways = [
    ["up", "↑", "parent"],
    ["down", "↓", "first child"],
    ["left", "←", `previous ${sibling}`],
    ["right", "→", `next ${sibling}`],
  ];
  return el(
    "div.moves",
    { role: "group", "aria-label": "Walk through the forest; the arrow keys do the same" },
    ways.map(([way, sign, name]) => {
      if (to[way] === undefined) return el("span.move", { "aria-hidden": "true" }, sign);
      return el(
        "a.move",
        { href: address(to[way]), title: `${name}, #${to[way]}`, "aria-label": `${name}, #${to[way]}` },
        sign,
      );
    }),
  );
}

function histogram(latent, counts) {
  const total = counts.reduce((sum, value) => sum + value, 0);
  if (!total) return el("p.quiet", "It never fired.");
  const [width, height] = [260, 72];
  const step = width / counts.length;
  const most = Math.log1p(Math.max(...counts));
  const largest = core.largest[latent];
  const bars = counts.map((value, bin) => {
    const tall = value ? Math.max(1.5, (height * Math.log1p(value)) / most) : 0;
    const bounds = `${number((largest * bin) / counts.length)} – ${number((largest * (bin + 1)) / counts.length)}`;
    const title = svg("title");
    title.textContent = `${bounds}: ${plural(value, "token")}`;
    const whole = svg("rect", { x: bin * step, y: 0, width: step, height, class: "behind" }, title);
    return svg(
      "g",
      {},
      svg("rect", { x: bin * step + 0.5, y: height - tall, width: Math.max(0.5, step - 1), height: tall }),
      whole,
    );
  });
  const label = `Histogram of ${plural(total, "activation")} between 0 and ${number(largest)}`;
  return el(
    "figure.histogram",
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
      ...bars,
      svg("line", { x1: 0, x2: width, y1: height - 0.5, y2: height - 0.5 }),
    ),
    el("figcaption", el("span", "0"), el("span", `${plural(total, "token")}, log scale`), el("span", number(largest))),
  );
}

function tokens(ids, words) {
  return el(
    "p.chips",
    ids.map((id) => chip(words[id])),
  );
}

function nearest(found) {
  return el(
    "ol.nearest",
    found.nearest.map((other, i) => {
      const cosine = found.cosines[i];
      return el(
        "li",
        link(other),
        el(
          "span.value",
          { title: "cosine of the decoder rows" },
          cosine == null
            ? "–"
            : cosine
                .toFixed(2)
                .replace(/^-0\.00$/, "0.00")
                .replace("-", "−"),
        ),
      );
    }),
  );
}

// -- its edges

function edgeHead() {
  return el(
    "tr",
    el("th", { scope: "col" }, "latent"),
    core.tests.map(([name, help]) => el("th", { scope: "col", title: help }, el("abbr", { title: help }, name))),
  );
}

function edgeRow(edge, other) {
  const [, , , figures, passed] = edge;
  return el(
    "tr",
    el("th", { scope: "row" }, link(other)),
    figures.map((value, i) => {
      const mark =
        passed[i] == null
          ? null
          : el(
              "span",
              { class: passed[i] ? "pass" : "fail", role: "img", "aria-label": passed[i] ? "passed" : "failed" },
              passed[i] ? "✓" : "✗",
            );
      return el("td", number(value), mark && " ", mark);
    }),
  );
}

function edgeBody(title, edges, other) {
  const body = el("tbody", el("tr.group", el("th", { colspan: core.tests.length + 1, scope: "rowgroup" }, title)));
  body.append(...edges.slice(0, ROWS_AT_FIRST).map((edge) => edgeRow(edge, other(edge))));
  const rest = edges.slice(ROWS_AT_FIRST);
  if (rest.length) {
    const more = el("tr", el("td", { colspan: core.tests.length + 1, class: "more" }));
    const show = () => more.replaceWith(...rest.map((edge) => edgeRow(edge, other(edge))));
    more.firstChild.append(el("button", { type: "button", click: show }, `Show ${count(rest.length)} more`));
    body.append(more);
  }
  return body;
}

function edgeTable(label, bodies) {
  return scroller(label, el("table.edges", el("thead", edgeHead()), bodies));
}

function help() {
  return el(
    "dl.help",
    core.tests.map(([name, text, tested]) =>
      el("div", el("dt", name), el("dd", text, tested ? "" : " (a figure, not a test)")),
    ),
  );
}

const parentEnd = (edge) => edge[0];
const childEnd = (edge) => edge[1];

function family(latent, edges) {
  const kept = (edge) => core.parent[edge[1]] === edge[0];
  const best = (edge) => edge[2] * 100 + edge[4].reduce((sum, mark) => sum + (mark ?? 0), 0);
  const up = edges.filter((edge) => childEnd(edge) === latent);
  const down = edges.filter((edge) => parentEnd(edge) === latent);
  const parent = up.filter(kept);
  const below = down.filter(kept).sort((a, b) => bySize(childEnd(a), childEnd(b)));
  const others = [up, down].map((side) => side.filter((edge) => !kept(edge)).sort((a, b) => best(b) - best(a)));
  const rest = others[0].length + others[1].length;
  const meaning = core.tests.length > 0 && el("details", el("summary", "What the columns mean"), help());
  return section(
    "Parent and children",
    parent.length || below.length
      ? edgeTable(
          "Parent and children with the figures of their tests",
          [
            parent.length && edgeBody("Parent", parent, parentEnd),
            below.length && edgeBody(plural(below.length, "child", "children"), below, childEnd),
          ].filter(Boolean),
        )
      : el("p.quiet", "No edge of this latent is in the forest."),
    rest > 0 &&
      el(
        "details.others",
        el("summary", plural(rest, "other candidate edge")),
        edgeTable(
          "Candidate edges that are not in the forest",
          [
            others[0].length &&
              edgeBody(`Candidates for its parent (${count(others[0].length)})`, others[0], parentEnd),
            others[1].length &&
              edgeBody(`Candidates for its children (${count(others[1].length)})`, others[1], childEnd),
          ].filter(Boolean),
        ),
      ),
    (parent.length > 0 || below.length > 0 || rest > 0) && meaning,
  );
}

// -- its contexts

const holeAt = (context, i) => context.acts[i] > 0 && context.parent != null && context.parent[i] === 0;

function contextText(latent, context, words) {
  const above = core.parent[latent];
  const value = (steps, of) => number((steps / 255) * core.largest[of]);
  const text = el("p", { class: core.joined ? "text" : "text apart", dir: "auto" });
  context.tokens.forEach((id, i) => {
    let shown = core.joined ? visible(words[id]) : spaced(words[id]);
    if (core.joined && i === 0) shown = shown.trimStart() || shown;
    const act = context.acts[i];
    const parentFires = context.parent != null && context.parent[i] > 0;
    if (core.joined && act === 0 && !parentFires && i !== context.peak) return text.append(shown);
    if (core.joined && shown.startsWith(" ") && shown.trim()) {
      text.append(" "); // the shade is of the word, not of the space before it
      shown = shown.slice(1);
    }
    const hole = holeAt(context, i);
    const title = [
      act ? `activation ${value(act, latent)}` : "silent",
      parentFires ? `parent #${above} ${value(context.parent[i], above)}` : null,
      hole ? `hole: the parent #${above} is silent here` : null,
    ];
    const kinds = [
      "token",
      act && "fires",
      hole && "hole",
      parentFires && "parent-fires",
      i === context.peak && "peak",
    ];
    const token = el(
      hole ? "mark" : "span",
      { class: kinds.filter(Boolean).join(" "), title: title.filter(Boolean).join("; ") },
      shown,
    );
    // From a tenth on, so that the weakest activation is seen.
    if (act) token.style.setProperty("--shade", `${(10 + (90 * act) / 255).toFixed(0)}%`);
    text.append(token);
  });
  return text;
}

function contextItem(latent, context, words) {
  const holes = context.tokens.filter((_, i) => holeAt(context, i)).length;
  return el(
    "li",
    el(
      "span.most",
      { title: "activation at the underlined token" },
      number((context.acts[context.peak] / 255) * core.largest[latent]),
    ),
    el(
      "div",
      contextText(latent, context, words),
      el("span.where", holes > 0 && el("span.holes", plural(holes, "hole")), context.where),
    ),
  );
}

function contexts(latent, found, words) {
  if (!found.length) return section("Where it fires", el("p.quiet", "No contexts were kept."));
  const groups = new Map();
  for (const context of found) groups.set(context.group, [...(groups.get(context.group) ?? []), context]);
  const above = found.some((context) => context.parent != null) ? core.parent[latent] : -1;
  const sample = (kind, shade, text) => {
    const node = el("span", { class: `token ${kind}` }, text);
    if (shade) node.style.setProperty("--shade", shade);
    return node;
  };
  const show = el("input", {
    type: "checkbox",
    change: (event) => all.classList.toggle("with-parent", event.target.checked),
  });
  const legend = el(
    "p.legend",
    el(
      "span",
      sample("fires", "20%", "weak"),
      " ",
      sample("fires", "100%", "strong"),
      ` activation, to ${number(core.largest[latent])}`,
    ),
    above >= 0 &&
      el(
        "span",
        sample("fires hole", "40%", "hole"),
        " it fires, its parent ",
        el("a", { href: address(above) }, `#${above}`),
        " is silent",
      ),
    el("span", sample("peak", null, "word"), " the context was chosen for it"),
    above >= 0 && el("label", show, " line above where the parent fires"),
  );
  const all = section(
    "Where it fires",
    legend,
    [...groups].map(([group, members]) => [
      el("h3", group),
      el(
        "ol.contexts",
        members.map((context) => contextItem(latent, context, words)),
      ),
    ]),
  );
  all.classList.add("where-it-fires");
  return all;
}

async function latentPage(latent) {
  const [found, words] = await Promise.all([detail(latent), vocabulary()]);
  return [
    head(latent),
    family(latent, found.edges), // a column for each test: as wide as the page
    el(
      "div.parts",
      el("div.wide", contexts(latent, found.contexts, words)),
      el(
        "div.side",
        section("Activations", histogram(latent, found.histogram)),
        found.promoted && section("Promotes", tokens(found.promoted, words)),
        found.suppressed && section("Suppresses", tokens(found.suppressed, words)),
        found.nearest.length > 0 && section("Nearest decoder rows", nearest(found)),
      ),
    ),
  ];
}
