/*
 * Keeps a page of the admin up to date while it shows unfinished jobs.
 *
 * Fetches the page's own address again and copies over what differs, cell by
 * cell, so that check boxes, focus, selected text and scroll positions stay.
 * Everything works without it: the page is then as old as its last reload.
 */

const PERIOD = 2000; // milliseconds between two looks, at least
const LONGEST = 60000; // milliseconds between two looks at a server that does not answer
const PATIENCE = 10000; // milliseconds to wait for an answer

const button = document.querySelector(".gearman-live");
let timer = null;
let period = PERIOD;
let busy = false;
let stopped = false;

const unfinished = () => document.querySelector("[data-gearman-unfinished]") !== null;
const paused = () => button.getAttribute("aria-pressed") === "true";

/** Says whether the page is live, paused, cut off or left as it is; hides when there is nothing to follow. */
function tell(state) {
    button.hidden = !unfinished();
    if (button.dataset.state !== state) {
        button.dataset.state = state;
        button.textContent = button.dataset[state];
    }
}

function schedule() {
    clearTimeout(timer);
    if (!stopped && !paused() && !document.hidden && unfinished()) {
        timer = setTimeout(refresh, period);
    }
}

async function refresh() {
    if (busy) {
        return;
    }
    busy = true;
    const began = performance.now();
    try {
        const response = await fetch(location.href, {
            credentials: "same-origin",
            headers: {"X-Requested-With": "XMLHttpRequest"},
            signal: AbortSignal.timeout(PATIENCE),
        });
        if (response.redirected || (response.status >= 400 && response.status < 500)) {
            stopped = true; // logged out, or the job is gone
        } else if (!response.ok) {
            throw new Error(`status ${response.status}`);
        } else {
            const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
            if (!paused()) {
                update(fresh);
            }
        }
        // A slow page is asked for less often.
        period = Math.max(PERIOD, 4 * (performance.now() - began));
        tell(stopped ? "stopped" : paused() ? "paused" : "live");
    } catch {
        period = Math.min(2 * period, LONGEST);
        tell("lost");
    } finally {
        busy = false;
        schedule();
    }
}

function update(fresh) {
    if (document.body.classList.contains("change-list")) {
        updateList(fresh);
    } else {
        updateJob(fresh);
    }
}

/** Makes the contents alike; leaves the very nodes alone when they are. What was opened stays open. */
function copy(from, to) {
    // The newest stands first, and may have come since: counted from the end, each keeps its place.
    const opened = Array.from(to.querySelectorAll("details"), (one) => one.open).reverse();
    Array.from(from.querySelectorAll("details")).reverse().forEach((one, i) => {
        one.open = opened[i] ?? one.open;
    });
    if (from.innerHTML !== to.innerHTML) {
        to.replaceChildren(...document.adoptNode(from).childNodes);
    }
}

/** The boxes of a list by which its actions choose; Django would keep to those that were there at first. */
const boxes = {
    now: () => Array.from(document.querySelectorAll("#result_list > tbody input.action-select")),
    get length() {
        return this.now().length;
    },
    forEach(visit) {
        this.now().forEach(visit);
    },
    [Symbol.iterator]() {
        return this.now()[Symbol.iterator]();
    },
};

const keyOf = (row) => row.querySelector("th a, td a")?.getAttribute("href");

function updateList(fresh) {
    const body = document.querySelector("#result_list > tbody");
    if (!body) {
        return;
    }
    const rows = new Map(Array.from(body.rows, (row) => [keyOf(row), row]));
    const freshRows = Array.from(fresh.querySelectorAll("#result_list > tbody > tr"));
    for (const row of freshRows) {
        const old = rows.get(keyOf(row));
        if (old && old.cells.length === row.cells.length) {
            Array.from(row.cells).forEach((cell, i) => {
                if (!old.cells[i].classList.contains("action-checkbox")) {
                    copy(cell, old.cells[i]);
                }
            });
        }
    }
    // Rows do not move under a selection or under somebody's keyboard.
    if (body.querySelector("input:checked") || body.contains(document.activeElement)) {
        return;
    }
    const wanted = freshRows.map((row) => rows.get(keyOf(row)) ?? document.adoptNode(row));
    const kept = new Set(wanted);
    for (const row of rows.values()) {
        if (!kept.has(row)) {
            row.remove();
        }
    }
    wanted.forEach((row, i) => {
        if (body.rows[i] !== row) {
            body.insertBefore(row, body.rows[i] ?? null);
        }
    });
    const both = (selector) => [fresh.querySelector(selector), document.querySelector(selector)];
    for (const selector of [".paginator", "[data-gearman-part=note]"]) {
        const [from, to] = both(selector);
        if (from && to && !to.contains(document.activeElement)) {
            copy(from, to);
        }
    }
    // How many there are to choose from. Only the words: Django listens to the link among them.
    for (const selector of [".action-counter", ".actions .all", ".actions .question a"]) {
        const [from, to] = both(selector);
        if (from && to) {
            Object.assign(to.dataset, from.dataset);
            to.textContent = from.textContent;
        }
    }
}

function updateJob(fresh) {
    const sections = (page) => Array.from(page.querySelectorAll("form[id$=_form] fieldset.module"));
    const fields = (section) => Array.from(section.querySelectorAll(".form-row .readonly"));
    const shape = (section) =>
        Array.from(section.querySelectorAll(".form-row"), (row) => row.className).join();
    const [now, then] = [sections(fresh), sections(document)];
    then.forEach((section, i) => {
        if (!now[i]) {
            return;
        }
        if (shape(now[i]) === shape(section)) {
            const values = fields(now[i]);
            fields(section).forEach((field, j) => copy(values[j], field));
        } else {
            copy(now[i], section); // a result has become a traceback
        }
    });
    // There is a section more: the job has logged something, or failed a first time.
    then.at(-1)?.after(...now.slice(then.length).map((section) => document.adoptNode(section)));
}

if (button) {
    // This runs before the page is ready, which is when Django's own script looks for the boxes.
    const watchBoxes = window.Actions;
    if (watchBoxes) {
        window.Actions = (_, options) => watchBoxes(boxes, options);
    }
    // A screen reader hears of the job's status, not of every figure.
    document.querySelector("body.change-form .field-status_badge .readonly")?.setAttribute("aria-live", "polite");
    button.addEventListener("click", () => {
        if (stopped) {
            location.reload(); // asks for the login, or says that the job is gone
            return;
        }
        button.setAttribute("aria-pressed", String(!paused()));
        tell(paused() ? "paused" : "live");
        period = PERIOD;
        if (paused()) {
            clearTimeout(timer);
        } else {
            refresh();
        }
    });
    document.addEventListener("visibilitychange", () => {
        if (document.hidden) {
            clearTimeout(timer);
        } else if (!stopped && !paused() && unfinished()) {
            refresh();
        }
    });
    tell("live");
    schedule();
}
