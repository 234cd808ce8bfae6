// In the middle while no latent is chosen: what was measured, and what came out.

function funnel() {
  const first = core.funnel[0][1];
  const cell = (value, column) => {
    const share = first[column] ? value / first[column] : 0;
    const bar = el("span.bar", { "aria-hidden": "true" });
    bar.style.width = `${Math.min(100, 100 * share)}%`;
    return el("td", el("span.figure", count(value), " ", el("span.quiet", percent(share))), bar);
  };
  return scroller(
    "How many edges are left after each test",
    el(
      "table.funnel",
      el(
        "thead",
        el(
          "tr",
          el("th", { scope: "col" }, "left after"),
          core.funnelColumns.map((name) => el("th", { scope: "col" }, name)),
        ),
      ),
      el(
        "tbody",
        core.funnel.map(([stage, counts]) => el("tr", el("th", { scope: "row" }, stage), counts.map(cell))),
      ),
    ),
  );
}

function levelTable() {
  const mean = (latents) => latents.reduce((sum, latent) => sum + core.rate[latent], 0) / latents.length;
  const row = (level) => {
    const latents = ofLevel.get(level);
    const values = [
      count(latents.length),
      count(latents.filter((at) => core.parent[at] >= 0).length),
      count(latents.filter((at) => children[at].length).length),
      count(latents.filter((at) => core.rate[at] === 0).length),
      percent(mean(latents)),
    ];
    return el(
      "tr",
      el("th", { scope: "row" }, dot(level), ` ${range(level)}`),
      values.map((value) => el("td", value)),
    );
  };
  const columns = ["level", "latents", "with a parent", "with children", "never fire", "mean firing rate"];
  return scroller(
    "Levels",
    el(
      "table.levels",
      el(
        "thead",
        el(
          "tr",
          columns.map((name) => el("th", { scope: "col" }, name)),
        ),
      ),
      el("tbody", levels.map(row)),
    ),
  );
}

function keys() {
  const rows = [
    ["↑", "the parent"],
    ["↓", "the first child"],
    ["← →", "the siblings; at a root the other trees; without edges the next number"],
    ["/", "the search: a number, a piece of text on which latents fire, or words of a label"],
    ["Esc", "leaves the search"],
  ];
  return el(
    "dl.keys",
    rows.map(([key, text]) => el("div", el("dt", el("kbd", key)), el("dd", text))),
  );
}

function startPage() {
  return [
    el(
      "div.start",
      el("h1", { tabindex: -1, id: "title" }, core.title),
      core.verdict && el("p.verdict", core.verdict),
      core.funnel.length > 0 && section("Edges that survive", funnel()),
      core.facts.length > 0 &&
        section(
          "Facts",
          el(
            "dl.facts",
            core.facts.map(([term, value]) => el("div", el("dt", term), el("dd", value))),
          ),
        ),
      section(
        "Levels",
        el(
          "p.quiet",
          `Nested prefixes of ${core.prefixes.map(count).join(", ")} latents: `,
          "the first are general, the later specific.",
        ),
        levelTable(),
      ),
      core.tests.length > 0 && section("Tests of an edge", help()),
      section("Keys", keys()),
    ),
  ];
}

function unknownPage(asked) {
  return [
    el(
      "div.start",
      el("h1", { tabindex: -1, id: "title" }, "No such latent"),
      el("p", `This page has latents 0 to ${count(n - 1)}; asked was ${asked}.`),
    ),
  ];
}
