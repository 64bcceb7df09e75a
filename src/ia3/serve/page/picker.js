// Adapters to pick from, however many there are.
import { fill, h } from "./dom.js";

const SHOWN = 60;

/** A list with a search field; calls `changed` with the names that are picked, in their order. */
export function picker(changed) {
  let adapters = [];
  const picked = new Set();
  const search = h("input", {
    type: "search", placeholder: "Search by name or label", "aria-label": "Search adapters",
    oninput: draw,
  });
  const list = h("ul", { class: "picker", "aria-label": "Adapters" });
  const told = h("small", { role: "status" });
  const none = h("button", {
    type: "button", class: "quiet", onclick: () => { picked.clear(); draw(); changed([...picked]); },
  }, "Clear");
  const all = h("button", {
    type: "button", class: "quiet", onclick: () => {
      for (const adapter of found().slice(0, SHOWN)) picked.add(adapter.name);
      draw();
      changed([...picked]);
    },
  }, "Pick all");

  function found() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return adapters;
    return adapters.filter((adapter) => {
      const text = `${adapter.name} ${(adapter.labels ?? []).join(" ")}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
  }

  function draw() {
    const matching = found();
    // What is picked stays in sight.
    const chosen = search.value ? [] : adapters.filter((adapter) => picked.has(adapter.name)).slice(0, SHOWN);
    const rest = matching.filter((adapter) => !chosen.includes(adapter)).slice(0, SHOWN - chosen.length);
    fill(list, [...chosen, ...rest].map(option));
    const more = matching.length - chosen.length - rest.length;
    fill(told, `${picked.size.toLocaleString("en")} of ${adapters.length.toLocaleString("en")} picked`,
      more > 0 && `; ${more.toLocaleString("en")} more match, search for them`);
    none.disabled = !picked.size;
    all.disabled = !matching.length;
    fill(all, matching.length > SHOWN ? `Pick the first ${SHOWN}` : "Pick all");
  }

  function option(adapter) {
    const box = h("input", {
      type: "checkbox", checked: picked.has(adapter.name), onchange: () => {
        if (box.checked) picked.add(adapter.name);
        else picked.delete(adapter.name);
        draw();
        [...list.querySelectorAll("input")].find((each) => each.value === adapter.name)?.focus();
        changed([...picked]);
      },
      value: adapter.name,
    });
    return h("li", {}, h("label", {}, box, h("span", {}, h("b", {}, adapter.name),
      h("small", {}, (adapter.labels ?? []).join(" · ")))));
  }

  return {
    element: h("div", { class: "picking" }, h("div", { class: "row" }, search, all), list,
      h("div", { class: "row told" }, told, none)),
    show(given) {
      adapters = given;
      const names = new Set(given.map((adapter) => adapter.name));
      for (const name of picked) if (!names.has(name)) picked.delete(name);
      draw();
      changed([...picked]);
    },
    pick(names) {
      picked.clear();
      for (const name of names) picked.add(name);
      draw();
      changed([...picked]);
    },
    get picked() { return [...picked]; },
  };
}
