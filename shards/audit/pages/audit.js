"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const { cards, measures, reasons } = data;
const PER_PAGE = 48, PAIRS = 20;
const STORE = "shards-audit-" + data.digest; // pages of other data sets may share the store
const byKey = new Map(cards.map((card, n) => [card.key, n]));
const element = (id) => document.getElementById(id);
let verdicts = new Map(); // key -> [verdict, reason]
let shown = []; // numbers of the cards that are selected, in order
let page = 0, current = 0; // of `shown`
let kept = true; // whether the browser keeps verdicts

function make(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.startsWith("aria-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

// --- verdicts ---

function restore() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORE) || "[]");
    verdicts = new Map(stored.filter(([key]) => byKey.has(key)));
  } catch { kept = false; }
}

function keep() {
  try { localStorage.setItem(STORE, JSON.stringify([...verdicts])); kept = true; } catch { kept = false; }
}

function decide(key, verdict, reason = "") {
  if (verdict) verdicts.set(key, [verdict, reason]); else verdicts.delete(key);
  keep();
  for (const node of document.querySelectorAll(".card")) if (node.dataset.key === key) mark(node);
  state(verdict ? `${key}: ${verdict}ed${reason ? ", " + reason : ""}. ` : `${key}: no verdict. `);
}

function state(text = "") {
  const values = [...verdicts.values()];
  const count = (verdict) => values.filter(([v]) => v === verdict).length.toLocaleString("en");
  const rest = kept ? "" : " This browser does not keep verdicts: download them before you close the page.";
  element("state").textContent =
    `${text}${count("reject")} rejected, ${count("accept")} accepted, ${(cards.length - values.length).toLocaleString("en")} open.${rest}`;
}

