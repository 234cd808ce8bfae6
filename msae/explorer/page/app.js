// What the address names is shown; links, keys and the browser's back and forward only change the address.

const main = byId("main");
let turn = 0;
let drawn = false;

// What the address asks for, and the latent of that number, -1 where there is none.
function addressed() {
  const asking = location.hash.match(/^#latent=(.+)$/)?.[1];
  return [asking, /^\d+$/.test(asking) && Number(asking) < n ? Number(asking) : -1];
}

async function route() {
  const mine = ++turn;
  const [asking, latent] = addressed();
  const nodes = latent >= 0 ? await latentPage(latent) : asking !== undefined ? unknownPage(asking) : startPage();
  if (mine !== turn) return; // an arrow key was faster
  const atTitle = drawn && (document.activeElement === document.body || main.contains(document.activeElement));
  main.replaceChildren(...nodes);
  drawn = true;
  const name = latent >= 0 ? `#${latent} ${visible(core.label[latent])}`.trim() : core.title;
  document.title = latent >= 0 ? `${name} – ${core.title}` : core.title;
  status.textContent = latent >= 0 ? `Latent ${name}` : "";
  close();
  reveal(latent);
  if (latent >= 0 && narrow.matches) unfold(false);
  scrollTo(0, 0);
  if (atTitle) byId("title").focus({ preventScroll: true }); // what had the focus is gone
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("select, .search")) return;
  if (event.key === "/") {
    // with Shift on some keyboards
    event.preventDefault();
    box.focus();
    box.select();
    return;
  }
  const way = { ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right" }[event.key];
  if (!way || event.shiftKey || event.target.closest(".scroll:focus")) return; // a wide table scrolls
  const [, here] = addressed(); // what is shown lags behind keys that follow fast
  const to = here >= 0 ? neighbours(here)[way] : way === "down" ? roots[0] : undefined;
  if (to === undefined) return;
  event.preventDefault();
  location.hash = `latent=${to}`;
});

byId("tab-forest").addEventListener("click", () => showTab("forest"));
byId("tab-levels").addEventListener("click", () => showTab("levels"));
byId("unfold").addEventListener("click", () => unfold(!document.body.classList.contains("unfolded")));
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
list.addEventListener("scroll", drawRows, { passive: true });
new ResizeObserver(drawOutline).observe(list);
history.scrollRestoration = "manual";
addEventListener("hashchange", route);
if (!roots.length) outline.tab = "levels";
drawTools();
drawOutline();
performance.mark("outline");
await route();
// The words are wanted next; they are read while nobody waits.
(window.requestIdleCallback ?? setTimeout)(() => vocabulary());
