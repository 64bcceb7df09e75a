// The adapters that are served: to look at, to add and to delete.
import { get, known, lookUp, post, whenKnown } from "./api.js";
import { complain, counted, dropzone, fill, h, labelled, problem, size } from "./dom.js";
import { heatmap } from "./heatmap.js";

const FILES = ["adapter_config.json", "adapter_model.safetensors", "ia3_task.json", "ia3_head.safetensors"];
const NEEDED = FILES.slice(0, 2);
const SHOWN = 60;
const path = (name) => `/v1/adapters/${encodeURIComponent(name)}`;

export function adaptersView(place) {
  let chosen = [];
  const name = h("input", { required: true, autocomplete: "off", spellcheck: "false" });
  const files = h("input", { type: "file", multiple: true, hidden: true, onchange: () => take({ files: [...files.files], folder: "" }) });
  const said = h("ul", { class: "chosen" });
  const load = h("button", { class: "primary", disabled: true }, "Load");
  const outcome = h("div", { role: "status" });
  const zone = h("div", { class: "drop" },
    h("p", {}, h("b", {}, "Drop an adapter's files or folder here"), h("small", {}, FILES.slice(0, 2).join(" and "), ", with ", FILES[2], " for a classifier")),
    h("button", { type: "button", onclick: () => files.click() }, "Choose files"), files, said);
  const form = h("form", { class: "card", onsubmit: upload }, h("h2", {}, "Add an adapter"), zone,
    labelled("Name", name, "What clients call it"), h("div", { class: "row end" }, load), outcome);
  const search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search the adapters", oninput: draw });
  const total = h("h2", {});
  const reload = h("button", { type: "button", class: "quiet", onclick: lookAgain }, "Reload the folder");
  const list = h("div", { class: "adapters" });
  const skipped = h("div", {});
  fill(place, h("div", { class: "columns" }, form, h("div", { class: "stack" },
    h("div", { class: "card" }, h("div", { class: "row head" }, total, search, reload), list), skipped)));
  dropzone(form, take);

  function take({ files: given, folder }) {
    chosen = given.filter((file) => FILES.includes(file.name));
    const lacking = NEEDED.filter((needed) => !chosen.some((file) => file.name === needed));
    const others = given.length - chosen.length;
    fill(said, chosen.map((file) => h("li", {}, file.name, h("small", {}, size(file.size)))),
      lacking.map((needed) => h("li", { class: "lacking" }, needed, h("small", {}, "is missing"))),
      others > 0 && h("li", { class: "quiet" }, `${counted(others, "other file")} left out`));
    load.disabled = lacking.length > 0;
    if (folder) name.value = folder;
    fill(outcome);
    if (!name.value) name.focus();
  }

  async function upload(event) {
    event.preventDefault();
    const body = new FormData();
    for (const file of chosen) body.append("files", file, file.name);
    load.disabled = true;
    try {
      const exists = known.adapters.some((adapter) => adapter.name === name.value);
      if (exists && !confirm(`There is an adapter ${name.value}. Replace it?`)) return;
      await post(path(name.value), body, "PUT");
      fill(outcome, h("p", { class: "good" }, h("b", {}, name.value), " is served. "));
      await lookUp();
      const added = known.adapters.find((adapter) => adapter.name === name.value);
      if (added?.kind === "classifier") {
        outcome.firstChild.append(h("a", { href: `#classify/${encodeURIComponent(added.name)}` }, "Try it"));
      }
      [chosen, name.value, files.value] = [[], "", ""];
      fill(said);
    } catch (error) {
      complain(outcome, error);
    } finally {
      load.disabled = !chosen.length;
    }
  }

  async function lookAgain() {
    reload.disabled = true;
    try {
      await post("/v1/adapters/reload");
      await lookUp();
    } catch (error) {
      complain(skipped, error);
    } finally {
      reload.disabled = false;
    }
  }

  function draw() {
    const words = search.value.toLowerCase();
    const found = known.adapters.filter((adapter) =>
      `${adapter.name} ${adapter.base} ${(adapter.labels ?? []).join(" ")}`.toLowerCase().includes(words));
    fill(total, counted(known.adapters.length, "adapter"));
    fill(list, found.slice(0, SHOWN).map(entry),
      found.length > SHOWN && h("p", { class: "quiet" }, `${counted(found.length - SHOWN, "more", "more")}: search for them.`),
      !found.length && h("div", { class: "empty" }, known.adapters.length ? "None of this name." : "None yet."));
    fill(skipped, known.skipped.length > 0 && h("div", { class: "card warning" },
      h("h2", {}, `${counted(known.skipped.length, "folder")} skipped`),
      h("ul", {}, known.skipped.slice(0, SHOWN).map((each) => h("li", {}, h("b", {}, each.name), " ", each.error)))));
  }

  function entry(adapter) {
    const labels = adapter.labels ?? [];
    const inside = h("div", {});
    const details = h("details", {
      ontoggle: () => { if (details.open && !inside.firstChild) open(adapter, inside); },
    }, h("summary", {}, h("span", { class: "who" }, h("b", {}, adapter.name),
      h("small", {}, adapter.base, " · ", size(adapter.bytes), adapter.resident && " · in memory")),
    h("span", { class: "chips" }, labels.slice(0, 6).map((label) => h("span", {}, String(label))),
      labels.length > 6 && h("span", { class: "quiet" }, `${labels.length - 6} more`))), inside);
    return details;
  }

  async function open(adapter, inside) {
    const map = h("div", { class: "quiet" }, "Reading its vectors …");
    const failed = h("div", {});
    const remove = h("button", {
      type: "button", class: "danger", onclick: async () => {
        if (!confirm(`Delete ${adapter.name}? Its files are removed.`)) return;
        try {
          await post(path(adapter.name), undefined, "DELETE");
          await lookUp();
        } catch (error) {
          complain(failed, error);
        }
      },
    }, "Delete");
    fill(inside, h("div", { class: "row" },
      adapter.kind === "classifier" && h("a", { class: "button", href: `#classify/${encodeURIComponent(adapter.name)}` }, "Classify"),
      adapter.engine === "language-model" && h("a", { class: "button", href: `#chat/${encodeURIComponent(adapter.name)}` }, "Chat"),
      remove), failed, map);
    try {
      fill(map, heatmap(await get(`${path(adapter.name)}/vectors`)));
      map.classList.remove("quiet");
    } catch (error) {
      fill(map, problem(error));
    }
  }

  whenKnown(draw);
}
