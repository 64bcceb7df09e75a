// The server's routes, with its key where it wants one.
import { fill, h, labelled } from "./dom.js";

const KEY = "ia3-key";

/** A request; what the server refuses is an `Error` with its message. */
async function send(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer: is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey(Boolean(key));
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: its status has to do */ }
  const failed = new Error(message);
  failed.status = response.status;
  throw failed;
}

export async function get(path) {
  return (await send(path)).json();
}

export async function post(path, body, method = "POST") {
  const form = body instanceof FormData;
  const headers = form || body === undefined ? {} : { "Content-Type": "application/json" };
  const response = await send(path, { method, headers, body: form ? body : JSON.stringify(body) });
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

/** Server-sent events, each as its data; they may want a key, which EventSource cannot send. */
export async function* events(path, options) {
  const response = await send(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export function chat(body, signal) {
  const headers = { "Content-Type": "application/json" };
  return events("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
}

function askForKey(refused) {
  const place = document.getElementById("notice");
  if (place.firstChild) return;
  const input = h("input", { type: "password", autocomplete: "off", required: true });
  fill(place, h("form", {
    class: "card key",
    onsubmit: (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, input.value.trim());
      location.reload();
    },
  }, labelled(refused ? "The server does not know this key. API key" : "The server wants an API key", input,
    "It is kept until this tab is closed."), h("button", { class: "primary" }, "Use this key")));
  input.focus();
}

// -- adapters, which several views show -----------------------------------------------------------

export const known = { adapters: [], skipped: [], models: [] };
const listeners = new Set();

/** Have a function called now and whenever the server's adapters were looked up anew. */
export function whenKnown(listener) {
  listeners.add(listener);
  listener();
}

export async function lookUp() {
  const [listed, models] = await Promise.all([get("/v1/adapters"), get("/v1/models")]);
  known.adapters = listed.adapters;
  known.skipped = listed.skipped;
  known.models = models.data.filter((model) => ["encoder", "language-model"].includes(model.kind));
  for (const listener of listeners) listener();
}
