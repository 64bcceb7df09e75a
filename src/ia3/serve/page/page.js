// The page: its views, and what each address shows.
import { get, lookUp } from "./api.js";
import { fill, problem } from "./dom.js";
import { adaptersView } from "./adapters.js";
import { chatView } from "./chat.js";
import { classifyView } from "./classify.js";
import { learnView } from "./learn.js";
import { showLoad } from "./load.js";

const VIEWS = { classify: classifyView, chat: chatView, adapters: adaptersView, learn: learnView };
const built = new Map();

function show() {
  const [name, argument] = location.hash.slice(1).split("/");
  const chosen = Object.hasOwn(VIEWS, name) ? name : "classify";
  for (const view of document.querySelectorAll(".view")) view.hidden = view.id !== `view-${chosen}`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${chosen}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${chosen[0].toUpperCase()}${chosen.slice(1)} · ia3`;
  if (!built.has(chosen)) {
    built.set(chosen, VIEWS[chosen](document.getElementById(`view-${chosen}`)));
  }
  if (argument) built.get(chosen)?.(decoded(argument));
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // an address that somebody has typed
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  // The address says which view is shown.
  event.preventDefault();
  document.getElementById("main").focus();
});
// A file that is dropped beside its place would be opened instead of the page.
for (const kind of ["dragover", "drop"]) {
  addEventListener(kind, (event) => {
    if ([...event.dataTransfer.types].includes("Files")) event.preventDefault();
  });
}
addEventListener("hashchange", show);
show();
showLoad(document.getElementById("live"));
lookUp().catch((error) => {
  if (error.status !== 401) fill(document.getElementById("notice"), problem(error));
});
// Off with --no-train, and for keys that may not.
get("/v1/learn").catch((error) => {
  if (error.status === 404 || error.status === 403) document.querySelector('nav a[href="#learn"]').hidden = true;
});
