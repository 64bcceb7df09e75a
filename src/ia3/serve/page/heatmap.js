// An adapter's vectors: layers from left to right, sites from top to bottom.
import { fill, h, labelled } from "./dom.js";

/** The maps of `/v1/adapters/{name}/vectors`, one at a time. */
export function heatmap(figures) {
  const { layers, sites, maps } = figures;
  const choice = h("select", { onchange: draw }, maps.map((map, at) => h("option", { value: at }, map.title)));
  const grid = h("div", { class: "scroll", role: "group", "aria-label": "Heat map", onkeydown: move });
  const told = h("p", { class: "reading", "aria-hidden": "true" });
  const scale = h("p", { class: "scale" });
  const caption = h("p", { class: "caption" });

  function draw() {
    const map = maps[Number(choice.value)];
    const head = h("tr", {}, h("td"), layers.map((layer) => h("th", { scope: "col" }, layer)));
    const rows = sites.map((site, at) => h("tr", {}, h("th", { scope: "row" }, site),
      layers.map((layer, of) => cell(map, layer, site, map.values[of][at], map.shown[of][at]))));
    fill(grid, h("table", { class: "heat" }, h("caption", { class: "unseen" }, `${map.title} by site and layer`),
      h("thead", {}, head), h("tbody", {}, rows)));
    fill(caption, map.caption);
    grid.querySelector("tbody td:not(.lacking)")?.setAttribute("tabindex", "0");
    fill(told, "Point at a cell to read it, or move there by the arrow keys.");
    const signed = map.values.flat().some((value) => value < 0);
    fill(scale, signed && words(map, -map.most), h("i", {
      class: "ramp", style: { "--from": signed ? "var(--inhibited)" : "var(--cell)", "--to": `var(--${map.positive})` },
    }), words(map, map.most));
  }

  function cell(map, layer, site, value, shown) {
    if (value === null) return h("td", { class: "lacking" }, h("span", { class: "unseen" }, "none"));
    const colour = value < 0 ? "inhibited" : map.positive;
    const strength = Math.min(1, Math.abs(value) / map.most);
    const say = () => fill(told, h("b", {}, `${site}, layer ${layer}: `), shown);
    return h("td", {
      style: { "--strength": `${(100 * strength).toFixed(0)}%`, "--colour": `var(--${colour})` },
      title: `${site}, layer ${layer}: ${shown}`, tabindex: -1, onpointerenter: say, onfocus: say,
    }, h("span", { class: "unseen" }, shown));
  }

  /** The arrow keys go from cell to cell; one of them is in the order of the tab key. */
  function move(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const from = event.target.closest("td");
    if (!step || !from) return;
    event.preventDefault();
    const row = grid.querySelectorAll("tbody tr")[from.parentElement.sectionRowIndex + step[0]];
    const to = row?.cells[from.cellIndex + step[1]];
    if (to?.tagName !== "TD" || to.classList.contains("lacking")) return;
    [from.tabIndex, to.tabIndex] = [-1, 0];
    to.focus();
  }

  draw();
  return h("div", { class: "vectors" }, h("div", { class: "row" }, labelled("Show", choice), scale),
    grid, told, caption);
}

function words(map, value) {
  const of = { mean: (v) => `${v > 0 ? "+" : "−"}${Math.abs(v).toFixed(2)} octaves`, spread: (v) => v.toFixed(2) };
  return (of[map.name] ?? ((v) => `${(100 * v).toFixed(0)}%`))(value);
}
