// On the left: the forest to open and close, or the latents of a level.

const LEVEL_COLOURS = 6; // style.css has that many; deeper levels begin again
const narrow = matchMedia("(max-width: 800px)");

const address = (latent) => `#latent=${latent}`;

function dot(level) {
  const colour = ((level - 1) % LEVEL_COLOURS) + 1;
  return el(
    "span",
    { class: `dot level-${colour}`, role: "img", "aria-label": `level ${level}`, title: `level ${level}` },
    level,
  );
}

function link(latent, attributes = {}) {
  const name = core.label[latent];
  return el(
    "a.latent",
    { href: address(latent), title: summary(latent), ...attributes },
    dot(core.level[latent]),
    el("span.number", `#${latent}`),
    name && el("span.label", visible(name)),
  );
}

function summary(latent) {
  const below = descendants[latent] ? `, ${plural(descendants[latent], "descendant")}` : "";
  return `#${latent}, level ${core.level[latent]}, fires on ${percent(core.rate[latent])} of tokens${below}`;
}

function section(title, ...content) {
  return el("section", el("h2", title), ...content);
}

function chip(text) {
  return el("span.chip", spaced(text));
}

function scroller(label, table) {
  return el("div.scroll", { tabindex: 0, role: "region", "aria-label": label }, table);
}

const list = byId("list");
const rowsNode = byId("rows");
const tools = byId("tools");
const outline = { tab: "forest", level: levels[0], order: "rate", open: new Set(), rows: [], here: -1 };
const rowHeight = () => (narrow.matches ? 40 : 28);

function forestRows() {
  const rows = [];
  const waiting = roots.map((latent) => [latent, 0]).reverse();
  while (waiting.length) {
    const [latent, depth] = waiting.pop();
    rows.push({ latent, depth });
    if (!outline.open.has(latent)) continue;
    for (let i = children[latent].length - 1; i >= 0; i--) waiting.push([children[latent][i], depth + 1]);
  }
  return rows;
}

function levelRows() {
  const latents = [...(ofLevel.get(outline.level) ?? [])];
  const value = { rate: core.rate, largest: core.largest, descendants }[outline.order];
  if (value) latents.sort((a, b) => value[b] - value[a] || a - b);
  return latents.map((latent) => ({ latent, depth: 0 }));
}

function drawOutline() {
  outline.rows = outline.tab === "forest" ? forestRows() : levelRows();
  rowsNode.style.height = `${outline.rows.length * rowHeight()}px`;
  drawRows();
}

// Only the rows in sight are elements: a level may have twenty thousand.
function drawRows() {
  const height = rowHeight();
  const first = Math.max(0, Math.floor(list.scrollTop / height) - 6);
  const last = Math.ceil((list.scrollTop + list.clientHeight) / height) + 6;
  const focused = rowsNode.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  rowsNode.replaceChildren(...outline.rows.slice(first, last).map((row, i) => drawRow(row, (first + i) * height)));
  if (focused) rowsNode.querySelector(`[data-key="${focused}"]`)?.focus({ preventScroll: true });
}

function drawRow({ latent, depth }, top) {
  const forest = outline.tab === "forest";
  const open = outline.open.has(latent);
  const below = descendants[latent];
  const toggle = el(
    "button",
    {
      type: "button",
      class: "toggle",
      "data-key": `toggle-${latent}`,
      "aria-expanded": String(open),
      "aria-label": `children of #${latent}`,
      click: () => {
        if (!outline.open.delete(latent)) outline.open.add(latent);
        drawOutline();
      },
    },
    open ? "▾" : "▸",
  );
  const value =
    forest || outline.order === "descendants"
      ? below && count(below)
      : outline.order === "largest"
        ? number(core.largest[latent])
        : percent(core.rate[latent]);
  const row = el(
    "li",
    { class: latent === outline.here ? "here" : null },
    forest && (below ? toggle : el("span.toggle")),
    link(latent, { "data-key": `link-${latent}`, "aria-current": latent === outline.here ? "page" : null }),
    el("span.value", value || ""),
  );
  row.style.top = `${top}px`;
  row.style.paddingLeft = `${4 + 14 * Math.min(depth, 8)}px`;
  return row;
}

function drawTools() {
  for (const tab of ["forest", "levels"]) byId(`tab-${tab}`).setAttribute("aria-pressed", String(tab === outline.tab));
  const set = (change) => () => {
    const controls = () => [...tools.querySelectorAll("button, select")];
    const focused = controls().indexOf(document.activeElement);
    change();
    list.scrollTop = 0;
    drawTools();
    drawOutline();
    controls()[focused]?.focus();
  };
  if (outline.tab === "forest") {
    const members = everyone.filter(inForest).length;
    tools.replaceChildren(
      el(
        "p.quiet",
        roots.length
          ? `${plural(roots.length, "tree")} of ${count(members)} latents; numbers count descendants`
          : "No edge survived the tests.",
      ),
      roots.length === 0
        ? ""
        : el(
            "div.buttons",
            el(
              "button",
              {
                type: "button",
                click: set(() => roots.forEach((root) => everyoneBelow(root, (at) => outline.open.add(at)))),
              },
              "Expand all",
            ),
            el("button", { type: "button", click: set(() => outline.open.clear()) }, "Collapse all"),
          ),
    );
    return;
  }
  const orders = { rate: "firing rate", largest: "largest activation", descendants: "descendants", number: "number" };
  const select = el(
    "select",
    { "aria-label": "Order of the list", change: (event) => set(() => (outline.order = event.target.value))() },
    Object.entries(orders).map(([key, name]) => el("option", { value: key, selected: key === outline.order }, name)),
  );
  tools.replaceChildren(
    el(
      "div.buttons",
      { role: "group", "aria-label": "Level" },
      levels.map((level) =>
        el(
          "button",
          {
            type: "button",
            "aria-pressed": String(level === outline.level),
            click: set(() => (outline.level = level)),
          },
          dot(level),
          ` ${count(ofLevel.get(level).length)}`,
        ),
      ),
    ),
    el("label.quiet", "by ", select),
  );
}

function everyoneBelow(root, act) {
  const waiting = [root];
  while (waiting.length) {
    const latent = waiting.pop();
    if (!children[latent].length) continue;
    act(latent);
    waiting.push(...children[latent]);
  }
}

function showTab(tab) {
  outline.tab = tab;
  list.scrollTop = 0;
  drawTools();
  drawOutline();
}

function reveal(latent) {
  outline.here = latent;
  if (latent >= 0) ancestors(latent).forEach((above) => outline.open.add(above));
  drawOutline();
  const at = outline.rows.findIndex((row) => row.latent === latent);
  if (at < 0) return;
  const top = at * rowHeight();
  if (top < list.scrollTop || top + rowHeight() > list.scrollTop + list.clientHeight) {
    list.scrollTop = Math.max(0, top - list.clientHeight / 3);
    drawRows();
  }
}

function unfold(open) {
  byId("unfold").setAttribute("aria-expanded", String(open));
  document.body.classList.toggle("unfolded", open);
  if (open) drawOutline();
}
