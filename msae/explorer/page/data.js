// The blocks that are packed into the page, and the forest that the parents make.

const BLOCKS_KEPT = 8;

const complete =
  document.readyState === "loading"
    ? new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve, { once: true }))
    : Promise.resolve();

async function unpack(id) {
  const letters = atob(byId(id).textContent);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function once(id) {
  let value = null;
  return () => (value ??= complete.then(() => unpack(id)));
}

if (!window.DecompressionStream) {
  byId("main").replaceChildren(el("p", "This page needs a browser from 2023 or later, for DecompressionStream."));
}
const core = await unpack("core");
const vocabulary = once("vocabulary");
const firesOn = once("fires-on");
const blocks = new Map(); // the one read last is last

async function detail(latent) {
  const block = Math.floor(latent / core.latentsPerBlock);
  const value = blocks.get(block) ?? complete.then(() => unpack(`block-${block}`));
  blocks.delete(block);
  blocks.set(block, value);
  if (blocks.size > BLOCKS_KEPT) blocks.delete(blocks.keys().next().value);
  return (await value)[latent % core.latentsPerBlock];
}

const n = core.level.length;
const everyone = Array.from({ length: n }, (_, latent) => latent);
const children = everyone.map(() => []);
everyone.forEach((latent) => core.parent[latent] >= 0 && children[core.parent[latent]].push(latent));

const descendants = new Array(n).fill(0);
{
  const open = children.map((below) => below.length);
  const ready = everyone.filter((latent) => open[latent] === 0);
  while (ready.length) {
    const latent = ready.pop();
    const above = core.parent[latent];
    if (above < 0) continue;
    descendants[above] += 1 + descendants[latent];
    if (--open[above] === 0) ready.push(above);
  }
}
const bySize = (a, b) => descendants[b] - descendants[a] || core.rate[b] - core.rate[a] || a - b;
children.forEach((below) => below.sort(bySize));
const roots = everyone.filter((latent) => core.parent[latent] < 0 && children[latent].length).sort(bySize);
const inForest = (latent) => core.parent[latent] >= 0 || children[latent].length > 0;
const levels = [...new Set(core.level)].sort((a, b) => a - b);
const ofLevel = new Map(levels.map((level) => [level, everyone.filter((latent) => core.level[latent] === level)]));

function ancestors(latent) {
  const above = [];
  for (let at = core.parent[latent]; at >= 0; at = core.parent[at]) above.unshift(at);
  return above;
}

function neighbours(latent) {
  const above = core.parent[latent];
  const ring = above >= 0 ? children[above] : inForest(latent) ? roots : everyone;
  const at = ring === everyone ? latent : ring.indexOf(latent);
  return { up: above >= 0 ? above : undefined, down: children[latent][0], left: ring[at - 1], right: ring[at + 1] };
}