function download() {
  const clean = (text) => text.replace(/\s+/g, " ").trim();
  const lines = cards.map((card) => card.key).sort().filter((key) => verdicts.has(key))
    .map((key) => [key, ...verdicts.get(key).map(clean)].join("\t"));
  const table = new Blob([["key\tverdict\treason", ...lines, ""].join("\n")], { type: "text/tab-separated-values" });
  const link = make("a", { href: URL.createObjectURL(table), download: "verdicts.tsv" });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function load(event) {
  const file = event.target.files[0];
  if (!file) return;
  const [head, ...lines] = (await file.text()).split(/\r?\n/).filter((line) => line);
  event.target.value = "";
  if (!head || !head.startsWith("key\tverdict")) return state(`${file.name} is not a table of verdicts. `);
  const rows = lines.map((line) => line.split("\t"));
  const good = rows.filter(([key, verdict]) => byKey.has(key) && ["accept", "reject"].includes(verdict));
  for (const [key, verdict, reason] of good) verdicts.set(key, [verdict, reason || ""]);
  keep();
  select();
  state(`${good.length} of ${rows.length} verdicts of ${file.name} are of records here. `);
}

// --- cards ---

function picture(n) {
  const stored = element("i" + n);
  if (!stored || !stored.textContent) return stored ? "no volume" : "no picture: those of the largest scores alone are kept";
  return make("img", { src: "data:image/webp;base64," + stored.textContent, alt: `Slices of ${cards[n].key}` });
}

function mark(node) {
  const [verdict, reason] = verdicts.get(node.dataset.key) || ["", ""];
  node.classList.toggle("accept", verdict === "accept");
  node.classList.toggle("reject", verdict === "reject");
  node.querySelector("button.accept").setAttribute("aria-pressed", verdict === "accept");
  node.querySelector("button.reject").setAttribute("aria-pressed", verdict === "reject");
  const input = node.querySelector("input.reason");
  input.hidden = verdict !== "reject";
  if (document.activeElement !== input) input.value = reason;
}

function makeCard(n) {
  const card = cards[n];
  const toggle = (verdict) => decide(card.key, (verdicts.get(card.key) || [])[0] === verdict ? "" : verdict);
  const node = make("article", { className: "card", tabIndex: -1, "aria-label": card.key });
  node.dataset.key = card.key;
  const worst = card.worst.filter(([, , z]) => Math.abs(z) >= 1)
    .map(([name, value, z]) => `${name} ${value} (${z > 0 ? "+" : "−"}${Math.abs(z)} SD)`);
  const text = make("div", { className: "text" },
    make("div", { className: "line" }, make("span", {}, card.key),
      make("span", { className: "score", title: "score" }, card.score.toFixed(1))),
    make("p", {}, [card.facts, card.part].filter(Boolean).join(", ")),
    ...worst.map((line) => make("p", {}, line)));
  for (const flag of card.flags) text.append(make("p", { className: "warning" }, flag));
  const reason = make("input", { className: "reason", placeholder: "reason", "aria-label": `Reason to reject ${card.key}` });
  reason.setAttribute("list", "reasons");
  reason.addEventListener("change", () => decide(card.key, "reject", reason.value));
  text.append(make("div", { className: "choice" },
    make("button", { type: "button", className: "accept", onclick: () => toggle("accept") }, "Accept"),
    make("button", { type: "button", className: "reject", onclick: () => toggle("reject") }, "Reject"), reason));
  const enlarge = make("button", { type: "button", className: "picture", "aria-label": `Enlarge ${card.key}`,
    onclick: () => node.classList.toggle("large") }, picture(n));
  node.append(enlarge, text);
  mark(node);
  return node;
}

// --- order, selection and pages ---

const SORTS = [["outlier score", (c) => -c.score], ["key", (c) => c.key],
  ...measures.map((name, m) => [name, (c) => c.values[m]])];
const SHOWS = [["all", () => true], ["open", (c) => !verdicts.has(c.key)],
  ["rejected", (c) => (verdicts.get(c.key) || [])[0] === "reject"],
  ["accepted", (c) => (verdicts.get(c.key) || [])[0] === "accept"], ["flagged", (c) => c.flags.length > 0],
  ...[...new Set(cards.map((c) => c.part))].filter(Boolean).map((part) => [part, (c) => c.part === part])];

function select() {
  const value = SORTS[element("sort").value][1], wanted = SHOWS[element("show").value][1];
  const find = element("find").value.trim().toLowerCase(), sign = element("reverse").checked ? -1 : 1;
  const compare = (a, b) => {
    const x = value(cards[a]), y = value(cards[b]);
    if (x === null || y === null) return (x === null) - (y === null); // missing ones come last
    return x < y ? -sign : x > y ? sign : a - b;
  };
  shown = cards.map((_, n) => n).filter((n) => wanted(cards[n]) && cards[n].key.toLowerCase().includes(find)).sort(compare);
  turn(0);
}

function turn(to, position = 0, focus = false) {
  const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
  page = Math.min(Math.max(to, 0), pages - 1);
  const first = page * PER_PAGE;
  element("montage").replaceChildren(...shown.slice(first, first + PER_PAGE).map(makeCard));
  element("page").textContent = shown.length ? `Page ${page + 1} of ${pages}` : "No record";
  element("previous").disabled = page === 0;
  element("next").disabled = page === pages - 1;
  move(first + position, focus);
  state();
}

function move(to, focus = true) {
  if (to < 0 || to >= shown.length) return;
  const inPage = to - page * PER_PAGE;
  if (inPage < 0) return turn(page - 1, PER_PAGE - 1, focus);
  if (inPage >= PER_PAGE) return turn(page + 1, 0, focus);
  current = to;
  [...element("montage").children].forEach((node, n) => { node.tabIndex = n === inPage ? 0 : -1; });
  if (focus) element("montage").children[inPage].focus();
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, .pair")) return;
  const card = cards[shown[current]];
  if (!card) return;
  const next = () => move(current + 1 < shown.length ? current + 1 : current);
  const { key } = event;
  if (key === "a") { decide(card.key, "accept"); next(); }
  else if (key === "r") { decide(card.key, "reject"); next(); }
  else if (reasons[key - 1]) { decide(card.key, "reject", reasons[key - 1]); next(); }
  else if (key === "u") decide(card.key, "");
  else if (key === "ArrowRight") move(current + 1);
  else if (key === "ArrowLeft") move(current - 1);
  else if (key === "n") turn(page + 1, 0, true);
  else if (key === "p") turn(page - 1, 0, true);
  else if (key === "z") element("montage").children[current - page * PER_PAGE].classList.toggle("large");
  else return;
  event.preventDefault();
}

// --- pairs ---

function makePair([first, second, correlation, deviation, repeat], alike) {
  const what = repeat ? (alike ? "repeat scans of one subject" : "scans of one subject that look like different people")
    : "different subjects, likely the same person";
  return make("div", { className: "pair" },
    make("p", {}, make("strong", {}, `${cards[first].key} and ${cards[second].key}`), `: ${what}; correlation ${correlation.toFixed(2)}, ${deviation.toFixed(1)} SD`),
    make("div", { className: "two" }, makeCard(first), makeCard(second)));
}

function showPairs() {
  const pairs = [...data.unlike.map((pair) => [pair, false]), ...data.alike.map((pair) => [pair, true])];
  pairs.sort(([a, x], [b, y]) => (a[4] && x) - (b[4] && y)); // repeat scans that are alike come last
  const more = make("button", { type: "button" }), list = element("pairs");
  let place = 0;
  const extend = () => {
    for (const [pair, alike] of pairs.slice(place, place + PAIRS)) more.before(makePair(pair, alike));
    place += PAIRS;
    more.textContent = `Show more (${pairs.length - place})`;
    more.hidden = place >= pairs.length;
  };
  more.onclick = extend;
  list.append(pairs.length ? more : make("p", {}, "No pair of records is that alike."));
  if (pairs.length) extend();
}

restore();
element("sort").append(...SORTS.map(([name], n) => make("option", { value: n }, name)));
element("show").append(...SHOWS.map(([name], n) => make("option", { value: n }, name)));
document.body.append(make("datalist", { id: "reasons" }, ...reasons.map((reason) => make("option", { value: reason }))));
for (const id of ["sort", "show", "reverse"]) element(id).addEventListener("change", select);
element("find").addEventListener("input", select);
element("download").addEventListener("click", download);
element("load").addEventListener("change", load);
element("previous").addEventListener("click", () => turn(page - 1, 0, true));
element("next").addEventListener("click", () => turn(page + 1, 0, true));
document.addEventListener("keydown", press);
element("montage").addEventListener("focusin", (event) => {
  const node = event.target.closest(".card");
  if (node) { const n = shown.indexOf(byKey.get(node.dataset.key)); if (n >= 0 && n !== current) move(n, false); }
});
select();
showPairs();
