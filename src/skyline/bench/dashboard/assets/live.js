// Where the data comes from: a file beside the page, or a server that is asked whether something is new.

const EVERY_MS = 2000;
const SLOWEST_MS = 30_000;

// `onData(data)` gets fresh data; `onState(state)` is told {kind: static | live | offline | broken, message, since}.
export function follow(onData, onState) {
  if (window.SKYLINE_DATA) {
    onData(window.SKYLINE_DATA);
    onState({ kind: "static", since: window.SKYLINE_DATA.exported });
    return;
  }
  let tag = null;
  let wait = EVERY_MS;
  let timer = 0;
  let asking = false;

  async function load() {
    try {
      const response = await fetch("api/data", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      const body = response.status === 304 ? null : await response.json();
      wait = EVERY_MS;
      if (response.status >= 400) return { kind: "broken", message: body.error };
      tag = response.headers.get("ETag");
      return { kind: "live", data: body };
    } catch {
      // The server has gone, or what answers is not it. It may come back: asked again, ever less often.
      wait = Math.min(wait * 1.5, SLOWEST_MS);
      return { kind: "offline" };
    }
  }

  async function ask() {
    clearTimeout(timer);
    if (asking) return;
    asking = true;
    const { kind, data, message } = await load();
    asking = false;
    if (!document.hidden) timer = setTimeout(ask, wait);
    onState({ kind, message });
    if (data) onData(data);
  }

  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) ask();
  });
  ask();
}
