// The search: a number, a text on which latents fire, or a part of a label.

const box = byId("search");
const results = byId("results");
const status = byId("status");
let asked = 0;

const tokenTable = (() => {
  let value = null;
  return async () => {
    if (value) return value;
    const words = await vocabulary();
    const table = new Map();
    words.forEach((word, id) => word && !table.has(word) && table.set(word, id));
    return (value = { words, table, longest: words.reduce((most, word) => Math.max(most, word.length), 0) });
  };
})();

// Greedy longest match; null where a piece is in no token.
function split(text, { table, longest }) {
  const ids = [];
  for (let at = 0; at < text.length;) {
    let size = Math.min(longest, text.length - at);
    while (size && !table.has(text.slice(at, at + size))) size--;
    if (size) ids.push(table.get(text.slice(at, at + size)));
    else if (core.joined || text[at] !== " ") return null;
    at += size || 1;
  }
  return ids;
}

function firing(ids, table) {
  const unique = [...new Set(ids)];
  const shares = new Map();
  unique.forEach((id, i) => {
    const found = table[id] ?? [];
    for (let at = 0; at < found.length; at += 2) {
      if (!shares.has(found[at])) shares.set(found[at], new Array(unique.length).fill(0));
      shares.get(found[at])[i] = found[at + 1];
    }
  });
  const mean = (each) => each.reduce((sum, share) => sum + share, 0) / each.length;
  return {
    unique,
    found: [...shares]
      .map(([latent, each]) => ({ latent, each, share: mean(each) }))
      .sort((a, b) => b.share - a.share || a.latent - b.latent),
  };
}

async function searched(text) {
  const groups = [];
  const bare = text.trim();
  const asNumber = bare.match(/^#?(\d+)$/);
  if (asNumber && Number(asNumber[1]) < n) groups.push({ title: "Number", items: [{ latent: Number(asNumber[1]) }] });
  if (bare.startsWith("#")) return groups;
  const [table, fires] = await Promise.all([tokenTable(), firesOn()]);
  // In text a word mostly follows a space, and the token has it.
  const variants = core.joined ? [` ${bare}`, bare] : [bare];
  for (const variant of new Set(variants)) {
    const ids = split(variant, table);
    if (!ids?.length) continue;
    const { unique, found } = firing(ids, fires);
    if (!found.length) continue;
    const words = unique.map((id) => table.words[id]);
    groups.push({
      title: ["Fires on ", words.map((word) => [chip(word), " "])],
      note:
        words.length > 1
          ? "mean over these tokens of the share of a token's occurrences on which the latent fires; " +
            "0 where it is not among a token's first"
          : "share of the token's occurrences on which the latent fires",
      items: found
        .slice(0, 15)
        .map(({ latent, each, share }) => ({
          latent,
          value: percent(share),
          title: each.map((one, i) => `${spaced(words[i])} ${percent(one)}`).join(", "),
        })),
    });
  }
  const small = bare.toLowerCase();
  const labelled = small ? everyone.filter((latent) => core.label[latent].toLowerCase().includes(small)) : [];
  if (labelled.length)
    groups.push({
      title: `Label has “${bare}”`,
      note: labelled.length > 30 ? `the first 30 of ${count(labelled.length)}` : null,
      items: labelled.slice(0, 30).map((latent) => ({ latent })),
    });
  return groups;
}

async function search() {
  const turn = ++asked;
  const text = box.value;
  if (!text.trim()) return close();
  const groups = await searched(text);
  if (turn !== asked) return;
  const nodes = groups.map(({ title, note, items }) => [
    el("h2", title),
    note && el("p.quiet", note),
    el(
      "ul",
      items.map(({ latent, value, title: each }) =>
        el("li", link(latent, { click: () => close() }), value && el("span.value", { title: each }, value)),
      ),
    ),
  ]);
  results.replaceChildren(...nodes.flat().filter(Boolean));
  if (!groups.length)
    results.append(el("p.quiet", `Nothing found for “${text.trim()}”: no such number, token or label.`));
  results.hidden = false;
  status.textContent = `${plural(results.querySelectorAll("a").length, "result")}`;
}

function close() {
  asked++;
  results.hidden = true;
  results.replaceChildren();
}

let typing = 0;
box.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(search, 120);
});
box.addEventListener("focus", () => {
  tokenTable();
  firesOn();
  if (box.value && results.hidden) search();
});

async function inSearch(event) {
  const links = [...results.querySelectorAll("a")];
  const at = links.indexOf(document.activeElement);
  if (event.key === "Escape") {
    clearTimeout(typing);
    close();
    box.value = "";
    box.blur();
    document.activeElement.blur?.();
  } else if (event.key === "Enter" && event.target === box) {
    event.preventDefault();
    clearTimeout(typing);
    await search();
    const first = results.querySelector("a");
    if (!first) return;
    box.blur();
    location.hash = first.hash;
    close();
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    const next = at + (event.key === "ArrowDown" ? 1 : -1);
    (next < 0 ? box : (links[next] ?? links[at]))?.focus();
  }
}
const searchPart = document.querySelector(".search");
searchPart.addEventListener("keydown", inSearch);
document.addEventListener("click", (event) => !searchPart.contains(event.target) && close());
searchPart.addEventListener(
  "focusout",
  (event) => event.relatedTarget && !searchPart.contains(event.relatedTarget) && close(),
);
