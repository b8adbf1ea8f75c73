/*
 * Follows the photos or videos whose jobs are not finished. The server renders
 * every card; this puts it in place of the one that is shown. Where the page
 * offers a stream of events the cards come by it, and otherwise they are asked
 * for. Without this file the page works by reloading.
 */

const INTERVAL = 1000; // milliseconds between two questions
const LONGEST = 10000; // after errors, each wait is twice the last, up to this
const PATIENCE = 10000; // for one answer

const grid = document.getElementById("cards");
const activity = document.getElementById("activity");
const connection = document.getElementById("connection");
const news = document.getElementById("news");

let wait = INTERVAL;
let timer = null;
let asking = false;
let stream = null;
const streams = Boolean(grid.dataset.streamUrl);

const unfinished = () => [...grid.querySelectorAll('[data-finished="false"]')];

function query(cards) {
  return new URLSearchParams(cards.map((card) => card.id.split("-")));
}

function parse(html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  return new Map([...template.content.children].map((card) => [card.id, card]));
}

function replace(old, fresh) {
  if (!fresh) return old.remove(); // it was deleted
  if (old.outerHTML === fresh.outerHTML) return;
  if (old.dataset.status === fresh.dataset.status && fresh.dataset.finished === "false") return move(old, fresh);
  // The links and buttons of a card come and go with it; keep the reader's place.
  const place = old.contains(document.activeElement) && document.activeElement;
  old.replaceWith(fresh);
  if (place) {
    const href = place.getAttribute("href");
    (href ? fresh.querySelector(`a[href="${CSS.escape(href)}"]`) : fresh.querySelector("[tabindex]"))?.focus();
  }
  if (news && fresh.dataset.finished === "true") {
    say(news, `${fresh.querySelector(".title").textContent}: ${fresh.querySelector(".status").textContent}`);
  }
}

// Only what moves, so that a button is not taken away from under the pointer.
function move(old, fresh) {
  const [bar, freshBar] = [old, fresh].map((card) => card.querySelector("progress"));
  for (const name of ["value", "max", "aria-label"]) bar.setAttribute(name, freshBar.getAttribute(name));
  say(old.querySelector(".status"), fresh.querySelector(".status").textContent);
}

function say(element, text) {
  // Screen readers may repeat what is set again, even when it is the same.
  if (element.textContent !== text) element.textContent = text;
}

function announce() {
  const left = unfinished().length;
  const before = activity.textContent;
  const { one, many } = grid.dataset;
  if (left) say(activity, left === 1 ? `1 ${one} in progress` : `${left} ${many} in progress`);
  else say(activity, before ? "All done" : "");
}

function failed(error) {
  console.debug("gallery:", error);
  wait = Math.min(wait * 2, LONGEST);
  say(connection, "Reconnecting…");
}

function worked() {
  wait = INTERVAL;
  say(connection, "");
}

// By questions.

async function refresh() {
  asking = true;
  try {
    const old = unfinished();
    const response = await fetch(`${grid.dataset.cardsUrl}?${query(old)}`, {
      signal: AbortSignal.timeout(PATIENCE),
    });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    const fresh = parse(await response.text());
    for (const card of old) replace(card, fresh.get(card.id));
    worked();
  } catch (error) {
    failed(error);
  }
  asking = false;
  announce();
  schedule(wait);
}

// By a stream.

function listen() {
  close();
  stream = new EventSource(`${grid.dataset.streamUrl}?${query(unfinished())}`);
  stream.addEventListener("cards", (event) => {
    for (const [id, html] of Object.entries(JSON.parse(event.data))) {
      const old = document.getElementById(id);
      if (old?.dataset.finished === "false") replace(old, parse(html).get(id));
    }
    worked();
    announce();
  });
  stream.addEventListener("over", close);
  stream.addEventListener("again", () => (close(), schedule(0)));
  // The server has no place for another stream now.
  stream.addEventListener("busy", () => (close(), refresh()));
  stream.addEventListener("error", () => {
    close();
    failed("the stream broke");
    schedule(wait);
  });
}

function close() {
  stream?.close();
  stream = null;
}

function schedule(milliseconds) {
  clearTimeout(timer);
  if (asking || stream || document.hidden || !unfinished().length) return;
  timer = setTimeout(streams ? listen : refresh, milliseconds);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) close();
  schedule(0);
});
addEventListener("online", () => schedule(0));
addEventListener("pagehide", close);

const form = document.getElementById("upload");
if (form) {
  const button = form.querySelector("button");
  const idle = button.textContent;
  form.addEventListener("submit", () => {
    button.disabled = true;
    button.textContent = button.dataset.busy;
  });
  // The browser may show this page again as it was left.
  addEventListener("pageshow", () => {
    button.disabled = false;
    button.textContent = idle;
  });
}
addEventListener("pageshow", () => schedule(0));

announce();
schedule(streams ? 0 : INTERVAL);
