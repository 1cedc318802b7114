// Everything works without this script. The script copies secrets, shows events as they happen,
// keeps the overview and the relative times up to date, and leads to the login when the login ends.
"use strict";

const root = document.body.dataset.root;
const announce = (text) => { document.getElementById("live").textContent = text; };

// Buttons that copy the text of an element.
for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    const label = button.innerHTML;
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
      announce("Copied");
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = "Selected: copy with the keyboard";
    }
    setTimeout(() => { button.innerHTML = label; }, 3000);
  });
}

// A box that selects all boxes of a table.
for (const all of document.querySelectorAll("[data-all]")) {
  const boxes = [...document.querySelectorAll(`input[name="${all.dataset.all}"]`)];
  const count = () => boxes.filter((box) => box.checked).length;
  all.hidden = false;
  all.addEventListener("change", () => {
    for (const box of boxes) box.checked = all.checked;
  });
  for (const box of boxes) {
    box.addEventListener("change", () => {
      all.checked = count() === boxes.length;
      all.indeterminate = !all.checked && count() > 0;
    });
  }
}

// Relative times, in the words of the server.
const units = [[60, 1, "second"], [3600, 60, "minute"], [172800, 3600, "hour"],
  [5184000, 86400, "day"], [63072000, 2592000, "month"], [Infinity, 31536000, "year"]];
function relative(seconds) {
  const past = Math.abs(seconds);
  if (past < 10) return seconds < 0 ? "now" : "just now";
  const [, size, name] = units.find(([limit]) => past < limit);
  const n = Math.floor(past / size);
  const text = `${n} ${name}${n === 1 ? "" : "s"}`;
  return seconds < 0 ? `in ${text}` : `${text} ago`;
}
function updateTimes() {
  for (const time of document.querySelectorAll("time[datetime]")) {
    const text = relative((Date.now() - Date.parse(time.dateTime)) / 1000);
    if (time.textContent !== text) time.textContent = text;
  }
}
setInterval(updateTimes, 10000);

// A stream of events, which is open only while the page shows. When the login ends, the stream
// ends, and the page gives way to the login.
let leaving = false;
addEventListener("pagehide", () => { leaving = true; });
function follow(url, onEvent, onState) {
  let source = null, last = "";
  const open = () => {
    if (source) return;
    source = new EventSource(last ? `${url}&after=${last}` : url);
    source.onopen = () => onState(true);
    source.onmessage = (event) => {
      last = event.lastEventId;
      onEvent(event.data);
    };
    source.addEventListener("end", () => {
      close();
      if (!leaving) location.assign(`${root}login?ended=1`);
    });
    source.onerror = async () => {
      onState(false);
      if (leaving || !source || source.readyState !== EventSource.CLOSED) return;
      close();
      setTimeout(check, 5000);
    };
  };
  const close = () => {
    if (source) source.close();
    source = null;
  };
  const check = async () => { // the server has refused the stream: because the login has ended?
    try {
      const headers = { "X-Console-Refresh": "1" };
      const response = await fetch(root, { headers, cache: "no-store" });
      if (response.status === 401) location.assign(`${root}login?ended=1`);
      else if (document.visibilityState === "visible") open();
    } catch {
      setTimeout(check, 10000);
    }
  };
  document.addEventListener("visibilitychange", () => {
    if (document.visibilityState === "visible") open(); else close();
  });
  if (document.visibilityState === "visible") open();
  return { open, close };
}
if (document.body.dataset.alive) follow(document.body.dataset.alive, () => {}, () => {});

// The audit: new events appear above the others.
const tail = document.querySelector("[data-tail]");
if (tail) {
  const body = document.querySelector("[data-events]");
  const state = tail.querySelector("[data-tail-state]");
  const box = tail.querySelector("input");
  tail.hidden = false;
  const add = (row) => {
    if (!box.checked) return;
    body.insertAdjacentHTML("afterbegin", row);
    body.firstElementChild.classList.add("new");
    body.closest("table").hidden = false;
    document.querySelector(".empty")?.remove();
    while (body.rows.length > 500) body.lastElementChild.remove();
    announce(`New event: ${body.rows[0].cells[1].textContent}`);
  };
  const stream = follow(tail.dataset.tail, add,
    (open) => { state.textContent = open ? "connected" : "not connected"; });
  box.addEventListener("change", () => {
    if (box.checked) stream.open(); else stream.close();
    state.textContent = "";
  });
}

// The overview loads its figures again, while nobody reads a table or selects text.
const fresh = document.querySelector("[data-refresh]");
if (fresh) {
  setInterval(async () => {
    if (document.hidden || fresh.querySelector("details[open]") || !getSelection().isCollapsed ||
      fresh.contains(document.activeElement)) return;
    try {
      const headers = { "X-Console-Refresh": "1" };
      const response = await fetch(location.href, { headers, cache: "no-store" });
      if (!response.ok) return;
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      fresh.replaceChildren(...page.querySelector("[data-refresh]").childNodes);
    } catch { /* the next time */ }
  }, 1000 * fresh.dataset.refresh);
}
