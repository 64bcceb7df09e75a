// How busy the server is, live.
import { get } from "./api.js";
import { fill, h, svg } from "./dom.js";

const EVERY = 2000;
const KEPT = 45;

/** Figures in the header, with the last minute and a half as lines. */
export function showLoad(place) {
  const figures = [
    ["running", "running", (load) => load.running],
    ["waiting", "waiting", (load) => load.waiting],
    ["tokens/s", "tokens a second", (load) => load.tokens_per_second],
    ["texts/s", "texts a second", (load) => load.texts_per_second],
  ].map(([name, title, of]) => {
    const value = h("b", {}, "–");
    const line = svg("polyline", { points: "" });
    const drawing = svg("svg", { viewBox: "0 0 44 18", "aria-hidden": "true" },
      svg("line", { x1: 0, x2: 44, y1: 17, y2: 17 }), line);
    place.append(h("div", { title }, h("dt", {}, name), h("dd", {}, drawing, value)));
    return { of, value, line, seen: [] };
  });

  async function look() {
    if (!document.hidden) {
      try {
        const load = await get("/v1/load");
        place.classList.remove("away");
        for (const { of, value, line, seen } of figures) {
          seen.push(of(load));
          if (seen.length > KEPT) seen.shift();
          fill(value, short(of(load)));
          line.setAttribute("points", points(seen));
        }
      } catch {
        place.classList.add("away");
        for (const { value } of figures) fill(value, "–");
      }
    }
    setTimeout(look, EVERY);
  }
  look();
}

function short(value) {
  if (value >= 1000) return `${(value / 1000).toFixed(1)}k`;
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}

function points(seen) {
  const most = Math.max(1, ...seen);
  const start = KEPT - seen.length;
  return seen.map((value, at) => `${(start + at)},${(16.5 - 15 * value / most).toFixed(1)}`).join(" ");
}
