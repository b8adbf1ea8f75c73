/*
 * Follows the photos whose jobs are not finished. The server renders every
 * card; this only asks for the unfinished ones again and puts them in place.
 * Without it the page works by reloading.
 */

const INTERVAL = 1000; // milliseconds between two questions
const LONGEST = 10000; // after errors, each wait is twice the last, up to this
const PATIENCE = 10000; // for one answer

const grid = document.getElementById("photos");
const activity = document.getElementById("activity");
const connection = document.getElementById("connection");

let wait = INTERVAL;
let timer = null;
let asking = false;

const unfinished = () => [...grid.querySelectorAll('[data-finished="false"]')];

async function fetchCards(old) {
  const query = new URLSearchParams(old.map((card) => ["photo", card.dataset.photoId]));
  const response = await fetch(`${grid.dataset.cardsUrl}?${query}`, {
    signal: AbortSignal.timeout(PATIENCE),
  });
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  const template = document.createElement("template");
  template.innerHTML = await response.text();
  return new Map([...template.content.children].map((card) => [card.id, card]));
}

function replace(old, fresh) {
  if (!fresh) return old.remove(); // the photo was deleted
  if (old.outerHTML === fresh.outerHTML) return;
  // The links of a card come and go with it; keep the reader's place.
  const focused = old.contains(document.activeElement) && document.activeElement.getAttribute("href");
  old.replaceWith(fresh);
  if (focused) fresh.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
}

function say(element, text) {
  // Screen readers may repeat what is set again, even when it is the same.
  if (element.textContent !== text) element.textContent = text;
}

function announce() {
  const left = unfinished().length;
  const before = activity.textContent;
  if (left) say(activity, left === 1 ? "1 photo in progress" : `${left} photos in progress`);
  else say(activity, before ? "All done" : "");
}

async function refresh() {
  asking = true;
  try {
    const old = unfinished();
    const fresh = await fetchCards(old);
    for (const card of old) replace(card, fresh.get(card.id));
    wait = INTERVAL;
    say(connection, "");
  } catch (error) {
    console.debug("gallery:", error);
    wait = Math.min(wait * 2, LONGEST);
    say(connection, "Reconnecting…");
  }
  asking = false;
  announce();
  schedule(wait);
}

function schedule(milliseconds) {
  clearTimeout(timer);
  if (!asking && !document.hidden && unfinished().length) timer = setTimeout(refresh, milliseconds);
}

document.addEventListener("visibilitychange", () => schedule(0));
addEventListener("online", () => schedule(0));

const form = document.getElementById("upload");
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

announce();
schedule(INTERVAL);
